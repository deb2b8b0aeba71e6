"""Integer weights of whole networks: every kind of layer, exact grids, biases that keep their means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoprune.compress.quantization import blocks_of, in_halves, quantized
from autoprune.space.quantization import Half, Quantization

IMAGES = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ConvTranspose2d(8, 6, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 13 * 13, 10),
    ).eval()


LAYERS = {"0": 4, "3": 3, "4": 5, "7": 2, "gone": 4}


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "adaptive"])
def test_weights_are_their_integers_times_a_scale_of_each_channel(rounding: str) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    how = Quantization.model_validate({"rounding": rounding, "scale": "mse"})
    copy, codes, _ = quantized(model, LAYERS, how, [IMAGES])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert set(codes) == {"0", "3", "4", "7"}
    for name, integers in codes.items():
        weight = copy.get_submodule(name).get_parameter("weight").detach()
        assert integers.dtype == torch.int8
        assert integers.shape == weight.shape
        assert int(integers.abs().max()) <= 2 ** (LAYERS[name] - 1) - 1
        by_channel = (weight, integers.float())
        if name == "4":
            by_channel = (weight.transpose(0, 1), integers.float().transpose(0, 1))
        for own, code in zip(*by_channel, strict=True):
            steps = own[code != 0] / code[code != 0]
            torch.testing.assert_close(steps, steps[:1].expand_as(steps))
        assert bool((weight[integers == 0] == 0).all())


def test_a_corrected_bias_keeps_the_mean_of_every_output() -> None:
    bright = IMAGES.abs()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 144, 5)).eval()

    def means(layer: str, made: nn.Module) -> Tensor:
        """Return the mean outputs of a layer of ``made`` on what the dense network gives it."""
        x = bright if layer == "0" else model[:3](bright)
        out: Tensor = made.get_submodule(layer)(x).detach()
        return out.mean((0, 2, 3)) if layer == "0" else out.mean(0)

    bits = {"0": 2, "3": 2}
    plain, _, _ = quantized(model, bits, Quantization(), [bright])
    corrected, _, _ = quantized(model, bits, Quantization(bias_correction=True), [bright])
    for layer, bound in (("0", 0.2), ("3", 1e-4)):  # of a convolution, places of the images are sampled
        wanted = means(layer, model)
        off = (means(layer, plain) - wanted).abs().max()
        assert float((means(layer, corrected) - wanted).abs().max()) < bound * float(off)


def test_a_layer_without_bias_gets_one() -> None:
    copy, _, _ = quantized(network(), {"0": 2}, Quantization(bias_correction=True), [IMAGES])
    assert copy.get_submodule("0").get_parameter("bias").shape == (8,)


def test_better_rounding_brings_the_outputs_nearer() -> None:
    model = network()
    with torch.no_grad():
        wanted = model(IMAGES)
        bits = {"0": 3, "7": 3}
        error = {
            rounding: float(
                (
                    quantized(model, bits, Quantization.model_validate({"rounding": rounding}), [IMAGES])[0](IMAGES)
                    - wanted
                ).norm()
            )
            for rounding in ("nearest", "gptq", "adaptive")
        }  # fmt: skip
    assert error["gptq"] < 0.7 * error["nearest"]
    assert error["adaptive"] < 0.9 * error["nearest"]


def test_a_layer_that_cannot_be_seen_as_rows_is_left_out() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Conv2d(4, 4, 1))
    _, codes, _ = quantized(model, {"0": 4, "1": 4}, Quantization(), [])
    assert set(codes) == {"1"}


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "adaptive"])
@pytest.mark.parametrize("bits", [2, 4])
def test_masked_weights_stay_zero(rounding: str, bits: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1600, 10)).eval()
    masked = {}
    with torch.no_grad():
        for name in ("0", "3"):
            weight = model.get_submodule(name).get_parameter("weight")
            masked[name] = torch.rand(weight.shape) < 0.6
            weight.masked_fill_(masked[name], 0.0)
    how = Quantization.model_validate({"rounding": rounding, "scale": "mse"})
    _, codes, _ = quantized(model, dict.fromkeys(masked, bits), how, [IMAGES + 0.5])
    for name, mask in masked.items():
        assert int((codes[name][mask] != 0).sum()) == 0
        assert int((codes[name][~mask] != 0).sum()) > 0


def test_blocks_are_for_layers_whose_features_divide() -> None:
    layers = {
        nn.Linear(64, 4): 2,
        nn.Linear(32, 4): 1,
        nn.Linear(48, 4): 1,
        nn.Conv2d(16, 4, 2): 2,
        nn.Conv2d(16, 4, 3): 1,
        nn.Conv2d(32, 32, 1, groups=2): 1,
        nn.ConvTranspose2d(64, 64, 1): 1,
        nn.ReLU(): 1,
    }
    for layer, blocks in layers.items():
        assert blocks_of(layer, 32) == blocks, layer
        assert blocks_of(layer, None) == 1


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "adaptive"])
@pytest.mark.parametrize("scale", ["minmax", "percentile", "mse"])
def test_weights_are_their_integers_times_the_scales_of_blocks(rounding: str, scale: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(800, 10)
    ).eval()
    how = Quantization.model_validate({"rounding": rounding, "scale": scale, "block_size": 16})
    made = quantized(model, {"0": 3, "2": 3, "4": 4}, how, [IMAGES])
    assert set(made.codes) == {"0", "2", "4"}
    assert {name: tuple(each.shape) for name, each in made.scales.items()} == {"2": (8, 9), "4": (10, 50)}
    for name, steps in made.scales.items():
        weight = made.model.get_submodule(name).get_parameter("weight").detach()
        codes = made.codes[name].float().flatten(1).reshape(*steps.shape, 16)
        torch.testing.assert_close(weight.flatten(1), (codes * steps[:, :, None]).flatten(1))
    assert float((made.model(IMAGES) - model(IMAGES)).norm() / model(IMAGES).norm()) < 0.5


@pytest.mark.parametrize(("half", "kind"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_halves_are_what_16_bits_leave(half: Half, kind: torch.dtype) -> None:
    model = network()
    made = in_halves(model, ["0", "gone"], half)
    before, after = (m.get_parameter("0.weight") for m in (model, made))
    assert torch.equal(after, before.to(kind).float())
    assert not torch.equal(after, before)
    assert torch.equal(made.get_parameter("7.weight"), model.get_parameter("7.weight"))


def test_weights_that_were_trained_on_grids_of_channels_keep_them_in_blocks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 10)).eval()
    trained = quantized(model, {"0": 3}, Quantization(scale="mse"), []).model
    for rounding in ("nearest", "gptq", "adaptive"):
        how = Quantization.model_validate({"rounding": rounding, "block_size": 16})
        made = quantized(trained, {"0": 3}, how, [torch.randn(100, 64)]).model
        torch.testing.assert_close(made.get_parameter("0.weight"), trained.get_parameter("0.weight"))
