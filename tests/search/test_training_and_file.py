"""What is computed in training with integers, and what the deployed file computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from autoprune.compress.aware import IntegerTraining
from autoprune.compress.discovery import find_groups
from autoprune.compress.finetune import TeacherStream, Trainer
from autoprune.compress.pipeline import Compressed
from autoprune.compress.quantization import quantized
from autoprune.deploy.registry import make_runtime
from autoprune.deploy.runtime import Formats, StoredWeight
from autoprune.deploy.saturation import int8_bits
from autoprune.deploy.sessions.onnxruntime import run_onnx
from autoprune.search.formats import formats_of, stored_weights
from autoprune.space.quantization import Quantization
from autoprune.space.recipe import Recovery, uniform_recipe
from autoprune.target import RUNTIMES, Target
from tests.compress.networks import Split
from tests.deploy.networks import LAYERS, residual

BATCHES = [Split().training_batch(step, 64, 0)[0] for step in range(4)]

SINGLE: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(3, 16, 3, padding=1),
    "without a bias": lambda: nn.Conv2d(3, 16, 3, stride=2, bias=False),
    "depthwise": lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10)),
    "with a ReLU": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()),
}


def trained(model: nn.Module, bits: int, kept: list[str]) -> IntegerTraining:
    """Return a training with integers after it saw all batches; weights stay as they were."""
    training = IntegerTraining(model, dict.fromkeys(kept, bits), kept, 1.0)
    training._begin(model)
    model.train()
    for module in model.modules():  # statistics of BatchNorm are those of the deployed network
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    return training


def file_of(
    model: nn.Module, training: IntegerTraining, folder: Path, target: str = "onnxruntime"
) -> tuple[Path, Formats]:
    """Deploy what a training made, in the bits that it was trained with."""
    runtime = make_runtime(Target(runtime=target))
    runtime.prepare(model, BATCHES[0][:2])
    made, codes, _ = quantized(model, training.layers, Quantization(aware=1.0), BATCHES)
    weights = {name: StoredWeight(training.layers[name], each.numpy()) for name, each in codes.items()}
    formats = Formats(int8=list(training.layers), weights=weights, ranges=training.ranges)
    return runtime.build(made, folder / "model.onnx", formats, BATCHES).path, formats


def grid_of_outputs(path: Path) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of a file's outputs."""
    graph = onnx.load(path).graph
    last = next(node for node in graph.node if graph.output[0].name in node.output)
    assert last.op_type == "DequantizeLinear"
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scale, zero = (torch.from_numpy(values[name].astype("float64")) for name in last.input[1:3])
    return scale, zero


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", SINGLE)
def test_a_layer_computes_in_training_what_it_computes_in_the_file(
    kind: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its outputs, as integers, are the same to the last bit: onnxruntime adds integers up."""
    bits = min(bits, int8_bits(Target()))
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path))
    torch.manual_seed(0)
    model = nn.Sequential(SINGLE[kind]())
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    training = trained(model, bits, names)
    model.eval().double()  # so that what training adds up is exact too
    with torch.no_grad():
        in_training = torch.cat([model(batch.double()) for batch in BATCHES])
    made = training.finish(model.float())
    path, _ = file_of(made, training, tmp_path)
    outputs = torch.cat([torch.from_numpy(run_onnx(path.read_bytes(), b.numpy())) for b in BATCHES])
    scale, zero = grid_of_outputs(path)
    exact = in_training / scale
    codes = (exact.round() + zero).clamp(0, 255) - zero
    # The runtime multiplies sums by scales in float32, which may put what is next to a half on its other side.
    sure = (exact - exact.floor() - 0.5).abs() > 1e-4
    assert float(sure.double().mean()) > 0.999
    assert torch.equal(codes[sure], (outputs.double() / scale).round()[sure])


@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_the_range_of_the_training_is_the_file_s(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A moving average of what the batches span, not what calibration would find."""
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path))
    model = nn.Sequential(SINGLE[kind]())
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    training = trained(model, int8_bits(Target()), names)
    path, _ = file_of(training.finish(model.eval()), training, tmp_path)
    low = torch.stack([batch.min().clamp_max(0) for batch in BATCHES])
    high = torch.stack([batch.max() for batch in BATCHES])
    ends = [low[0], high[0]]
    for step in range(1, len(BATCHES)):
        ends = [0.9 * ends[0] + 0.1 * low[step], 0.9 * ends[1] + 0.1 * high[step]]
    graph = onnx.load(path).graph
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert float(values[first.input[1]]) == pytest.approx(float(ends[1] - ends[0]) / 255, rel=1e-5)
    assert float(ends[1]) != pytest.approx(float(high.max()), rel=1e-3)


# Of the largest output: what the runtime rounds between layers, in 8 bits, and the training does not.
BOUND = 0.03


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "torch", "executorch"])
def test_a_network_stays_within_a_bound_of_its_training(
    target: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path))
    facts = RUNTIMES[target]
    if not facts.installed:
        pytest.skip(f"{target} is not installed: {facts.install}")
    bits = min(bits, int8_bits(Target(runtime=target)))
    model = residual(32)
    layers = [n for n in LAYERS if target != "torch" or n == "head"]  # torch runs no convolution in int8
    training = trained(model, bits, layers)
    model.eval()
    with torch.no_grad():
        in_training = model(BATCHES[0])
        whole = residual(32)(BATCHES[0])
    made = training.finish(model)
    path, _ = file_of(made, training, tmp_path, target)
    outputs = make_runtime(Target(runtime=target)).predict(path, [BATCHES[0]])
    far = float((outputs - in_training).abs().max() / in_training.abs().max())
    rounding = float((whole - in_training).abs().max() / in_training.abs().max())
    assert far < BOUND
    if bits < 7:
        assert far < 0.25 * rounding  # what the training knows of is most of what integers do


def test_ranges_reach_the_file_from_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path))
    split, model = Split(), residual(16)
    groups = find_groups(model, BATCHES[0][:2])
    recovery = Recovery(finetune_steps=4)
    recipe = uniform_recipe(groups, 0.0, 8, width=1, recovery=recovery)
    recipe = recipe.model_copy(update={"quantization": Quantization(aware=0.5)})
    integers = IntegerTraining.of(model, recipe, groups)
    trainer = Trainer(
        model,
        TeacherStream(residual(16), split, seed=0, batch_size=16),
        recovery,
        loss=nn.functional.cross_entropy,
        device=torch.device("cpu"),
    )
    integers.watch(trainer)
    trainer.run(4)
    network = Compressed(integers.finish(trainer.finish()), ranges=integers.ranges)
    assert set(network.ranges) == set(LAYERS)
    assert all(low <= 0.0 < high for low, high in network.ranges.values())
    made, weights = stored_weights(network.model, recipe, groups, BATCHES)
    assert formats_of(made, recipe, groups, weights, ranges=network.ranges).ranges == network.ranges
