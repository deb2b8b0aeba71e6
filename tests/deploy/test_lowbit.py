"""Weights of few bits in the file: exact values, int8 kernels, bytes on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from autoprune.compress.quantization import quantized
from autoprune.deploy.onnxruntime import OnnxRuntime
from autoprune.deploy.pack import pack
from autoprune.deploy.runtime import Artifact, Formats, StoredWeight
from autoprune.space.quantization import Quantization
from autoprune.target import Target

IMAGES = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LAYERS = ["0", "3", "6", "8"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48 * 49, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ).eval()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight.normal_()  # of both signs
        assert norm.running_mean is not None
        norm.running_mean.normal_()
    return model


def build(
    bits: int, path: Path, *, int8: bool, how: Quantization | None = None
) -> tuple[Artifact, nn.Module]:
    model = network()
    runtime = OnnxRuntime(Target())
    runtime.prepare(model, IMAGES[:2])
    weights = {}
    if bits == 16:
        weights = {name: StoredWeight(16) for name in LAYERS}
    elif bits < 16:
        made, codes, _ = quantized(model, dict.fromkeys(LAYERS, bits), how or Quantization(), [IMAGES])
        assert isinstance(made, nn.Sequential)
        model = made
        weights = {name: StoredWeight(bits, each.numpy()) for name, each in codes.items()}
    asked = LAYERS if int8 else []
    return runtime.build(model, path, Formats(int8=asked, weights=weights), [IMAGES]), model


def outputs(path: Path) -> Tensor:
    return OnnxRuntime(Target()).predict(path, [IMAGES])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_stored_weights_are_exact_and_small(bits: int, tmp_path: Path) -> None:
    dense, _ = build(32, tmp_path / "dense.onnx", int8=False)
    made, model = build(bits, tmp_path / "small.onnx", int8=False)
    with torch.no_grad():
        torch.testing.assert_close(outputs(made.path), model(IMAGES), atol=1e-5, rtol=1e-4)
    assert made.executed.int8_layers == 0
    assert made.executed.stored_layers == {str(bits): 4}
    share = made.path.stat().st_size / dense.path.stat().st_size
    assert share < bits / 32 + 0.025
    # What runs is the float network, but for linear layers with bits that a kernel reads: no operator more or less.
    read = 2 if bits in (2, 4, 8) else 0
    assert made.executed.operators.get("MatMulNBits", 0) == read
    convolutions = {name: count for name, count in dense.executed.operators.items() if "Gemm" not in name}
    shared = {name: made.executed.operators[name] for name in convolutions}
    assert shared == convolutions if not read else shared.keys() == convolutions.keys()
    assert made.executed.ran == ({f"{bits} bit weights": 2, "float32": 2} if read else {"float32": 4})
    assert made.executed.not_as_asked == ()


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_int8_kernels_run_weights_of_fewer_bits(bits: int, tmp_path: Path) -> None:
    eight, _ = build(8, tmp_path / "eight.onnx", int8=True)
    made, model = build(bits, tmp_path / "small.onnx", int8=True)
    assert made.executed.int8_layers == 4
    assert made.executed.operators == eight.executed.operators
    assert made.executed.stored_layers == {str(bits): 4}
    # Only inputs are rounded besides: as much as int8's own weights and inputs change the dense network, and no more.
    with torch.no_grad():
        error = float((outputs(made.path) - model(IMAGES)).abs().max() / model(IMAGES).abs().max())
    assert error < 0.05
    weights = sum(p.numel() for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1)
    saved = eight.path.stat().st_size - made.path.stat().st_size
    assert saved == pytest.approx(weights * (8 - bits) / 8, rel=0.05)


def test_half_precision_halves_the_file(tmp_path: Path) -> None:
    dense, model = build(32, tmp_path / "dense.onnx", int8=False)
    made, _ = build(16, tmp_path / "half.onnx", int8=False)
    assert made.path.stat().st_size < 0.51 * dense.path.stat().st_size
    assert made.executed.operators == dense.executed.operators
    with torch.no_grad():
        torch.testing.assert_close(outputs(made.path), model(IMAGES), atol=1e-2, rtol=1e-2)


def test_weights_that_are_not_the_networks_are_rounded_to_the_nearest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    runtime = OnnxRuntime(Target())
    runtime.prepare(model, IMAGES[:2])
    wrong = {"3": StoredWeight(6, np.ones((48, 32, 3, 3), np.int8))}
    made = runtime.build(model, tmp_path / "m.onnx", Formats(int8=["3"], weights=wrong), [IMAGES])
    assert "layer '3' has other weights" in caplog.text
    assert made.parity_error < 0.1


@pytest.mark.parametrize("size", [1, 7, 8, 20_001])
@pytest.mark.parametrize("top", [1, 3, 7, 15, 31, 63])
def test_planes_rebuild_every_integer(size: int, top: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-top, top + 1, size).astype(np.int8)
    values[0] = -top
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Cast", ["w"], ["y"], to=onnx.TensorProto.FLOAT)],
        "g",
        [],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [size])],
        [onnx.numpy_helper.from_array(values, "w")],
    )
    proto = pack(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    )
    if size > 8:
        bits = (2 * top).bit_length()
        assert proto.ByteSize() < size * bits / 8 + 600
    session = onnx.reference.ReferenceEvaluator(proto)
    (found,) = session.run(None, {})
    assert np.array_equal(np.asarray(found), values.astype(np.float32))
