"""Packed weights: nothing is lost, the file is smaller, and what runs is the same as from the unpacked file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from autoprune.deploy import onnx_file as module
from autoprune.deploy import pack as packing
from autoprune.deploy.onnxruntime import OnnxRuntime, executed_graph
from autoprune.deploy.pack import Code, bitmask, gaps, pack
from autoprune.deploy.runtime import Formats
from autoprune.target import Target
from tests.deploy.networks import LAYERS, Residual, residual

Array = NDArray[Any]


def graph_of(values: Array, opset: int = 20) -> onnx.ModelProto:
    """Return a graph that adds a tensor to its input."""
    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    x = helper.make_tensor_value_info("x", kind, values.shape)
    y = helper.make_tensor_value_info("y", kind, values.shape)
    tensor = numpy_helper.from_array(values, "w")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def rebuilt(proto: onnx.ModelProto) -> Array:
    """Return what a packed graph rebuilds, as a session without optimisations computes it."""
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    node = proto.graph.node[-1]
    kind, shape = proto.graph.output[0].type.tensor_type.elem_type, None
    del proto.graph.node[-1]
    del proto.graph.input[:]
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info(node.input[1], kind, shape))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return np.asarray(ort.InferenceSession(proto.SerializeToString(), options).run(None, {})[0])


def sparse(shape: tuple[int, ...], density: float, dtype: str, seed: int = 0) -> Array:
    generator = np.random.default_rng(seed)
    values = generator.integers(1, 100, shape).astype(dtype)
    values[generator.random(shape) >= density] = 0
    return values


@pytest.mark.parametrize("code", [bitmask, gaps])
@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8"])
@pytest.mark.parametrize("shape", [(1000, 3), (64, 32, 3, 3), (2003,)])
@pytest.mark.parametrize("density", [0.0, 0.002, 0.1])
def test_every_code_rebuilds_every_tensor(
    code: Code, dtype: str, shape: tuple[int, ...], density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "CODES", (code,))
    values = sparse(shape, density, dtype)
    proto = pack(graph_of(values))
    assert "w" not in {tensor.name for tensor in proto.graph.initializer}
    onnx.checker.check_model(proto)
    found = rebuilt(proto)
    assert found.dtype == values.dtype
    assert np.array_equal(found, values)


@pytest.mark.parametrize("places", [[0], [255], [256], [0, 255, 510], [0, 256, 766, 1021], [1999], [3, 4, 5]])
def test_distances_beyond_a_byte_are_bridged(places: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CODES", (gaps,))
    values = np.zeros(2000, np.float32)
    values[places] = np.arange(1, len(places) + 1)
    proto = pack(graph_of(values))
    steps = next(t for t in map(numpy_helper.to_array, proto.graph.initializer) if t.dtype == np.uint8)
    # No place is written twice: the standard does not say which of two values stays.
    assert len(set(np.cumsum(steps, dtype=np.int64))) == len(steps)
    assert np.array_equal(rebuilt(proto), values)


def test_the_shorter_code_is_taken_and_only_where_it_is_shorter() -> None:
    def size_and_code(values: Array) -> tuple[int, set[str]]:
        proto = pack(graph_of(values))
        return len(proto.SerializeToString()), {node.op_type for node in proto.graph.node}

    half, operators = size_and_code(sparse((80, 100), 0.5, "int8"))
    assert {"CumSum", "Gather"} <= operators
    assert half == pytest.approx(8000 / 8 + 4000, rel=0.1)
    few, operators = size_and_code(sparse((80, 100), 0.05, "int8"))
    assert "ScatterElements" in operators
    assert few == pytest.approx(2 * 400, rel=0.5)
    for values in (sparse((80, 100), 0.95, "int8"), sparse((5, 5), 0.5, "int8"), np.zeros(9, np.int64)):
        proto = graph_of(values)
        before = proto.SerializeToString()
        assert pack(proto).SerializeToString() == before


def test_constants_alike_are_written_once_and_operators_too_old_leave_the_file_alone() -> None:
    values = sparse((80, 100), 0.3, "int8")
    proto = graph_of(values)
    proto.graph.initializer.append(numpy_helper.from_array(values[::-1].copy(), "v"))
    proto.graph.node.append(helper.make_node("Add", ["x", "v"], ["z"]))
    packed = pack(proto)
    shapes = [t for t in packed.graph.initializer if numpy_helper.to_array(t).tolist() == [80, 100]]
    assert len(shapes) == 1
    assert len({t.name for t in packed.graph.initializer}) == len(packed.graph.initializer)
    old = graph_of(values, opset=17)
    before = old.SerializeToString()
    assert pack(old).SerializeToString() == before


def masked(share: float) -> Residual:
    model = residual(64)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                weight = layer.weight
                edge = weight.abs().flatten().kthvalue(int(share * weight.numel())).values
                weight.mul_(weight.abs() > edge)
    return model


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_a_packed_file_runs_the_same_and_is_smaller(share: float, int8: bool, tmp_path: Path) -> None:
    inputs = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = masked(share)
    runtime = OnnxRuntime(Target())
    runtime.prepare(model, inputs[:2])
    layers = LAYERS if int8 else []
    plain = runtime.build(model, tmp_path / "plain.onnx", Formats(int8=layers), [inputs])
    small = runtime.build(model, tmp_path / "small.onnx", Formats(int8=layers, packed=True), [inputs])
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    width = 1 if int8 else 4
    # A bit for each weight; the operators that rebuild a tensor take about 350 bytes.
    saved = weights * (width * share - 1 / 8) - 4 * 350
    assert small.path.stat().st_size < plain.path.stat().st_size - saved
    assert torch.equal(runtime.predict(plain.path, [inputs]), runtime.predict(small.path, [inputs]))
    assert small.executed == plain.executed
    assert small.executed.int8_layers == (4 if int8 else 0)
    operators = Counter(node.op_type for node in executed_graph(small.path.read_bytes(), 1).node)
    assert operators["QLinearConv" if int8 else "Conv"] + operators["FusedConv"] == 3
    assert operators.keys().isdisjoint(
        {"Div", "Mod", "CumSum", "Gather", "ScatterElements", "ConstantOfShape"}
    )


def test_without_zeros_a_packed_file_is_the_plain_one(tmp_path: Path) -> None:
    inputs = torch.randn(4, 3, 16, 16)
    model = residual()
    runtime = OnnxRuntime(Target())
    runtime.prepare(model, inputs[:2])
    built = [runtime.build(model, tmp_path / f"{p}.onnx", Formats(packed=p), [inputs]) for p in (False, True)]
    assert built[0].path.read_bytes() == built[1].path.read_bytes()


def test_a_runtime_that_does_not_fold_gets_the_plain_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_input(proto: onnx.ModelProto, _: object) -> onnx.ModelProto:
        """Pack by an operator that no session folds."""
        for tensor in [t for t in proto.graph.initializer if len(t.dims) == 4]:
            name = tensor.name
            tensor.name = f"{name}:stored"
            random = helper.make_node(
                "RandomNormal", [], [f"{name}:r"], shape=[1], scale=0.0, dtype=TensorProto.FLOAT
            )
            added = helper.make_node("Add", [tensor.name, f"{name}:r"], [name])
            nodes = [random, added, *proto.graph.node]
            del proto.graph.node[:]
            proto.graph.node.extend(nodes)
        return proto

    inputs: Tensor = torch.randn(4, 3, 16, 16)
    model = masked(0.9)
    runtime = OnnxRuntime(Target())
    runtime.prepare(model, inputs[:2])
    plain = runtime.build(model, tmp_path / "a.onnx", Formats(), [inputs])
    monkeypatch.setattr(module, "pack", with_input)
    kept = runtime.build(model, tmp_path / "b.onnx", Formats(packed=True), [inputs])
    assert kept.path.read_bytes() == plain.path.read_bytes()
