"""onnxruntime on the CPU: checks candidates' files against their networks, and reads back what it executes."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from autoprune.deploy.checking import check_outputs
from autoprune.deploy.executed import layer_of, told
from autoprune.deploy.files import write_file
from autoprune.deploy.onnx_file import OnnxFiles, Written
from autoprune.deploy.runtime import Artifact, Formats, predicted
from autoprune.deploy.saturation import int8_bits
from autoprune.deploy.session import NodeTime, open_session
from autoprune.deploy.sessions.onnxruntime import run_onnx, session_options
from autoprune.measure.record import Executed
from autoprune.target import Target, usable_cores

# onnxruntime's fusions keep the name of a layer's node, or add one of these to it.
_FUSED = re.compile(r"(_token_\d+|_nchwc|_quant|/MatMulAddFusion)+$")
_INT8_OPERATORS = {"QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger"}
_DYNAMIC_OPERATORS = {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger"}
_LOW_BIT = "MatMulNBits"


class OnnxRuntime:
    """Deploys to onnxruntime's CPU provider.

    Args:
        target: Threads and batch of the deployment.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.files = OnnxFiles(target.batch, int8_bits=partial(int8_bits, target))

    def prepare(self, dense: nn.Module, example: Tensor) -> None:
        """Export the dense network's graph once; see :class:`autoprune.deploy.runtime.Runtime`."""
        self.files.prepare(dense, example)

    def build(
        self, model: nn.Module, path: Path, formats: Formats, calibration: Sequence[Tensor]
    ) -> Artifact:
        """Write, quantize and check a candidate's model file; see :class:`autoprune.deploy.runtime.Runtime`.

        The file is compared twice: the kernels with the arithmetic that the file describes (a bound), and the file
        with the network (a bound for float, recorded for integers).

        Raises:
            ExportError: If the outputs differ by more than the bounds.
        """
        written = self.files.write(model, formats, calibration)
        raw = self._smaller(written)
        outputs = run_onnx(raw, written.inputs)
        error = check_outputs(written, outputs, self.target, written.described(raw))
        executed = self._executed(raw, written)
        write_file(path, raw)
        return Artifact(path, executed, error)

    def predict(self, path: Path, batches: Iterable[Tensor]) -> Tensor:
        """Return the outputs of a model file on all cores, ``(n, classes)``.

        Inputs whose range is found at each inference are rounded over as many examples as the target's batch has.
        """
        session = open_session(self.target, path, usable_cores())
        dynamic = any(node.op_type == "DynamicQuantizeLinear" for node in onnx.load(path).graph.node)
        size = self.target.batch if dynamic else None
        pieces = (piece for batch in batches for piece in torch.split(batch, size or max(1, len(batch))))
        return predicted(session, pieces)

    def _smaller(self, written: Written) -> bytes:
        """Return the packed file where a session makes the same of it; else the file as it is."""
        if written.packed is None:
            return written.raw
        operators, own = (
            Counter(node.op_type for node in executed_graph(each, self.target.threads).node)
            for each in (written.raw, written.packed)
        )
        if operators == own:
            plain, small = (run_onnx(each, written.inputs) for each in (written.raw, written.packed))
            if np.array_equal(plain, small):
                return written.packed
        return written.unpacked("onnxruntime")

    def _executed(self, raw: bytes, written: Written) -> Executed:
        """Read the optimised graph back and say what layers run in, in all of their calls."""
        graph = executed_graph(raw, self.target.threads)
        nodes = set(written.nodes)
        kinds: dict[str, str] = {}
        for node in graph.node:
            name = node.name if node.name in nodes else _FUSED.sub("", node.name)
            if name in nodes or node.op_type in _DYNAMIC_OPERATORS | {_LOW_BIT}:
                kinds.setdefault(name, node.op_type)
        ran = {node: _runs_in(kinds.get(node, ""), written.asked.get(layer_of(node), "")) for node in nodes}
        why = {node: f"it runs as {kinds.get(node, 'part of another operator')} in float32" for node in nodes}
        operators = Counter(node.op_type for node in graph.node)
        return told(written, ran, why, dict(operators), self.target.precision)


def _runs_in(operator: str, asked: str) -> str:
    """Return what a layer runs in by the operator that it became."""
    if operator in _DYNAMIC_OPERATORS and asked == "dynamic int8":
        return asked
    if operator in _INT8_OPERATORS:
        return "int8"
    return asked if operator == _LOW_BIT else "float32"


def executed_graph(model: bytes | str, threads: int) -> onnx.GraphProto:
    """Return the graph that a session makes of a model: what is really executed.

    Args:
        model: The model file or its content.
        threads: Threads of one inference.
    """
    with tempfile.TemporaryDirectory(prefix="autoprune-graph-") as folder:
        options = session_options(threads)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath).graph


def layers_of_nodes(
    model: Path, nodes: Sequence[NodeTime], layers: Collection[str], target: Target
) -> list[str]:
    """Return the layer that each timed node works for; see :func:`autoprune.deploy.owners.layers_of_nodes`."""
    executed = executed_graph(str(model), target.threads)
    written = _upstream_layers(onnx.load(model).graph, layers, {})
    # Kernels of another memory layout are named after the tensor that they make.
    owners = list(_upstream_layers(executed, layers, written, nodes=True).values())
    # Nodes without a name are numbered anew in each session; both lists are in the order of execution.
    if [node.operator for node in nodes] == [node.op_type for node in executed.node]:
        return owners
    by_name = {node.name: owner for node, owner in zip(executed.node, owners, strict=True)}
    return [by_name.get(node.name, "") for node in nodes]


def _upstream_layers(
    graph: onnx.GraphProto, layers: Collection[str], known: dict[str, str], *, nodes: bool = False
) -> dict[str, str]:
    """Return the layer behind each tensor of a graph, or behind each node by its place."""
    makers: dict[str, tuple[int, str]] = {}
    found: dict[str, str] = {}
    for place, node in enumerate(graph.node):
        name = node.name if node.name in layers else _FUSED.sub("", node.name)
        layer = layer_of(name) if layer_of(name) in layers else known.get(name, "")
        is_own = layer_of(name) in layers or name in known
        feeding = max((makers[tensor] for tensor in node.input if tensor in makers), default=(-1, ""))
        own = (place, layer) if is_own else feeding
        makers.update(dict.fromkeys(node.output, own))
        found.update({str(place): own[1]} if nodes else dict.fromkeys(node.output, own[1]))
    return found
