"""onnxruntime on the CPU: export, int8, parity, and what really executes."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.compress.graph.network import sizes_of
from autoprune.config import Target, usable_cores
from autoprune.deploy.bypass import without_blocks
from autoprune.deploy.graph_cache import export_template
from autoprune.deploy.lowbit import put_on_grids, store_small
from autoprune.deploy.pack import pack
from autoprune.deploy.quantize import quantize
from autoprune.deploy.runtime import Artifact, StoredWeight
from autoprune.deploy.session import session_options
from autoprune.deploy.shrink import shrink
from autoprune.deploy.template import (
    Template,
    export_fresh,
    fixed_batch,
    foreign_nodes,
    instantiate,
    layer_nodes,
    layer_of,
)
from autoprune.errors import ExportError
from autoprune.measure.record import Executed

# Rounding of float32 through a deep network stays well below; a wrong weight or shape is far above.
_FLOAT_PARITY = 1e-3
# With weights of 16 bits, which are rounded once more than the network's.
_HALF_PARITY = 1e-2
# The kernels may round a product differently from the arithmetic that the file describes, by a few steps of int8.
_INT8_KERNEL_PARITY = 0.1
_PARITY_EXAMPLES = 8
_CALIBRATION_EXAMPLES = 256
# Tensor elements in one calibration batch: the calibrator keeps every activation of a batch until its end, for 64
# images in vit_b_16 more than 24 GB.
_CALIBRATION_ELEMENTS = 64 * 3 * 64 * 64
# onnxruntime's fusions keep the name of a layer's node, or add one of these to it.
_FUSED = re.compile(r"(_token_\d+|_nchwc|_quant|/MatMulAddFusion)+$")
# Graphs of networks that the dense one does not fit, kept for the next candidate alike.
_KEPT_TEMPLATES = 8
_log = logging.getLogger(__name__)
_INT8_OPERATORS = {
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
}


class OnnxRuntime:
    """Deploys to onnxruntime's CPU provider.

    Args:
        target: Threads and batch of the deployment.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._template: Template | None = None
        self._templates: dict[str, Template] = {}
        self._modules: dict[str, str] = {}
        self._sizes: dict[str, int] = {}

    def prepare(self, dense: nn.Module, example: Tensor) -> None:
        """Export the dense network's graph once; see :class:`autoprune.deploy.runtime.Runtime`."""

        def fits(template: Template) -> bool:
            return self._filled(template, dense, example, wanted) is not None

        self._modules = {name: type(module).__name__ for name, module in dense.named_modules()}
        self._sizes = sizes_of(dense)
        with torch.no_grad():
            wanted = dense(example).numpy()
        self._template = export_template(dense, example, batch=self.target.batch, fits=fits)

    def build(
        self,
        model: nn.Module,
        path: Path,
        *,
        int8_layers: Collection[str],
        calibration: Sequence[Tensor],
        packed: bool = False,
        weights: Mapping[str, StoredWeight] | None = None,
    ) -> Artifact:
        """Write, quantize and check a candidate's model file; see :class:`autoprune.deploy.runtime.Runtime`.

        The float graph is compared with the network: where putting the weights into the dense network's graph
        does not give the network's outputs, the candidate is exported by itself. Int8 is compared twice: the
        kernels with the arithmetic that the file describes (a bound), and the file with the network (recorded).

        Raises:
            ExportError: If the outputs differ by more than the bounds.
        """
        inputs = torch.cat(list(calibration[:1]))[:_PARITY_EXAMPLES]
        proto, wanted = self._float_graph(model, inputs)
        nodes, foreign = sorted(layer_nodes(proto)), len(foreign_nodes(proto))
        layers = sorted({layer_of(node) for node in nodes})
        own = {name for name, _ in model.named_modules()}
        asked = sorted(_with_projections(set(int8_layers), [name for name in layers if name not in own]))
        small = {name: stored for name, stored in (weights or {}).items() if name in layers}
        if asked:
            batches = _calibration_arrays(calibration, fixed_batch(proto))
            overrides = put_on_grids(proto, small, asked)
            proto = quantize(proto, [name for name in asked if name in layers], batches, overrides)
        store_small(proto, small, asked)
        proto = shrink(proto)
        raw = proto.SerializeToString()
        if packed or small:
            raw = self._packed(proto, raw, inputs)
        outputs = self._run(raw, inputs)
        error = relative_error(outputs, wanted)
        if asked:
            described = self._run(raw, inputs, optimized=False)
            kernels = relative_error(outputs, described)
            if not kernels <= _INT8_KERNEL_PARITY:
                raise ExportError(
                    f"int8 kernels differ from the arithmetic of the file by {kernels:.3g} of the largest output "
                    f"(allowed: {_INT8_KERNEL_PARITY:g})",
                    "keep these groups in float (bits: 32) on this machine",
                )
        elif not error <= (_HALF_PARITY if small else _FLOAT_PARITY):
            raise ExportError(
                f"the file's outputs differ from its graph's: {error:.3g} of the largest output"
            )
        executed = self._executed(raw, nodes, asked, foreign)
        stored = Counter(str(each.bits) for each in small.values())
        executed = executed.model_copy(update={"stored_layers": dict(sorted(stored.items()))})
        _write(path, raw)
        return Artifact(path, executed, error)

    def predict(self, path: Path, batches: Iterable[Tensor]) -> Tensor:
        """Return the outputs of a model file on all cores, ``(n, classes)``."""
        session = ort.InferenceSession(
            str(path), session_options(usable_cores()), providers=["CPUExecutionProvider"]
        )
        fixed = session.get_inputs()[0].shape[0]
        name = session.get_inputs()[0].name
        outputs = [_run_session(session, name, batch.numpy(), fixed) for batch in batches]
        return torch.from_numpy(np.concatenate(outputs))

    def _float_graph(self, model: nn.Module, inputs: Tensor) -> tuple[onnx.ModelProto, NDArray[np.float32]]:
        """Return the candidate's float graph, compared with the network, and the network's outputs."""
        with torch.no_grad():
            wanted = model(inputs).numpy()
        for template in self._templates_for(model):
            found = self._filled(template, model, inputs, wanted)
            if found is not None:
                return found, wanted
        _log.info("this candidate does not fit into the dense network's graph and is exported by itself")
        fresh = export_fresh(model, inputs[:2], batch=self.target.batch)
        self._templates[_topology(model)] = fresh
        while len(self._templates) > _KEPT_TEMPLATES:
            del self._templates[next(iter(self._templates))]
        proto = fresh.proto
        error = relative_error(self._run(proto.SerializeToString(), inputs), wanted)
        if not error <= _FLOAT_PARITY:
            raise ExportError(
                f"the exported network's outputs differ from the network's by {error:.3g} of the largest output "
                f"(allowed: {_FLOAT_PARITY:g})",
                "an operator of this network does something else in ONNX; please report the model",
            )
        return proto, wanted

    def _templates_for(self, model: nn.Module) -> Iterator[Template]:
        """Yield the graphs that may be the candidate's: one made before, and the dense one without its lost blocks."""
        topology = _topology(model)
        if topology in self._templates:
            yield self._templates[topology]
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        # Where a layer became another module, its weights have no place in the dense network's graph.
        changed = any(kinds.get(name, kind) not in (kind, "Identity") for name, kind in self._modules.items())
        # The graph of a network that was written as a graph holds its sizes as constants.
        changed = changed or sizes_of(model) != self._sizes
        if self._template is None or changed:
            return
        lost = [
            name for name, kind in self._modules.items() if kind != "Identity" and _is_identity(model, name)
        ]
        smaller = without_blocks(self._template, lost) if lost else self._template
        if smaller is not None:
            yield smaller

    def _filled(
        self, template: Template, model: nn.Module, inputs: Tensor, wanted: NDArray[np.float32]
    ) -> onnx.ModelProto | None:
        """Return the graph with the network's weights; None where they do not go together."""
        for free_flattening in (False, True) if template.takes_weights else ():
            try:
                proto = instantiate(template, model, free_flattening=free_flattening)
                error = relative_error(self._run(proto.SerializeToString(), inputs), wanted)
            except Exception as fault:  # a graph of another topology fails in any way
                _log.debug("the graph does not take these weights: %s", fault)
                continue
            if error <= _FLOAT_PARITY:
                return proto
        return None

    def _run(self, raw: bytes, inputs: Tensor, *, optimized: bool = True) -> NDArray[np.float32]:
        options = session_options(usable_cores())
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
        inputs_of = session.get_inputs()[0]
        return _run_session(session, inputs_of.name, inputs.numpy(), inputs_of.shape[0])

    def _packed(self, proto: onnx.ModelProto, raw: bytes, inputs: Tensor) -> bytes:
        """Return the packed file where a session makes the same of it; else the file as it is."""
        small: bytes = pack(proto).SerializeToString()
        operators, own = (
            Counter(node.op_type for node in executed_graph(each, self.target.threads).node)
            for each in (raw, small)
        )
        if operators != own or not np.array_equal(self._run(raw, inputs), self._run(small, inputs)):
            _log.warning("this onnxruntime does not fold packed weights when a file is loaded; not packed")
            return raw
        return small

    def _executed(self, raw: bytes, nodes: Sequence[str], asked: Sequence[str], foreign: int) -> Executed:
        """Read the optimised graph back and say which layers run in int8, in all of their calls."""
        layers = {layer_of(node) for node in nodes}
        graph = executed_graph(raw, self.target.threads)
        names = {_FUSED.sub("", n.name) if n.name not in nodes else n.name: n.op_type for n in graph.node}
        in_float = {layer_of(node) for node in nodes if names.get(node) not in _INT8_OPERATORS}
        running = set(layers) - in_float
        return Executed(
            layers=len(layers) + foreign,
            int8_layers=len(running),
            asked_int8=len(asked),
            operators=dict(sorted(Counter(n.op_type for n in graph.node).items())),
            not_as_asked=tuple(layer for layer in asked if layer not in running),
        )


def _topology(model: nn.Module) -> str:
    """Return a text that networks with the same modules share, however wide their layers are.

    Sizes that a network's graph holds count too.
    """
    modules = "|".join(f"{name}:{type(module).__name__}" for name, module in model.named_modules())
    return f"{modules} {sizes_of(model)}"


def _is_identity(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), nn.Identity)
    except AttributeError:  # inside of a module that is gone
        return False


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


def executed_layers(model: onnx.GraphProto, executed: onnx.GraphProto, layers: Collection[str]) -> list[str]:
    """Return the layer that each node of an executed graph works for.

    A node that is no layer, such as a conversion between float and int8 or an addition, works for the layer whose
    outputs it gets, the last one of several.

    Args:
        model: Graph of the model file.
        executed: From :func:`executed_graph`.
        layers: Names of the network's layers.

    Returns:
        For each executed node the layer; empty before the first one.
    """
    written = _upstream_layers(model, layers, {})
    # Kernels of another memory layout are named after the tensor that they make.
    return list(_upstream_layers(executed, layers, written, nodes=True).values())


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


def relative_error(outputs: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return the largest absolute difference as a share of the largest magnitude of ``wanted``.

    Infinite where the shapes differ or a value is not finite.
    """
    if outputs.shape != wanted.shape or not np.isfinite(outputs).all() or not np.isfinite(wanted).all():
        return float("inf")
    largest = float(np.abs(wanted).max()) or 1.0
    return float(np.abs(outputs - wanted).max()) / largest


def _with_projections(asked: set[str], foreign: Collection[str]) -> set[str]:
    """Add the input projections of attention, whose weight is no layer's: they go with the output projection.

    Args:
        asked: Layers that are to run in int8.
        foreign: Layers of the graph that are none of the network's.
    """
    pairs = ((layer, f"{layer.removesuffix('in_proj')}out_proj") for layer in foreign)
    return asked | {layer for layer, partner in pairs if layer.endswith(".in_proj") and partner in asked}


def _run_session(
    session: ort.InferenceSession, name: str, inputs: NDArray[np.float32], fixed: int | str | None
) -> NDArray[np.float32]:
    """Run a batch; a graph with a fixed batch gets it in pieces, the last one filled up."""
    if not isinstance(fixed, int):
        return np.asarray(session.run(None, {name: inputs})[0])
    pieces = []
    for start in range(0, len(inputs), fixed):
        piece = inputs[start : start + fixed]
        filled = np.concatenate([piece, np.repeat(piece[-1:], fixed - len(piece), axis=0)])
        pieces.append(np.asarray(session.run(None, {name: filled})[0])[: len(piece)])
    return np.concatenate(pieces)


def _calibration_arrays(calibration: Sequence[Tensor], fixed: int | None) -> list[NDArray[np.float32]]:
    inputs = torch.cat(list(calibration))[:_CALIBRATION_EXAMPLES]
    fitting = max(1, min(64, _CALIBRATION_ELEMENTS // inputs[0].numel()))
    if fixed is not None:  # whole batches alone fit into the graph: the last one begins anew
        inputs = inputs[torch.arange(-(-len(inputs) // fixed) * fixed) % len(inputs)]
    return [piece.numpy() for piece in torch.split(inputs, fixed or fitting)]


def _write(path: Path, raw: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(raw)
    temporary.replace(path)
