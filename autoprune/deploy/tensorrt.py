"""TensorRT on a GPU: engines built from the same ONNX files, their integers said by explicit quantizing nodes.

Written from the documentation of TensorRT 11, whose networks are typed as their graph says; it has not been run on a
GPU.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import tensorrt as trt
from torch import Tensor, nn

from autoprune.deploy.checking import check_outputs
from autoprune.deploy.executed import layer_of, told
from autoprune.deploy.files import write_file
from autoprune.deploy.halves import in_16_bits
from autoprune.deploy.onnx_file import OnnxFiles, Written
from autoprune.deploy.runtime import Artifact, Formats, predicted
from autoprune.deploy.session import NodeTime, open_session, run_all
from autoprune.deploy.sessions.tensorrt import open_engine
from autoprune.errors import ExportError
from autoprune.measure.record import Executed
from autoprune.target import Target

_OWN = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# Words of the inspector for types, as it has them alone and inside of the names of memory layouts.
_TYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "int8": "int8", "fp8": "fp8", "half": "float16",
          "fp16": "float16", "float": "float32", "fp32": "float32"}  # fmt: skip


class TensorRt:
    """Deploys to TensorRT.

    Args:
        target: Precision and batch; an engine is built for one batch.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.files = OnnxFiles(target.batch, (), signed=True)
        self._timings = b""

    def prepare(self, dense: nn.Module, example: Tensor) -> None:
        """Export the dense network's graph once; see :class:`autoprune.deploy.runtime.Runtime`."""
        self.files.prepare(dense, example)

    def build(
        self, model: nn.Module, path: Path, formats: Formats, calibration: Sequence[Tensor]
    ) -> Artifact:
        """Write, quantize, build and check a candidate's engine; see :class:`autoprune.deploy.runtime.Runtime`.

        Raises:
            ExportError: If a format is asked for that is not made here, TensorRT does not take the graph, or the
                outputs differ by more than the bounds.
        """
        self._check(formats)
        written = self.files.write(model, formats, calibration)
        proto = onnx.load_model_from_string(written.raw)
        if self.target.precision != "float32":
            proto = in_16_bits(proto, self.target.precision)
        plan = self._engine(proto.SerializeToString(), written.inputs.shape[1:], sparse=formats.packed)
        outputs = run_all(open_session(self.target, plan), written.inputs)
        error = check_outputs(written, outputs, self.target, written.described(written.raw))
        executed = self._executed(plan, written)
        write_file(path, plan)
        return Artifact(path, executed, error)

    def predict(self, path: Path, batches: Iterable[Tensor]) -> Tensor:
        """Return the outputs of an engine, ``(n, classes)``."""
        session = open_session(self.target, path)
        return predicted(session, batches)

    def _check(self, formats: Formats) -> None:
        """Refuse formats that are not made here, by the names of the layers."""
        for kind, asked in (
            ("dynamic int8", formats.dynamic),
            ("int16", formats.int16),
            ("fp8", formats.fp8),
        ):
            if asked:
                raise ExportError(
                    f"tensorrt gets no {kind} here; asked for: {', '.join(sorted(asked)[:5])}; "
                    "allowed: int8 over ranges from calibration"
                )
        stored = sorted(name for name in formats.weights if name not in formats.int8)
        if stored:
            raise ExportError(
                f"an engine holds weights as it computes with them; asked for fewer bits in: {', '.join(stored[:5])}; "
                "allowed: 32, or integers in layers that run in int8",
                "set the bits of these groups to 32, or their activation bits to 8; for 16 bits take tensorrt:f16",
            )

    def _engine(self, raw: bytes, shape: Sequence[int], *, sparse: bool) -> bytes:
        """Build an engine.

        Args:
            raw: The ONNX file.
            shape: Shape of one example.
            sparse: Whether kernels for weights with two of four values may be taken.

        Raises:
            ExportError: If the parser or the builder refuses; with what the parser says.
        """
        builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        network = builder.create_network()
        parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
        if not parser.parse(raw):
            reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            raise ExportError(
                f"TensorRT cannot read the network: {'; '.join(reasons[:3]) or 'it does not say why'}",
                "an operator of this network has no form there; use another target",
            )
        config = builder.create_builder_config()
        # Layers are told by the engine's inspector, and float32 is not to be rounded to 10 bits.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.clear_flag(trt.BuilderFlag.TF32)
        if sparse:
            config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
        images = network.get_input(0)
        if any(size < 0 for size in tuple(images.shape)):
            batch = (self.target.batch, *shape)
            profile = builder.create_optimization_profile()
            profile.set_shape(images.name, batch, batch, batch)
            config.add_optimization_profile(profile)
        # Kernels that were timed for one candidate need not be timed again for the next.
        cache = config.create_timing_cache(self._timings)
        config.set_timing_cache(cache, ignore_mismatch=False)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise ExportError(
                f"TensorRT {trt.__version__} cannot build an engine of this network on this GPU",
                "its own messages are on the standard error",
            )
        self._timings = bytes(config.get_timing_cache().serialize())
        return bytes(plan)

    def _executed(self, plan: bytes, written: Written) -> Executed:
        """Say what layers run in, in all of their calls, by the engine's inspector."""
        layers = list(engine_layers(inspected(open_engine(plan))))
        ran: dict[str, str] = {}
        why: dict[str, str] = {}
        for call in written.nodes:
            own = [layer for layer in layers if call in layer.made_of]
            # Conversions name the layer that they belong to as well.
            layer = next((each for each in own if each.has_weights), own[0] if own else None)
            ran[call] = layer.runs_in if layer else "unknown"
            why[call] = (
                f"it runs as {layer.kind} ({layer.tactic}) on {layer.runs_in}"
                if layer
                else "no layer names it"
            )
        operators = Counter(layer.kind for layer in layers)
        return told(written, ran, why, dict(operators), self.target.precision)


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        name: Its name.
        kind: What it does.
        made_of: Names of the nodes of the graph that it was made of.
        runs_in: Type of its weights, else of what it reads, in the words of a measurement's record.
        has_weights: Whether it tells of weights of its own.
        tactic: Its kernel.
        reads: Names of the tensors that it reads.
        makes: Names of the tensors that it makes.
    """

    name: str
    kind: str
    made_of: tuple[str, ...]
    runs_in: str
    has_weights: bool
    tactic: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]


def inspected(engine: Any) -> Mapping[str, Any]:
    """Return what the inspector of an engine tells."""
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    found: Mapping[str, Any] = json.loads(text)
    return found


def engine_layers(told_of: Mapping[str, Any]) -> Iterator[EngineLayer]:
    """Yield the layers of an engine, in the order of execution.

    Args:
        told_of: What the inspector tells of an engine that was built with detailed verbosity.
    """
    for layer in told_of.get("Layers", ()):
        if not isinstance(layer, Mapping):  # with less verbosity a layer is its name
            yield EngineLayer(str(layer), "", _parts(str(layer)), "unknown", False, "", (), ())
            continue
        name, weights = str(layer.get("Name", "")), layer.get("Weights") or {}
        inputs = [each for each in layer.get("Inputs", ()) if isinstance(each, Mapping)]
        # From version 11 on the type has a field of its own.
        reads = next((str(i.get("DataType") or i.get("Format/Datatype") or "") for i in inputs), "")
        yield EngineLayer(
            name=name,
            kind=str(layer.get("LayerType", "")),
            made_of=tuple(_OWN.findall(str(layer.get("Metadata", "")))) or _parts(name),
            runs_in=_type(str(weights.get("Type", ""))) or _type(reads) or "unknown",
            has_weights=bool(weights),
            tactic=str(layer.get("TacticName", "")),
            reads=tuple(str(each.get("Name", "")) for each in inputs),
            makes=tuple(str(each.get("Name", "")) for each in layer.get("Outputs", ())),
        )


def layers_of_nodes(
    model: Path, nodes: Sequence[NodeTime], layers: Collection[str], target: Target
) -> list[str]:
    """Return the layer that each timed node works for; see :func:`autoprune.deploy.owners.layers_of_nodes`."""
    makers: dict[str, tuple[int, str]] = {}
    owners: dict[str, str] = {}
    for place, layer in enumerate(engine_layers(inspected(open_engine(model)))):
        own = [layer_of(each) for each in layer.made_of if layer_of(each) in layers]
        feeding = max((makers[tensor] for tensor in layer.reads if tensor in makers), default=(-1, ""))
        found = (place, own[-1]) if own else feeding
        makers.update(dict.fromkeys(layer.makes, found))
        owners[layer.name] = found[1]
    return [owners.get(node.name, "") for node in nodes]


def _parts(name: str) -> tuple[str, ...]:
    """Return the nodes that a fused layer was made of, by its name alone."""
    return tuple(part.strip() for part in name.split(" + "))


def _type(text: str) -> str:
    """Return a type by the inspector's word for it, or by the name of a memory layout that holds one."""
    words = re.findall(r"[a-z]+\d*", text.lower())
    return next((_TYPES[word] for word in words if word in _TYPES), "")
