"""ExecuTorch with XNNPACK: networks as .pte files for phones and other small machines, run here by the same kernels."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, fx, nn

from autoprune.deploy.checking import check_outputs
from autoprune.deploy.executed import told
from autoprune.deploy.files import write_file
from autoprune.deploy.layered import CALIBRATION_EXAMPLES, PARITY_EXAMPLES, Layered, layered
from autoprune.deploy.layers import Layer, call_in
from autoprune.deploy.qdq import with_steps
from autoprune.deploy.runtime import Artifact, Formats, predicted, some, with_projections
from autoprune.deploy.session import Floats, in_pieces, open_session, run_all
from autoprune.errors import ExportError
from autoprune.measure.record import Executed
from autoprune.target import Target, usable_cores

_INTEGER_STEPS = ("quantize", "dequantize", "choose_qparams")
_PRODUCTS = ("aten.convolution", "aten.linear", "aten.addmm", "aten.mm", "aten.bmm")
_LIBRARIES = ("executorch", "torch.export", "root")


class ExecuTorch:
    """Deploys to ExecuTorch's XNNPACK backend.

    Args:
        target: Threads and batch; a file is bound to its batch.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def prepare(self, dense: nn.Module, example: Tensor) -> None:
        """Check that the dense network can be exported; see :class:`autoprune.deploy.runtime.Runtime`."""
        layered(dense, example, self.target.batch)

    def build(
        self, model: nn.Module, path: Path, formats: Formats, calibration: Sequence[Tensor]
    ) -> Artifact:
        """Write, quantize and check a candidate's model file; see :class:`autoprune.deploy.runtime.Runtime`.

        Raises:
            ExportError: If a format is asked of a layer that XNNPACK has no kernel for, the network cannot be lowered,
                or the outputs differ by more than the bounds.
        """
        written = self._write(model, formats, calibration)
        outputs = run_all(open_session(self.target, written.raw, usable_cores()), written.inputs)
        error = check_outputs(written, outputs, self.target, written.described)
        executed = self._executed(written)
        write_file(path, written.raw)
        return Artifact(path, executed, error)

    def predict(self, path: Path, batches: Iterable[Tensor]) -> Tensor:
        """Return the outputs of a model file on all cores, ``(n, classes)``."""
        session = open_session(self.target, path, usable_cores())
        return predicted(session, batches)

    def _write(self, model: nn.Module, formats: Formats, calibration: Sequence[Tensor]) -> _Written:
        """Return the file of a candidate."""
        inputs = torch.cat(list(calibration))[:CALIBRATION_EXAMPLES]
        with torch.no_grad():
            wanted: Floats = model(inputs[:PARITY_EXAMPLES]).numpy()
        network = layered(model, inputs[:2], self.target.batch)
        own = {name for name, _ in model.named_modules()}
        others = [name for name in network.layers if name not in own]
        int8, dynamic = (with_projections(set(names), others) for names in (formats.int8, formats.dynamic))
        small = {name: each for name, each in formats.weights.items() if name in network.layers}
        self._check(network, formats, int8, dynamic)
        graph = with_steps(
            network,
            sorted(name for name in int8 if name in network.layers),
            sorted(name for name in dynamic if name in network.layers),
            small,
            network.batches(inputs),
            formats.ranges,
        )
        deployed = _Deployed(graph).eval()
        raw, operators = _lowered(deployed, inputs[torch.arange(self.target.batch) % len(inputs)])
        return _Written(
            raw=raw,
            operators=operators,
            deployed=deployed,
            inputs=inputs[:PARITY_EXAMPLES].numpy(),
            wanted=wanted,
            foreign=network.foreign,
            batch=self.target.batch,
            asked=dict.fromkeys(int8, "int8") | dict.fromkeys(dynamic, "dynamic int8"),
            # Each integer has a byte, however few bits its values need.
            stored={"8": len(small)} if small else {},
        )

    def _check(
        self, network: Layered, formats: Formats, int8: Collection[str], dynamic: Collection[str]
    ) -> None:
        """Refuse formats that XNNPACK has no kernels for, by the names of the layers."""
        for kind, asked in (("int16", formats.int16), ("fp8", formats.fp8)):
            if asked:
                raise ExportError(f"executorch has no {kind} here; asked for: {some(asked)}; allowed: int8")
        unable = [n for n in int8 if n in network.layers and not _has_int8(network.layers[n])]
        if unable:
            raise ExportError(
                f"executorch runs no three-dimensional or grouped transposed convolution in int8; asked for: "
                f"{some(unable)}",
                "keep these groups in float (bits: 32)",
            )
        others = [n for n in dynamic if n in network.layers and not network.layers[n].is_linear]
        if others:
            raise ExportError(
                f"executorch runs no convolution in dynamic int8 here; asked for: {some(others)}; "
                "allowed: linear layers"
            )
        integers = {*int8, *dynamic}
        stored = [n for n in formats.weights if n in network.layers and n not in integers]
        if stored:
            bits = ", ".join(str(b) for b in sorted({formats.weights[n].bits for n in stored}))
            raise ExportError(
                f"executorch stores weights as it computes with them; asked for {bits} bits in: {some(stored)}; "
                "allowed: 32, or integers in layers that run in int8",
                "set the bits of these groups to 32, or their activation bits to 8",
            )
        blocks = [n for n in integers if n in formats.weights and formats.weights[n].blocks > 1]
        if blocks:
            raise ExportError(
                f"executorch's int8 takes one scale for each output channel, not blocks: {some(blocks)}"
            )

    def _executed(self, written: _Written) -> Executed:
        """Say what layers run in, in all of their calls, by what the backend took and what it left."""
        products = {each.call: each for each in written.operators if each.call and each.runs_in}
        ran = {call: each.runs_in for call, each in products.items()}
        why = {call: each.why for call, each in products.items()}
        operators = Counter(f"XNNPACK {each.name}" if each.taken else each.name for each in written.operators)
        return told(written, ran, why, dict(operators), self.target.precision)


class _Deployed(nn.Module):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.network = graph

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.network(images)
        return outputs


@dataclass(frozen=True)
class _Written:
    """A candidate's file and what it is compared with.

    Attributes:
        raw: Content of the file.
        operators: What runs of it.
        deployed: The network with its quantizing steps.
        inputs: Inputs on which the file is checked, ``(n, C, H, W)``.
        wanted: The network's outputs for them.
        foreign: Number of products with weights that belong to no layer by name.
        asked: What each layer is to run in, where that is not plain float.
        stored: Count of layers by the bits that each of their weights has.
        batch: Examples in one inference.
        bfloat16: Whether weights are stored in bfloat16.
    """

    raw: bytes
    operators: tuple[_Operator, ...]
    deployed: nn.Module
    inputs: Floats
    wanted: Floats
    foreign: int
    asked: Mapping[str, str]
    stored: Mapping[str, int]
    batch: int
    bfloat16: bool = False

    def described(self) -> Floats:
        """Return the outputs of the quantizing steps as torch runs them, in inferences of the file's batch."""
        with torch.no_grad():
            return in_pieces(lambda x: self.deployed(torch.from_numpy(x)).numpy(), self.inputs, self.batch)


def _has_int8(layer: Layer) -> bool:
    """Whether XNNPACK has an int8 kernel with a scale for each output channel for a layer."""
    transposed = layer.axis == 1
    return layer.weight.dim() < 5 and not (transposed and len(layer.factors) != layer.weight.shape[1])


def _lowered(deployed: nn.Module, example: Tensor) -> tuple[bytes, tuple[_Operator, ...]]:
    """Lower a network to XNNPACK; return the content of the file, and what runs of it.

    Raises:
        ExportError: If ExecuTorch refuses; holds its first line.
    """
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(deployed, (example,), strict=False)
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            operators = tuple(_operators(edge.exported_program().graph_module))
            return bytes(edge.to_executorch().buffer), operators
    except Exception as error:  # its passes raise whatever they meet
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"the network cannot be lowered to ExecuTorch: {type(error).__name__}: {reason}",
            "an operator of this network has no form there; use another target",
        ) from error
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@dataclass(frozen=True)
class _Operator:
    """An operator of a lowered program.

    Attributes:
        name: Its name, such as ``aten.linear``.
        call: The call of a layer that it belongs to; empty for none's.
        taken: Whether XNNPACK runs it.
        runs_in: What a product runs in; empty for what is none.
    """

    name: str
    call: str
    taken: bool
    runs_in: str

    @property
    def why(self) -> str:
        """What became of a layer, told where it does not run as asked."""
        by = "XNNPACK" if self.taken else "ExecuTorch's own operators, XNNPACK does not take it"
        return f"it runs as {self.name} in {self.runs_in} by {by}"


def _operators(graph: fx.GraphModule) -> Iterator[_Operator]:
    """Yield the operators of a lowered program, quantizing steps left out where they are part of a kernel."""
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.name.startswith("lowered_module"):
            inner = getattr(graph, str(node.target)).original_module.graph.nodes
            found = [_operator(each, True) for each in inner if each.op == "call_function"]
            yield from (each for each in found if not _is_step(each.name))
        elif node.op == "call_function" and not node.name.startswith(("executorch_call_delegate", "getitem")):
            yield _operator(node, False)


def _operator(node: Any, taken: bool) -> _Operator:
    name = _name(node)
    runs_in = (_runs_in(node) if taken else "float32") if name in _PRODUCTS else ""
    return _Operator(name, call_in(node.meta.get("nn_module_stack")), taken, runs_in)


def _name(node: Any) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return ".".join(str(name).split(".")[:2])


def _is_step(name: str) -> bool:
    return name == "getitem" or any(step in name for step in _INTEGER_STEPS)


def _runs_in(node: Any) -> str:
    """Return what XNNPACK runs a product in, by the steps before its inputs and its weight."""
    steps = [n for n in node.all_input_nodes[:2] if n.op == "call_function" and "dequantize" in _name(n)]
    if len(steps) < 2:
        return "float32"
    # Where inputs are rounded over the range of each inference, other nodes give the range.
    integers = steps[0].all_input_nodes
    return "dynamic int8" if len(integers) > 1 else "int8"
