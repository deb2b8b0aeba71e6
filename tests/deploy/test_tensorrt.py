"""TensorRT by a stand-in for the library: what is asked of it, how its answers are read, and what is refused.

No GPU was at hand: that TensorRT does the same as the stand-in is not shown here.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from torch import Tensor

from autoprune.deploy.halves import in_16_bits
from autoprune.deploy.onnx_file import OnnxFiles
from autoprune.deploy.registry import make_runtime
from autoprune.deploy.runtime import Formats, StoredWeight
from autoprune.deploy.session import node_times, open_session
from autoprune.deploy.sessions.onnxruntime import run_onnx
from autoprune.errors import ExportError, UsageError
from autoprune.target import Target
from tests.deploy import standin_tensorrt as standin
from tests.deploy.contract import RuntimeContract, few_bits, inputs, one_cache
from tests.deploy.networks import LAYERS, residual

__all__ = ["inputs", "one_cache"]

pytestmark = pytest.mark.skipif(find_spec("tensorrt") is not None, reason="the library itself is here")
TARGET = Target(runtime="tensorrt")


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        standin.install(patch)
        yield
    standin.remove()


class TestTensorRt(RuntimeContract):
    target = TARGET
    int16 = False
    storage = False
    linear_bits = MappingProxyType({})
    int8_share = (
        1.5  # the stand-in's plan is the ONNX file, whose weights are float before they are quantized
    )

    def test_what_the_measuring_process_loads(self, runtime: Any) -> None:
        pytest.skip("the stand-in is in this process alone")


@pytest.mark.parametrize("packed", [False, True])
def test_what_the_builder_is_told(inputs: Tensor, tmp_path: Path, packed: bool) -> None:
    target = Target(runtime="tensorrt", batch=4)
    runtime = make_runtime(target)
    runtime.prepare(residual(), inputs[:2])
    for name in ("one", "two"):
        made = runtime.build(residual(), tmp_path / f"{name}.engine", Formats(packed=packed), [inputs])
    first, second = standin.Builder.built
    # float32 is float32, and the inspector tells of layers.
    assert first.flags == ({"SPARSE_WEIGHTS"} if packed else set())
    assert first.profiling_verbosity == "DETAILED"
    [profile] = first.profiles
    assert profile.shapes == ((4, 3, 16, 16),) * 3
    assert (first.cache.content, second.cache.content) == (b"timed ", b"timed timed ")
    assert open_session(target, made.path).fixed_batch == 4
    assert runtime.predict(made.path, [inputs[:6]]).shape == (6, 10)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_signed_and_on_the_weights_grids(inputs: Tensor, tmp_path: Path, bits: int) -> None:
    model, weights = few_bits(residual(64), bits, inputs)
    runtime = make_runtime(TARGET)
    runtime.prepare(residual(64), inputs[:2])
    made = runtime.build(model, tmp_path / "m.engine", Formats(int8=LAYERS, weights=weights), [inputs])
    assert made.executed.ran == {"int8": 4} == made.executed.asked
    assert made.parity_error < 0.05
    written = OnnxFiles(1, (), signed=True).write(model, Formats(int8=LAYERS, weights=weights), [inputs])
    graph = onnx.load_model_from_string(written.raw).graph
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    weight = next(n for n in graph.node if n.name == "one").input[1]
    makers = {o: n for n in graph.node for o in n.output}
    quantize = makers[makers[weight].input[0]]
    assert quantize.op_type == "QuantizeLinear"
    steps = values[quantize.input[0]] / values[quantize.input[1]].reshape(-1, 1, 1, 1)
    assert np.abs(steps - np.round(steps)).max() < 1e-3
    assert np.abs(steps).max() <= 2 ** (bits - 1) - 1 + 1e-3


@pytest.mark.parametrize(("precision", "kind"), [("float16", np.float16), ("bfloat16", None)])
def test_graphs_in_16_bits(inputs: Tensor, precision: Any, kind: Any) -> None:
    model = residual()
    files = OnnxFiles(1, (), signed=True)
    for asked in (Formats(), Formats(int8=["one", "head"])):
        written = files.write(model, asked, [inputs])
        proto = onnx.load_model_from_string(written.raw)
        made = in_16_bits(proto, precision)
        onnx.checker.check_model(made)
        assert proto.SerializeToString() == onnx.load_model_from_string(written.raw).SerializeToString()
        ends = [v.type.tensor_type.elem_type for v in (*made.graph.input, *made.graph.output)]
        assert ends == [TensorProto.FLOAT] * 2
        assert TensorProto.FLOAT not in {t.data_type for t in made.graph.initializer}
        if kind is not None:  # onnxruntime has no bfloat16 on the processor
            outputs, wanted = (run_onnx(p.SerializeToString(), inputs.numpy()) for p in (made, proto))
            assert 0 < np.abs(outputs - wanted).max() < 0.05 * np.abs(wanted).max()


def test_layers_in_16_bits_are_told(inputs: Tensor, tmp_path: Path) -> None:
    target = Target(runtime="tensorrt", precision="float16")
    runtime = make_runtime(target)
    runtime.prepare(residual(), inputs[:2])
    made = runtime.build(residual(), tmp_path / "m.engine", Formats(int8=["one"]), [inputs])
    assert made.executed.ran == {"float16": 3, "int8": 1} == made.executed.asked


def test_sizes_of_a_resize_stay_float() -> None:
    scales = onnx.numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    node = onnx.helper.make_node("Resize", ["x", "", "scales"], ["y"])
    ends = [
        onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, s, s])
        for n, s in (("x", 2), ("y", 4))
    ]
    proto = onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [scales]))
    assert in_16_bits(proto, "float16").graph.initializer[0].data_type == TensorProto.FLOAT


def test_what_is_not_made_is_refused_by_name(inputs: Tensor, tmp_path: Path) -> None:
    runtime = make_runtime(TARGET)
    runtime.prepare(residual(), inputs[:2])
    for asked, said in (
        (Formats(dynamic=["head"]), "no dynamic int8 here; asked for: head"),
        (Formats(int16=["one"]), "no int16 here; asked for: one"),
        (Formats(fp8=["head"]), "no fp8 here; asked for: head"),
        (Formats(weights={"one": StoredWeight(16)}, int8=["two"]), "asked for fewer bits in: one"),
    ):
        with pytest.raises(ExportError, match=said):
            runtime.build(residual(), tmp_path / "m.engine", asked, [inputs])
    assert not (tmp_path / "m.engine").exists()
    assert standin.Builder.built == []


def test_a_graph_that_the_parser_refuses_is_told_with_its_reason(
    inputs: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quantizer's usual graph is refused: unsigned, asymmetric, with integer biases."""
    runtime = make_runtime(TARGET)
    runtime.files = OnnxFiles(1, ())  # type: ignore[attr-defined]
    runtime.prepare(residual(), inputs[:2])
    with pytest.raises(
        ExportError, match="TensorRT cannot read the network: .*only symmetric int8 is supported"
    ):
        runtime.build(residual(), tmp_path / "m.engine", Formats(int8=LAYERS), [inputs])
    monkeypatch.setattr(standin.Builder, "build_serialized_network", lambda *_: None)
    with pytest.raises(ExportError, match=r"TensorRT 11\.4\.0 cannot build an engine"):
        runtime.build(residual(), tmp_path / "m.engine", Formats(), [inputs])


def test_an_engine_of_another_machine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    path.write_bytes(b"of another GPU")
    with pytest.raises(UsageError, match=r"model\.engine' cannot be opened by TensorRT 11\.4\.0 on this GPU"):
        open_session(TARGET, path)


def test_time_is_taken_between_events_and_layers_are_told_apart(inputs: Tensor, tmp_path: Path) -> None:
    from autoprune.deploy.owners import layers_of_nodes

    runtime = make_runtime(TARGET)
    runtime.prepare(residual(), inputs[:2])
    made = runtime.build(residual(), tmp_path / "m.engine", Formats(), [inputs])
    images = inputs[:1].numpy()
    assert open_session(TARGET, made.path).timer(images)() == 0.0015
    nodes = node_times(TARGET, made.path, images, 3, 10.0)
    assert nodes is not None
    assert {n.durations_s for n in nodes} == {(0.00025,) * 3}
    assert set(layers_of_nodes(made.path, nodes, LAYERS, TARGET)) == set(LAYERS)


# As the documentation and engines of others show it: version 11, version 10, and less verbosity.
DETAILED: dict[str, Any] = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to stem",
            "LayerType": "Reformat",
            "Inputs": [
                {"Name": "x", "DataType": "Float", "Format": "Row major linear FP32 format (kLINEAR)"}
            ],
            "Outputs": [{"Name": "x'", "DataType": "Int8"}],
            "Metadata": "",
        },
        {
            "Name": "stem.weight + stem_QuantizeLinear + stem + relu",
            "LayerType": "CaskConvolution",
            "Inputs": [
                {"Name": "x'", "DataType": "Int8", "Format": "Thirty-two wide channel vectorized row major"}
            ],
            "Outputs": [{"Name": "a"}],
            "Weights": {"Type": "Int8", "Count": 432},
            "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8",
            "Metadata": "[ONNX Layer: stem_QuantizeLinear]\u001e[ONNX Layer: stem]\u001f[ONNX Layer: relu]",
        },
        {
            "Name": "one",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "a", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
            "Outputs": [{"Name": "b"}],
            "Metadata": "[ONNX Layer: one]",
        },
        {
            "Name": "__myl_AddMul",
            "LayerType": "kgen",
            "Inputs": [{"Name": "b", "DataType": "BFloat16"}],
            "Outputs": [{"Name": "c"}],
        },
        "head + bias",
    ]
}


def test_the_inspector_s_answer_is_read() -> None:
    from autoprune.deploy.tensorrt import engine_layers

    reformat, stem, one, fused, head = engine_layers(DETAILED)
    assert (reformat.kind, reformat.runs_in, reformat.has_weights) == ("Reformat", "float32", False)
    assert stem.made_of == ("stem_QuantizeLinear", "stem", "relu")
    assert (stem.runs_in, stem.has_weights, stem.reads, stem.makes) == ("int8", True, ("x'",), ("a",))
    assert (one.runs_in, one.has_weights) == ("float16", False)
    assert fused.runs_in == "bfloat16"
    assert head.made_of == ("head", "bias")
    assert head.runs_in == "unknown"
    assert list(engine_layers({})) == []
