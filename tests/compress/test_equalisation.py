"""Equalisation against its formulas, and networks that compute the same before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.compress import equalisation
from autoprune.compress.equalisation import cross_layer_factors, equalised, smooth_factors
from autoprune.compress.flow.families import Family, Tables, families, scale
from autoprune.compress.flow.recorder import channel_flow, input_maxima
from autoprune.compress.flow.units import Flow, Maker, Reader
from autoprune.space.quantization import Equalize, Quantization
from tests.compress.networks import Mixed, OptionA, Plain

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SEQUENCE = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(0))


class Mobile(nn.Module):
    """An inverted residual block between two convolutions, with ReLUs that do not end at 6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.expand, self.expand_norm = nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(24)
        self.project, self.project_norm = nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        y = F.relu(self.expand_norm(self.expand(x)))
        y = F.relu(self.depthwise_norm(self.depthwise(y)))
        x = x + self.project_norm(self.project(y))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def encoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True),
        nn.RMSNorm(16),
        nn.Linear(16, 4),
    )


def uneven(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Return a network in evaluation mode whose channels differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = build().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                gains = torch.randn(len(module.weight), generator=generator).exp()
                module.weight.mul_(gains.reshape(-1, *[1] * (module.weight.dim() - 1)))
            elif isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                module.weight.normal_(generator=generator)  # of both signs
                module.bias.normal_(0.0, 0.3, generator=generator)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator).exp())
                if isinstance(module, nn.LayerNorm):
                    module.bias.normal_(generator=generator)
    return model


def found_in(model: nn.Module, inputs: Tensor, form: Equalize) -> tuple[Flow, list[Family]]:
    flow = channel_flow(model, inputs[:2])
    belongs = equalisation._smooths if form == "smooth" else equalisation._equalises
    return flow, families(flow, belongs)


def made(model: nn.Module, inputs: Tensor, form: Equalize, alpha: float = 0.5) -> nn.Module:
    return equalised(model, Quantization(equalize=form, smooth_alpha=alpha), [inputs])


def outputs_differ(one: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        wanted, got = one(inputs), other(inputs)
    return float((wanted - got).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("form", ["cross_layer", "both"])
@pytest.mark.parametrize("build", [Plain, OptionA, Mixed, Mobile])
def test_a_network_computes_the_same_with_other_weights(
    build: Callable[[], nn.Module], form: Equalize
) -> None:
    model = uneven(build)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = made(model, IMAGES, form)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert own.state_dict().keys() == before.keys()
    assert outputs_differ(model, own, torch.randn(64, 3, 8, 8)) < 1e-5
    assert not all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    for name, tensor in own.state_dict().items():
        if "running" in name:
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("form", ["smooth", "both"])
def test_a_transformer_computes_the_same(form: Equalize) -> None:
    model = uneven(encoder)
    own = made(model, SEQUENCE, form)
    assert outputs_differ(model, own, torch.randn(64, 5, 8)) < 1e-5
    changed = {n for n, p in own.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert {n for n in changed if "norm" in n or n.startswith("2.")} == {
        "1.norm1.weight", "1.norm1.bias", "1.norm2.weight", "1.norm2.bias", "2.weight",
    }  # fmt: skip
    assert {"1.self_attn.in_proj_weight", "1.linear1.weight", "3.weight"} < changed
    assert ("1.linear2.weight" in changed) == (form == "both")  # behind a ReLU


def test_two_layers_by_hand() -> None:
    """Ranges 4 and 1 of channel 0 become 2 and 2, those of channel 1 stay."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    first, second = model[0], model[2]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[4.0], [-3.0]]))
        first.bias.copy_(torch.tensor([1.0, 1.0]))
        second.weight.copy_(torch.tensor([[1.0, 3.0]]))
    own = made(model, torch.tensor([[1.0], [-2.0]]), "cross_layer").state_dict()
    torch.testing.assert_close(own["0.weight"], torch.tensor([[2.0], [-3.0]]))
    torch.testing.assert_close(own["0.bias"], torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(own["2.weight"], torch.tensor([[2.0, 3.0]]))
    assert torch.equal(own["2.bias"], second.bias)


@pytest.mark.parametrize("build", [Plain, Mobile])
def test_what_makes_and_what_reads_a_channel_get_equal_ranges(build: Callable[[], nn.Module]) -> None:
    model = uneven(build)
    flow, found = found_in(model, IMAGES, "cross_layer")
    # As if the last channel alone were ever read: every other one may grow.
    maxima = {r.weight: torch.eye(len(r.units))[-1] for r in flow.readers}
    factors = cross_layer_factors(model, found, maxima, flow.count)
    tables = Tables(model, found)
    for family in found:
        tables.scale(family, factors)
    equal = 0
    for family in found:
        built, read = (largest(tables, sides) for sides in (family.makers, family.readers))
        seen = {r.units[-1].item() for r in family.readers}
        for unit in {*family.units.tolist()} - seen:
            assert built[unit] == pytest.approx(read[unit], rel=0.01)
            equal += 1
    assert equal > 20


def largest(tables: Tables, sides: Sequence[Maker | Reader]) -> dict[int, float]:
    """Return the largest range of each unit."""
    found: dict[int, float] = {}
    for side in sides:
        for unit, value in zip(side.units.tolist(), tables.ranges(side).tolist(), strict=True):
            found[unit] = max(found.get(unit, 0.0), value)
    return found


def test_ranges_of_a_layer_are_those_that_its_batchnorm_leaves() -> None:
    model = uneven(Plain)
    assert isinstance(model, Plain) and isinstance(model.bn1, nn.BatchNorm2d)
    flow, found = found_in(model, IMAGES, "cross_layer")
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval(model.conv1, model.bn1)
    torch.testing.assert_close(
        Tables(model, found).ranges(next(m for m in flow.makers if m.weight == "bn1.weight")).float(),
        folded.weight.detach().abs().amax((1, 2, 3)),
    )


@pytest.mark.parametrize("build", [Plain, Mixed, Mobile])
def test_no_channel_grows_beyond_the_largest_that_was_read(build: Callable[[], nn.Module]) -> None:
    model = uneven(build)
    own = made(model, IMAGES, "cross_layer")
    flow, found = found_in(model, IMAGES, "cross_layer")
    weights = {r.weight for family in found for r in family.readers}
    before, after = (input_maxima(each, weights, [IMAGES]) for each in (model, own))
    for weight in weights:
        assert float(after[weight].max()) <= float(before[weight].max()) * (1 + 1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothing_by_its_formula(alpha: float) -> None:
    model = uneven(lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 2)))
    norm, linear = model.get_submodule("0"), model.get_submodule("1")
    inputs = norm(SEQUENCE).detach().abs().amax((0, 1))
    weights = linear.get_parameter("weight").detach().abs().amax(0)
    wanted = inputs**alpha / weights ** (1.0 - alpha)
    own = made(model, SEQUENCE, "smooth", alpha)
    torch.testing.assert_close(
        own.get_parameter("0.weight") * wanted, norm.get_parameter("weight"), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        own.get_parameter("0.bias") * wanted, norm.get_parameter("bias"), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(own.get_parameter("1.weight"), linear.get_parameter("weight") * wanted)
    assert torch.equal(own.get_parameter("3.weight"), model.get_parameter("3.weight"))
    if alpha == 1.0:  # all inputs end at the same magnitude
        smoothed = own.get_submodule("0")(SEQUENCE).detach().abs().amax((0, 1))
        torch.testing.assert_close(smoothed, torch.ones(8))


def test_all_layers_that_read_a_norm_share_its_factors() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.q, self.k = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            product: Tensor = self.q(y) * self.k(y)
            return product.softmax(-1)

    model = uneven(Three)
    flow, found = found_in(model, SEQUENCE, "smooth")
    assert [(f.name, len(f.readers)) for f in found] == [("norm", 2)]
    maxima = input_maxima(model, {"q.weight", "k.weight"}, [SEQUENCE])
    factors = smooth_factors(model, found, maxima, flow.count, 0.5)[found[0].readers[0].units]
    both = [model.get_parameter(f"{name}.weight").detach().abs().amax(0) for name in "qk"]
    weights = torch.stack(both).amax(0)
    torch.testing.assert_close(factors.float(), (maxima["q.weight"] / weights).sqrt())


def test_dead_and_masked_channels_stay_as_they_are() -> None:
    model = uneven(Plain)
    assert isinstance(model, Plain) and isinstance(model.bn1, nn.BatchNorm2d)
    with torch.no_grad():
        model.bn1.weight[2] = 0.0
        model.conv2.weight[:, 3] = 0.0
        model.conv2.weight[torch.rand(model.conv2.weight.shape) < 0.5] = 0.0
    own = made(model, IMAGES, "cross_layer")
    assert outputs_differ(model, own, IMAGES) < 1e-5
    masked = model.conv2.weight == 0
    assert bool((own.get_parameter("conv2.weight")[masked] == 0).all())
    for channel in (2, 3):
        assert own.get_parameter("bn1.bias")[channel] == model.bn1.bias[channel]
    assert all(bool(tensor.isfinite().all()) for tensor in own.state_dict().values())


def test_what_changes_outputs_is_taken_back_by_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = uneven(Plain)
    flow, found = found_in(model, IMAGES, "cross_layer")

    def wrong(changed: nn.Module, family: Family, factors: Tensor) -> None:
        scale(changed, family, factors)
        if family.name == "bn2":
            with torch.no_grad():
                changed.get_parameter("bn2.bias").add_(0.3)

    monkeypatch.setattr(equalisation, "scale", wrong)
    own = made(model, IMAGES, "cross_layer")
    assert outputs_differ(model, own, IMAGES) < 1e-5
    assert torch.equal(own.get_parameter("bn2.weight"), model.get_parameter("bn2.weight"))
    assert not torch.equal(own.get_parameter("bn1.weight"), model.get_parameter("bn1.weight"))
    assert "the channels of 'bn2' stay as they are; outputs would change by" in caplog.text
    assert "'bn1'" not in caplog.text


def test_outputs_that_are_no_numbers_are_taken_back_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = uneven(Plain)
    monkeypatch.setattr(
        equalisation, "cross_layer_factors", lambda *_: torch.full((10_000,), float("nan"), dtype=torch.float64)
    )  # fmt: skip
    own = made(model, IMAGES, "cross_layer")
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in own.named_parameters())
    assert "'fc1' stay as they are; outputs would change by nan" in caplog.text


def test_a_network_without_such_channels_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3)).eval()
    own = made(model, IMAGES, "both")
    assert "equalize 'cross_layer': this network has no channels that can be rescaled so" in caplog.text
    assert "equalize 'smooth'" in caplog.text
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in own.named_parameters())


@pytest.mark.parametrize(
    ("name", "form", "least"),
    [
        ("shufflenet_v2_x0_5", "cross_layer", 30),  # channels that are split, shuffled and put together again
        ("mobilenet_v3_small", "cross_layer", 5),  # gates, and Hardswish, which fixes channels
        ("googlenet", "cross_layer", 20),  # branches
        ("swin_t", "smooth", 20),  # windows
    ],
)
def test_known_networks_compute_the_same(name: str, form: Equalize, least: int) -> None:
    from torchvision import models

    extra = {"init_weights": False} if name == "googlenet" else {}
    model = uneven(lambda: models.get_model(name, num_classes=4, **extra))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    _, found = found_in(model, images, form)
    assert len(found) >= least
    own = made(model, images, form)
    assert outputs_differ(model, own, images) < 1e-4
    for family in found:
        weight = family.makers[0].weight
        assert not torch.equal(own.get_parameter(weight), model.get_parameter(weight))
