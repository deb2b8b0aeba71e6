"""OpenVINO on the CPU: the same ONNX files as onnxruntime's, checked and read back in OpenVINO's own runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from autoprune.deploy.checking import check_outputs
from autoprune.deploy.executed import layer_of, told
from autoprune.deploy.files import write_file
from autoprune.deploy.onnx_file import OnnxFiles, Written
from autoprune.deploy.pack import FOR_OPENVINO
from autoprune.deploy.runtime import Artifact, Formats, predicted
from autoprune.deploy.saturation import int8_bits
from autoprune.deploy.session import NodeTime, open_session, run_all
from autoprune.deploy.sessions.openvino import compile_model
from autoprune.errors import ExportError
from autoprune.measure.record import Executed
from autoprune.target import Target, usable_cores

# The frontend names what it makes of a layer's node after it, with one of these at the end.
_SUFFIX = "/"
_INTEGERS = ("u8", "i8")
_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_FLOATS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
# Operators that rebuild packed weights; what is left of them runs at every inference.
_UNFOLDED = ("ScatterUpdate", "ScatterElementsUpdate", "NonZero", "CumSum")


class OpenVino:
    """Deploys to OpenVINO's CPU plug-in.

    Args:
        target: Threads, batch and precision of the deployment.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.files = OnnxFiles(target.batch, FOR_OPENVINO, int8_bits=partial(int8_bits, target))

    def prepare(self, dense: nn.Module, example: Tensor) -> None:
        """Export the dense network's graph once; see :class:`autoprune.deploy.runtime.Runtime`."""
        self.files.prepare(dense, example)

    def build(
        self, model: nn.Module, path: Path, formats: Formats, calibration: Sequence[Tensor]
    ) -> Artifact:
        """Write, quantize and check a candidate's model file; see :class:`autoprune.deploy.runtime.Runtime`.

        Raises:
            ExportError: If the outputs differ by more than the bounds, or a layer is to find the range of its inputs
                at each inference, which this runtime does for all layers or for none.
        """
        if formats.dynamic:
            raise ExportError(
                f"openvino has no dynamic int8 for single layers; asked for: {', '.join(sorted(formats.dynamic)[:3])}",
                "use static activations, or the target onnxruntime",
            )
        written = self.files.write(model, formats, calibration)
        raw = written.raw if written.packed is None else written.packed
        nodes = self._nodes(raw)
        if written.packed is not None and _unfolded(nodes):
            raw = written.unpacked("openvino")
            nodes = self._nodes(raw)
        outputs = run_all(open_session(self.target, raw, usable_cores()), written.inputs)
        error = check_outputs(written, outputs, self.target, written.described(raw))
        executed = self._executed(nodes, written)
        write_file(path, raw)
        return Artifact(path, executed, error)

    def predict(self, path: Path, batches: Iterable[Tensor]) -> Tensor:
        """Return the outputs of a model file on all cores, ``(n, classes)``."""
        session = open_session(self.target, path, usable_cores())
        return predicted(session, batches)

    def _nodes(self, model: bytes | Path) -> list[Node]:
        return runtime_nodes(compile_model(self.target, model, self.target.threads).get_runtime_model())

    def _executed(self, nodes: Sequence[Node], written: Written) -> Executed:
        """Say what layers run in, in all of their calls, by the runtime's own model."""
        names = layer_names(onnx.load_model_from_string(written.raw).graph)
        kinds = {call: node for node in nodes for call in node.calls(names)}
        ran = {n: _runs_in(kinds.get(n), written.asked.get(layer_of(n), "")) for n in written.nodes}
        why = {n: f"it runs as {k.kind} ({k.primitive}) on {k.precision}" for n, k in kinds.items()}
        # Integers that other runtimes would make float when a file is loaded are read as they are in linear layers.
        read = {n for n, word in ran.items() if word == "8 bit weights" and layer_of(n) in written.integers}
        asked = {layer_of(n): "8 bit weights" for n in read}
        written = replace(written, asked={**asked, **written.asked})
        operators = Counter(node.kind for node in nodes if node.kind not in ("Const", "Input", "Output"))
        return told(written, ran, why, dict(operators), self.target.precision)


@dataclass(frozen=True)
class Node:
    """One node that OpenVINO executes.

    Attributes:
        name: Its name.
        kind: What it does.
        precision: Type of what it reads.
        primitive: Kernel.
        made_of: Names of the operators of the file that it was made of.
        reads: Names of the nodes that it reads.
    """

    name: str
    kind: str
    precision: str
    primitive: str
    made_of: tuple[str, ...]
    reads: tuple[str, ...]

    def calls(self, names: Mapping[str, str]) -> list[str]:
        """Return the calls of layers that it was made of, if it is one; names are those of :func:`layer_names`."""
        if self.kind not in _LAYERS:
            return []
        found = [each.partition(_SUFFIX)[0] for each in self.made_of]
        return list(dict.fromkeys(names[each] for each in found if each in names))


def layer_names(graph: onnx.GraphProto) -> dict[str, str]:
    """Return the names that the frontend gives to what it makes of layers' nodes, with the nodes' own names.

    It takes the node's name, or that of the tensor which the layer makes where that is an output of the network.
    """
    calls = {node.name: node for node in graph.node if node.name and not node.name.startswith("node_")}
    found = {name: name for name in calls}
    made = {node.output[0]: name for name, node in calls.items() if node.output}
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        # A bias that is added apart becomes a part of the layer.
        own = [made[name] for name in node.input if name in made]
        if node.op_type == "Add" and len(own) == 1 and not constants.isdisjoint(node.input):
            made[node.output[0]] = own[0]
    return made | found


def runtime_nodes(model: Any) -> list[Node]:
    """Return the nodes of a runtime model."""
    found = []
    for operator in model.get_ordered_ops():
        info = operator.get_rt_info()
        texts = {
            key: info[key].astype(str)
            for key in ("layerType", "runtimePrecision", "primitiveType", "originalLayersNames")
        }
        found.append(
            Node(
                name=operator.get_friendly_name(),
                kind=texts["layerType"],
                precision=texts["runtimePrecision"],
                primitive=texts["primitiveType"],
                made_of=tuple(texts["originalLayersNames"].split(",")),
                reads=tuple(
                    operator.input_value(i).get_node().get_friendly_name()
                    for i in range(operator.get_input_size())
                ),
            )
        )
    return found


def layers_of_nodes(
    model: Path, nodes: Sequence[NodeTime], layers: Collection[str], target: Target
) -> list[str]:
    """Return the layer that each timed node works for; see :func:`autoprune.deploy.owners.layers_of_nodes`."""
    names = layer_names(onnx.load(model).graph)
    owner: dict[str, tuple[int, str]] = {}
    executed = runtime_nodes(compile_model(target, model, target.threads).get_runtime_model())
    for place, node in enumerate(executed):
        layer = next((n for n in map(layer_of, node.calls(names)) if n in layers), None)
        feeding = max((owner[n] for n in node.reads if n in owner), default=(-1, ""))
        owner[node.name] = (place, layer) if layer is not None else feeding
    return [owner.get(node.name, (-1, ""))[1] for node in nodes]


def _runs_in(node: Node | None, asked: str) -> str:
    """Return what a layer runs in by the node that it became."""
    if node is None:
        return "unknown"
    if node.precision in _INTEGERS and node.primitive.endswith("I8"):
        return "int8"
    # What a layer with compressed weights reads of them is its runtime precision.
    if node.precision in ("u2", "u4", "i4", "u8", "i8"):
        return f"{node.precision[1:]} bit weights"
    return _FLOATS.get(node.precision, node.precision)


def _unfolded(nodes: Iterable[Node]) -> bool:
    """Whether anything of packed weights is left to be rebuilt at every inference."""
    return any(node.kind in _UNFOLDED for node in nodes)
