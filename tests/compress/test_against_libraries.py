"""Our quantizers beside those of maintained libraries, on the same weights, networks and data.

``pip install 'autoprune[quantizers]'`` installs the libraries; what lacks one is skipped by name. With ``-s`` every
comparison prints a line: our figure, theirs, and how much worse ours may be.

What is not compared, because the library cannot do it here: torchao's GPTQ runs on CUDA alone; brevitas' training
loop of learned rounding needs another package, so that its quantizer, its initialisation and its losses are trained by
a loop of this file; brevitas' GPTQ is none where scales follow from statistics of the weights, so that it is compared
with the scales that it fits by squared error; nncf corrects and smooths inside of one call, so that it is compared by
whole networks.
"""

from __future__ import annotations

import copy
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.compress.equalisation import equalised
from autoprune.compress.quantization import quantized
from autoprune.compress.quantizers import largest_code, nearest, scales, spread_scales
from autoprune.deploy.onnxruntime import OnnxRuntime
from autoprune.deploy.openvino import OpenVino
from autoprune.deploy.runtime import Formats
from autoprune.space.quantization import Equalize, Quantization
from autoprune.target import Target
from tests.compress.test_equalisation import uneven

_SEEDS = 4
_INSTALL = "pip install 'autoprune[quantizers]'"


def library(name: str) -> Any:
    """Return a library, or skip."""
    return pytest.importorskip(name, reason=f"{name.partition('.')[0]} is not installed: {_INSTALL}")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep the libraries' warnings to themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def told(what: str, slack: float, ours: float, theirs: float) -> None:
    """Print two figures of which the smaller is the better, and hold ours to theirs."""
    print(f"\n{what:60s} ours {ours:.6g}  theirs {theirs:.6g}  allowed {slack:g} times")
    assert ours <= slack * theirs


def matrix(seed: int = 0) -> Tensor:
    """Rows of unlike ranges, some of them with an outlier."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(64, 128, generator=generator) * torch.randn(64, 1, generator=generator).exp()
    rows[::3, 5] *= 9.0
    return rows


def squared_error(rows: Tensor, steps: Tensor, bits: int) -> float:
    made = nearest(rows, steps, bits) * spread_scales(steps, rows.shape[1])
    return float((made - rows).square().sum())


def correlated(features: int, seed: int = 0) -> Tensor:
    """Inputs as behind a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(1000, features, generator=generator)
    return (mixed @ torch.randn(features, features, generator=generator)).relu()


def relative(got: Tensor, wanted: Tensor) -> float:
    """Return the mean square by which outputs are off, as a share of their variance over examples."""
    return float((got - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean())


# -- scales ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block", [128, 32])
def test_scales_up_to_the_largest_magnitude_are_torchao_s(bits: int, block: int) -> None:
    primitives = library("torchao.quantization.quant_primitives")
    rows, top = matrix(), largest_code(bits)
    theirs, _ = primitives.choose_qparams_affine(
        rows, primitives.MappingType.SYMMETRIC, (1, block), torch.int8, -top, top
    )
    theirs = theirs.reshape(len(rows), -1)
    ours = scales(rows, bits, blocks=128 // block)
    torch.testing.assert_close(ours, theirs)
    zero = torch.zeros_like(theirs)
    codes = primitives.quantize_affine(rows, (1, block), theirs, zero, torch.int8, -top, top)
    assert torch.equal(nearest(rows, ours, bits).to(torch.int8), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block", [128, 32])
def test_scales_by_squared_error_are_no_worse_than_torchao_s(bits: int, block: int) -> None:
    library("torchao")
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.observer import AffineQuantizedMSEObserver
    from torchao.quantization.quant_primitives import MappingType

    rows, top = matrix(), largest_code(bits)
    by = PerAxis(0) if block == 128 else PerGroup(block)
    observer = AffineQuantizedMSEObserver(MappingType.SYMMETRIC, torch.int8, by, -top, top, steps=100)
    observer(rows)
    theirs = observer.calculate_qparams()[0].reshape(len(rows), -1)
    ours = scales(rows, bits, "mse", blocks=128 // block)
    errors = [squared_error(rows, steps, bits) for steps in (ours, theirs)]
    told(f"squared error of weights, {bits} bits, {block} to a scale, torchao", 1.0001, *errors)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_scales_are_no_worse_than_brevitas(bits: int, method: str) -> None:
    layers = library("brevitas.nn")
    from brevitas.quant import scaled_int

    quantizer = {
        "minmax": scaled_int.Int8WeightPerChannelFloat, "mse": scaled_int.Int8WeightPerChannelFloatMSE,
    }[method]  # fmt: skip
    rows = matrix()
    layer = layers.QuantLinear(128, 64, bias=False, weight_quant=quantizer, weight_bit_width=bits)
    layer.weight.data.copy_(rows)
    weight = layer.quant_weight()
    ours = scales(rows, bits, "mse" if method == "mse" else "minmax")
    if method == "minmax":
        torch.testing.assert_close(ours, weight.scale.detach().reshape(64, 1))
    theirs = float((weight.value.detach() - rows).square().sum())
    told(
        f"squared error of weights, {bits} bits, {method}, brevitas",
        1.0001,
        squared_error(rows, ours, bits),
        theirs,
    )


# -- rounding --------------------------------------------------------------------------------


def convolutions(seed: int = 0, spread: float = 0.3) -> nn.Sequential:
    """Three convolutions and a linear layer whose channels have unlike ranges."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Conv2d | nn.Linear):
                gains = torch.exp(spread * torch.randn(len(module.weight)))
                module.weight.mul_(gains.reshape(-1, *[1] * (module.weight.dim() - 1)))
    return model


LAYERS = ("0", "2", "4", "8")


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(256, 3, 12, 12, generator=generator).relu().split(64))  # type: ignore[no-untyped-call]


def of_brevitas(model: nn.Module, bits: int) -> nn.Module:
    """Return brevitas' copy of a network, with scales by squared error for each output channel."""
    import brevitas.nn as layers
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE

    how = {
        "weight_quant": Int8WeightPerChannelFloatMSE, "weight_bit_width": bits, "return_quant_tensor": False,
    }  # fmt: skip
    known = {nn.Conv2d: (layers.QuantConv2d, how), nn.Linear: (layers.QuantLinear, how)}
    made: nn.Module = layerwise_quantize(copy.deepcopy(model), compute_layer_map=known)
    return made.eval()


def ours(model: nn.Module, bits: int, batches: Sequence[Tensor], **how: object) -> nn.Module:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    settings = Quantization.model_validate({"scale": "mse", **how})
    return quantized(model, dict.fromkeys(names, bits), settings, batches).model


@torch.no_grad()
def by_brevitas_gptq(model: nn.Module, bits: int, batches: Sequence[Tensor]) -> nn.Module:
    from brevitas.graph.gptq import gptq_mode

    theirs = of_brevitas(model, bits)
    theirs(batches[0])
    with gptq_mode(theirs, act_order=True, use_quant_activations=False) as mode:
        for _ in range(mode.num_layers):
            for batch in batches:
                mode.model(batch)
            mode.update()
    return theirs


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_of_a_layer_is_as_good_as_brevitas(bits: int) -> None:
    library("brevitas")
    torch.manual_seed(bits)
    model = nn.Sequential(nn.Linear(128, 64)).eval()
    x = correlated(128)
    batches = list(x.split(100))  # type: ignore[no-untyped-call]
    theirs = by_brevitas_gptq(model, bits, batches)
    with torch.no_grad():
        errors = [
            relative(made(x), model(x)) for made in (ours(model, bits, batches, rounding="gptq"), theirs)
        ]
    told(f"output error of a linear layer by GPTQ, {bits} bits, brevitas", 1.03, *errors)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_of_networks_is_as_good_as_brevitas(bits: int) -> None:
    library("brevitas")
    batches = pictures()
    x = torch.cat(batches)
    errors = [0.0, 0.0]
    for seed in range(_SEEDS):
        model = convolutions(seed)
        both = (ours(model, bits, batches, rounding="gptq"), by_brevitas_gptq(model, bits, batches))
        with torch.no_grad():
            errors = [
                sum_ + relative(made(x), model(x)) / _SEEDS for sum_, made in zip(errors, both, strict=True)
            ]
    told(f"output error of convolutions by GPTQ, {bits} bits, brevitas", 1.15, *errors)


def by_brevitas_learned_round(layer: nn.Linear, bits: int, x: Tensor, steps: int = 1000) -> nn.Module:
    """Train brevitas' learned rounding of one layer, with its losses and its usual weights of them."""
    import brevitas.nn as layers
    from brevitas.inject.enum import LearnedRoundImplType
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE
    from brevitas_examples.common.learned_round import learned_round_method as method

    out, features = layer.weight.shape
    theirs = layers.QuantLinear(
        features, out, bias=True, weight_quant=Int8WeightPerChannelFloatMSE, weight_bit_width=bits
    )
    theirs.load_state_dict(layer.state_dict(), strict=False)
    theirs.eval()
    with torch.no_grad():
        theirs(x[:2])
        wanted = layer(x)
    method.insert_learned_round_quantizers(
        theirs, LearnedRoundImplType.HARD_SIGMOID, learned_round_zeta=1.1, learned_round_gamma=-0.1
    )
    theirs.requires_grad_(False)
    learned = [p for each in method.return_learned_round_quantizers(theirs) for p in each.parameters()]
    for parameter in learned:
        parameter.requires_grad_(True)
    pull = method.RoundRegularisationLoss(theirs, max_count=steps)
    loss = method.MSELoss(theirs, reduction="none", dim=-1)
    optimizer = torch.optim.Adam(learned, lr=0.1)
    generator = torch.Generator().manual_seed(0)
    theirs.train()
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,), generator=generator)
        got = theirs(x[chosen])
        optimizer.zero_grad()
        (loss(got, wanted[chosen]) + pull(got, wanted[chosen])).backward()
        optimizer.step()
    made: nn.Module = theirs.eval()
    return made


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_adaptive_rounding_is_as_good_as_brevitas_learned_round(bits: int) -> None:
    library("brevitas_examples.common.learned_round.learned_round_method")
    torch.manual_seed(bits)
    layer = nn.Linear(64, 32)
    x = correlated(64)
    theirs = by_brevitas_learned_round(layer, bits, x)
    mine = ours(nn.Sequential(layer).eval(), bits, [x], rounding="adaptive")
    with torch.no_grad():
        errors = [relative(made(x), layer(x)) for made in (mine, theirs)]
    told(f"output error of a linear layer by adaptive rounding, {bits} bits, brevitas", 1.02, *errors)


# -- what leaves the network as it is ---------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_corrected_biases_are_as_good_as_brevitas(bits: int) -> None:
    library("brevitas")
    from brevitas.graph.calibrate import bias_correction_mode

    batches = pictures()
    x = torch.cat(batches)
    off = [0.0, 0.0, 0.0]
    for seed in range(_SEEDS):
        model = convolutions(seed)
        theirs, mine = of_brevitas(model, bits), ours(model, bits, batches, bias_correction=True)
        with torch.no_grad():
            wanted, plain = model(x), theirs(x)
            with bias_correction_mode(theirs):
                for batch in batches:
                    theirs(batch)
            shifts = ((y.mean(0) - wanted.mean(0)).norm() for y in (mine(x), theirs(x), plain))
        off = [sum_ + float(shift) / _SEEDS for sum_, shift in zip(off, shifts, strict=True)]
    told(f"shift of mean outputs with corrected biases, {bits} bits, brevitas", 1.05, *off[:2])
    assert off[0] < 0.5 * off[2]


@torch.no_grad()
def with_one_scale(model: nn.Module, bits: int) -> nn.Module:
    """Return a copy whose weights have one scale for each layer, which is what equal ranges are good for."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            rows = module.weight.flatten(1)
            step = rows.abs().max().expand(len(rows), 1) / largest_code(bits)
            module.weight.copy_((nearest(rows, step, bits) * step).view_as(module.weight))
    return made


def test_equal_ranges_are_as_good_as_brevitas() -> None:
    library("brevitas")
    from brevitas.fx import symbolic_trace
    from brevitas.graph.equalize import EqualizeGraph

    batches = pictures()
    x = torch.cat(batches)
    errors = {"ours": 0.0, "theirs": 0.0, "plain": 0.0}
    for seed in range(_SEEDS):
        model = convolutions(seed, spread=1.5)
        theirs = EqualizeGraph(iterations=20, threshold=1e-3).apply(symbolic_trace(copy.deepcopy(model)))
        mine = equalised(model, Quantization(equalize="cross_layer"), batches)
        with torch.no_grad():
            wanted = model(x)
            assert relative(mine(x), wanted) < 1e-9
            for name, made in (("ours", mine), ("theirs", theirs), ("plain", model)):
                errors[name] += relative(with_one_scale(made, 8)(x), wanted) / _SEEDS
    told(
        "output error of equalised weights, one scale a layer, brevitas",
        1.1,
        errors["ours"],
        errors["theirs"],
    )
    assert errors["ours"] < 0.8 * errors["plain"]


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_smoothing_factors_are_torchao_s(alpha: float) -> None:
    core = library("torchao.prototype.smoothquant.core")
    model = uneven(lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16)))
    batches = [torch.randn(8, 5, 32) for _ in range(3)]
    observer = core.SmoothQuantObserver(model.get_parameter("1.weight").detach(), alpha)
    with torch.no_grad():
        for batch in batches:
            observer(model.get_submodule("0")(batch))
    theirs = observer.calculate_qparams()[0]
    mine = equalised(model, Quantization(equalize="smooth", smooth_alpha=alpha), batches)
    mine_by_weight = mine.get_parameter("1.weight") / model.get_parameter("1.weight")
    torch.testing.assert_close(mine_by_weight[0].detach(), theirs, rtol=1e-4, atol=1e-5)


# -- whole networks on a runtime --------------------------------------------------------------


class Encoder(nn.Module):
    """A block of a transformer over patches, some of whose normalised channels are large, as in trained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)
        for norm, reader in (
            (self.block.norm1, self.block.self_attn.in_proj_weight), (self.block.norm2, self.block.linear1.weight),
        ):  # fmt: skip
            with torch.no_grad():
                norm.weight[::8] *= 40.0
                reader[:, ::8] /= 40.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y: Tensor = self.head(self.norm(self.block(x)).mean(1))
        return y


def by_nncf(float_file: Path, batches: Sequence[Tensor], **how: Any) -> Any:
    """Return nncf's int8 network of a float file, compiled by OpenVINO."""
    import nncf
    import openvino as ov

    converted = ov.Core().read_model(float_file)
    # Whole batches: of single examples it takes the mean of their largest magnitudes, and is 40 times further off.
    data = nncf.Dataset([batch.numpy() for batch in batches])
    mixed = nncf.QuantizationPreset.MIXED
    made = nncf.quantize(converted, data, preset=mixed, subset_size=len(batches), **how)
    return ov.Core().compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def outputs_of(compiled: Any, batches: Sequence[Tensor]) -> Tensor:
    return torch.from_numpy(np.concatenate([compiled(batch.numpy())[0] for batch in batches]))


def test_a_smoothed_transformer_in_int8_is_as_good_as_nncf_s(tmp_path: Path) -> None:
    nncf = library("nncf")
    library("openvino")
    torch.manual_seed(0)
    model = Encoder().eval()
    batches = [torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    with torch.no_grad():
        wanted = torch.cat([model(batch) for batch in batches])
    runtime = OpenVino(Target(runtime="openvino"))
    runtime.prepare(model, batches[0][:2])
    dense = runtime.build(model, tmp_path / "dense.onnx", Formats(), batches).path
    # The head stays in float on both sides: smoothed, a layer that reads (examples, features) is far off in nncf.
    head = nncf.IgnoredScope(patterns=["head.*"])
    compiled = by_nncf(dense, batches, model_type=nncf.ModelType.TRANSFORMER, ignored_scope=head)
    theirs = outputs_of(compiled, batches)
    layers = ["patches", "block.self_attn.out_proj", "block.linear1", "block.linear2"]
    errors = {}
    forms: tuple[Equalize, ...] = ("none", "smooth")
    for form in forms:
        mine = equalised(model, Quantization(equalize=form), batches)
        made = runtime.build(mine, tmp_path / f"{form}.onnx", Formats(int8=layers), batches)
        errors[form] = relative(runtime.predict(made.path, batches), wanted)
    # Our files round sums and softmaxes between int8 layers too, theirs do not.
    told(
        "output error of a transformer in int8, smoothed, nncf",
        3.0,
        errors["smooth"],
        relative(theirs, wanted),
    )
    assert errors["smooth"] < 0.5 * errors["none"]


def cifar(archive: Path, part: str, count: int) -> tuple[list[Tensor], Tensor]:
    """Return images of all classes alike, normalised, in batches of 50, and their classes."""
    with zipfile.ZipFile(archive) as files:
        names = sorted(
            name for name in files.namelist() if name.startswith(f"{part}/") and name.endswith(".jpg")
        )
        classes = sorted({name.split("/")[1] for name in names})
        by_class = [[name for name in names if name.split("/")[1] == each] for each in classes]
        chosen = [
            (name, label) for label, own in enumerate(by_class) for name in own[: count // len(classes)]
        ]
        images = torch.stack([_image(files, name) for name, _ in chosen])
    labels = torch.tensor([label for _, label in chosen])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return list(images[order].split(50)), labels[order]  # type: ignore[no-untyped-call]


def _image(files: zipfile.ZipFile, name: str) -> Tensor:
    with files.open(name) as file:
        pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).float().movedim(2, 0) / 255.0
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("runtime_name", ["onnxruntime", "openvino"])
def test_int8_of_resnet20_is_as_good_as_nncf_s(shared: Path, tmp_path: Path, runtime_name: str) -> None:
    library("nncf")
    library("openvino")
    from safetensors.torch import load_file

    from autoprune.workloads.cifar_resnet import cifar_resnet

    model = cifar_resnet("cifar_resnet20").eval()
    model.load_state_dict(load_file(shared / "cifar_resnet20.safetensors"))
    batches, _ = cifar(shared / "cifar10-jpeg.zip", "train", 300)
    images, labels = cifar(shared / "cifar10-jpeg.zip", "test", 1000)

    def lost(outputs: Tensor) -> float:
        return 1.0 - float((outputs.argmax(1) == labels).float().mean())

    with torch.no_grad():
        wanted = torch.cat([model(batch) for batch in images])
    made = OpenVino(Target(runtime="openvino")) if runtime_name == "openvino" else OnnxRuntime(Target())
    made.prepare(model, batches[0][:2])
    dense = made.build(model, tmp_path / "dense.onnx", Formats(), batches).path
    theirs = outputs_of(by_nncf(dense, batches), images)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    artifact = made.build(model, tmp_path / "model.onnx", Formats(int8=layers), batches)
    mine = made.predict(artifact.path, images)
    assert artifact.executed.ran == {"int8": 20}
    told(
        f"share of 1,000 CIFAR images missed in int8, {runtime_name}, nncf",
        1.0,
        lost(mine),
        lost(theirs) + 0.01,
    )
    told(
        f"output error of resnet20 in int8, {runtime_name}, nncf",
        2.0,
        relative(mine, wanted),
        relative(theirs, wanted),
    )
    assert lost(mine) <= lost(wanted) + 0.005
    assert F.cross_entropy(mine, labels).isfinite()
