"""Candidates as ONNX files: the dense network's graph with a candidate's weights, in the formats asked for."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, nn

from autoprune.compress.graph.network import sizes_of
from autoprune.deploy.bypass import without_blocks
from autoprune.deploy.executed import layer_of
from autoprune.deploy.graph_cache import export_template
from autoprune.deploy.layered import whole_batches
from autoprune.deploy.linear import in_float, low_bit_layers, write_dynamic, write_low_bit
from autoprune.deploy.lowbit import given_ranges, narrow_grids, put_on_grids, round_inputs, store_small
from autoprune.deploy.pack import CODES, Code, pack
from autoprune.deploy.parity import FLOAT_PARITY, relative_error
from autoprune.deploy.quantize import quantize
from autoprune.deploy.runtime import Formats, StoredWeight, some, with_projections
from autoprune.deploy.session import Floats
from autoprune.deploy.sessions.onnxruntime import run_onnx
from autoprune.deploy.shrink import shrink
from autoprune.deploy.template import (
    Template,
    export_fresh,
    fixed_batch,
    foreign_nodes,
    instantiate,
    layer_nodes,
)
from autoprune.errors import ExportError
from autoprune.space.quantization import INTEGER_BITS

PARITY_EXAMPLES = 8
_CALIBRATION_EXAMPLES = 256
# Tensor elements in one calibration batch: the calibrator keeps every activation of a batch until its end, for 64
# images in vit_b_16 more than 24 GB.
_CALIBRATION_ELEMENTS = 64 * 3 * 64 * 64
# Graphs of networks that the dense one does not fit, kept for the next candidate alike.
_KEPT_TEMPLATES = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """A candidate's file before a runtime has opened it.

    Attributes:
        raw: Content of the file.
        packed: The same with its weights packed; None where nothing is to be packed.
        inputs: Inputs on which the file is checked, ``(n, C, H, W)``.
        wanted: The network's outputs for them.
        nodes: Names of the layers' nodes.
        foreign: Number of further nodes with weights, which belong to no layer by name.
        asked: What each layer is to run in, where that is not plain float.
        stored: Count of layers by the bits of their stored weights.
        integers: Layers whose weights are stored as integers.
        bfloat16: Whether weights are stored in bfloat16.
    """

    raw: bytes
    packed: bytes | None
    inputs: Floats
    wanted: Floats
    nodes: tuple[str, ...]
    foreign: int
    asked: Mapping[str, str]
    stored: Mapping[str, int]
    integers: tuple[str, ...] = ()
    bfloat16: bool = False

    def described(self, raw: bytes) -> Callable[[], Floats]:
        """Return what gives the outputs by the arithmetic of a deployed file, every operator as ONNX describes it."""
        return lambda: run_onnx(in_float(raw), self.inputs, optimized=False)

    def unpacked(self, runtime: str) -> bytes:
        """Return the file as it is, where a runtime makes something else of the packed one."""
        _log.warning("%s does not fold packed weights when a file is loaded; not packed", runtime)
        return self.raw


class OnnxFiles:
    """Writes candidates of one dense network.

    Args:
        batch: Examples in one inference, for networks whose graph does not leave them free.
        codes: How weights with zeros may be packed.
        signed: Whether int8 is signed throughout; see :func:`~autoprune.deploy.quantize.quantize`.
        int8_bits: Gives the most bits of weights in int8 layers when a file is written; see
            :func:`~autoprune.deploy.saturation.int8_bits`.
    """

    def __init__(
        self,
        batch: int,
        codes: Sequence[Code] = CODES,
        *,
        signed: bool = False,
        int8_bits: Callable[[], int] = lambda: INTEGER_BITS,
    ) -> None:
        self.batch = batch
        self.codes = codes
        self.signed = signed
        self.int8_bits = int8_bits
        self._template: Template | None = None
        self._templates: dict[str, Template] = {}
        self._modules: dict[str, str] = {}
        self._sizes: dict[str, int] = {}

    def prepare(self, dense: nn.Module, example: Tensor) -> None:
        """Export the dense network's graph once; see :class:`autoprune.deploy.runtime.Runtime`."""

        def fits(template: Template) -> bool:
            return _filled(template, dense, example, wanted) is not None

        self._modules = {name: type(module).__name__ for name, module in dense.named_modules()}
        self._sizes = sizes_of(dense)
        with torch.no_grad():
            wanted = dense(example).numpy()
        self._template = export_template(dense, example, batch=self.batch, fits=fits)

    def write(self, model: nn.Module, formats: Formats, calibration: Sequence[Tensor]) -> Written:
        """Return the file of a candidate; see :class:`autoprune.deploy.runtime.Runtime`.

        The float graph is compared with the network: where putting the weights into the dense network's graph
        does not give the network's outputs, the candidate is exported by itself.

        Raises:
            ExportError: If the graph's outputs are not the network's.
        """
        inputs = torch.cat(list(calibration[:1]))[:PARITY_EXAMPLES]
        proto, wanted = self._float_graph(model, inputs)
        nodes, foreign = sorted(layer_nodes(proto)), len(foreign_nodes(proto))
        layers = sorted({layer_of(node) for node in nodes})
        own = {name for name, _ in model.named_modules()}
        others = [name for name in layers if name not in own]
        int8 = sorted(with_projections(set(formats.int8), others))
        small = {name: stored for name, stored in formats.weights.items() if name in layers}
        if formats.fp8:
            raise ExportError(
                f"ONNX files hold no fp8 products here; asked for: {', '.join(sorted(formats.fp8)[:3])}",
                "use the target torch on a GPU, or int8",
            )
        dynamic = [name for name in formats.dynamic if name in layers]
        _check_dynamic(proto, dynamic, small)
        read_low = low_bit_layers(proto, small, {*int8, *dynamic, *formats.int16})
        asked = dict.fromkeys(int8, "int8") | dict.fromkeys(formats.int16, "int16")
        asked |= dict.fromkeys(dynamic, "dynamic int8")
        asked |= {name: f"{small[name].bits} bit weights" for name in read_low}
        stored = Counter(str(each.bits) for each in small.values())
        batches = _calibration_arrays(calibration, fixed_batch(proto)) if int8 or formats.int16 else []
        if int8:
            bits = self.int8_bits()
            narrow = bits < INTEGER_BITS
            left = [name for name in int8 if name in layers and name not in small] if narrow else []
            stored[str(bits)] += len(left)
            overrides = narrow_grids(proto, left, bits) | put_on_grids(proto, small, int8)
            overrides |= given_ranges(proto, formats.ranges, int8, signed=self.signed)
            proto = quantize(
                proto,
                [name for name in int8 if name in layers],
                batches,
                overrides,
                signed=self.signed,
                narrow=narrow,
            )
        round_inputs(proto, [name for name in formats.int16 if name in layers], batches)
        write_dynamic(proto, small, dynamic)
        write_low_bit(proto, small, read_low)
        store_small(proto, small, {*int8, *dynamic, *read_low})
        proto = shrink(proto)
        raw = proto.SerializeToString()
        packs = formats.packed or any(each.codes is not None for each in small.values())
        return Written(
            raw=raw,
            packed=pack(proto, self.codes).SerializeToString() if packs else None,
            inputs=inputs.numpy(),
            wanted=wanted,
            nodes=tuple(nodes),
            foreign=foreign,
            asked=asked,
            stored=dict(sorted((+stored).items())),
            integers=tuple(name for name, each in small.items() if each.codes is not None),
            bfloat16=any(each.bfloat16 for each in small.values()),
        )

    def _float_graph(self, model: nn.Module, inputs: Tensor) -> tuple[onnx.ModelProto, Floats]:
        """Return the candidate's float graph, compared with the network, and the network's outputs."""
        with torch.no_grad():
            wanted: Floats = model(inputs).numpy()
        for template in self._templates_for(model):
            found = _filled(template, model, inputs, wanted)
            if found is not None:
                return found, wanted
        _log.info("this candidate does not fit into the dense network's graph and is exported by itself")
        fresh = export_fresh(model, inputs[:2], batch=self.batch)
        self._templates[_topology(model)] = fresh
        while len(self._templates) > _KEPT_TEMPLATES:
            del self._templates[next(iter(self._templates))]
        proto = fresh.proto
        error = relative_error(run_onnx(proto.SerializeToString(), inputs.numpy()), wanted)
        if not error <= FLOAT_PARITY:
            raise ExportError(
                f"the exported network's outputs differ from the network's by {error:.3g} of the largest output "
                f"(allowed: {FLOAT_PARITY:g})",
                "an operator of this network does something else in ONNX; please report the model",
            )
        # What comes after changes the graph, which the next candidate alike needs as it is.
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        return copy, wanted

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


def _filled(template: Template, model: nn.Module, inputs: Tensor, wanted: Floats) -> onnx.ModelProto | None:
    """Return the graph with the network's weights; None where they do not go together."""
    for free_flattening in (False, True) if template.takes_weights else ():
        try:
            proto = instantiate(template, model, free_flattening=free_flattening)
            error = relative_error(run_onnx(proto.SerializeToString(), inputs.numpy()), wanted)
        except Exception as fault:  # a graph of another topology fails in any way
            _log.debug("the graph does not take these weights: %s", fault)
            continue
        if error <= FLOAT_PARITY:
            return proto
    return None


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


def _check_dynamic(
    proto: onnx.ModelProto, layers: Sequence[str], weights: Mapping[str, StoredWeight]
) -> None:
    """Refuse dynamic int8 of layers that are not linear, or whose weights are no integers."""
    linear = {layer_of(node.name) for node in proto.graph.node if node.op_type in ("Gemm", "MatMul")}
    unable = [n for n in layers if n not in linear or n not in weights or weights[n].codes is None]
    if unable:
        raise ExportError(
            f"ONNX files hold no dynamic int8 of {some(unable)}; allowed: linear layers with integer weights",
            "use static int8 for these groups",
        )


def _calibration_arrays(calibration: Sequence[Tensor], fixed: int | None) -> list[Floats]:
    inputs = torch.cat(list(calibration))[:_CALIBRATION_EXAMPLES]
    fitting = max(1, min(64, _CALIBRATION_ELEMENTS // inputs[0].numel()))
    return [piece.numpy() for piece in torch.split(whole_batches(inputs, fixed), fixed or fitting)]
