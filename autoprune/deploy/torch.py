"""torch itself, on the processor or a GPU, eager or compiled: networks as .pt2 files of ATen operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from autoprune.deploy.checking import check_outputs
from autoprune.deploy.executed import layer_of, told
from autoprune.deploy.files import write_file
from autoprune.deploy.layered import CALIBRATION_EXAMPLES, PARITY_EXAMPLES, Layered, export, layered
from autoprune.deploy.pt2 import write_pt2
from autoprune.deploy.runtime import Artifact, Formats, predicted, some, with_projections
from autoprune.deploy.session import Floats, NodeTime, in_pieces, open_session, run_all
from autoprune.deploy.sessions.pt2 import read_pt2
from autoprune.deploy.sessions.torch import SPARSE, TorchSession, check_compiler, folded
from autoprune.deploy.torch_executed import compiled_operators, example_of, read_back
from autoprune.deploy.torch_layers import Fp8Linear, Int8Linear, StoredLayer, has_pattern
from autoprune.errors import ExportError
from autoprune.measure.record import Executed
from autoprune.target import Target, usable_cores

# The first GPUs with fp8 products.
_FP8_CAPABILITY = (8, 9)


class Torch:
    """Deploys to torch.

    Args:
        target: Device, precision, threads, batch, and whether it compiles.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.dtype: torch.dtype = getattr(torch, target.precision)

    def prepare(self, dense: nn.Module, example: Tensor) -> None:
        """Check that the dense network can be exported; see :class:`autoprune.deploy.runtime.Runtime`.

        Raises:
            ExportError: If it cannot, or it is to be compiled and there is no compiler.
        """
        if self.target.compile:
            check_compiler(self.target)
        layered(dense, example, self.target.batch)

    def build(
        self, model: nn.Module, path: Path, formats: Formats, calibration: Sequence[Tensor]
    ) -> Artifact:
        """Write, quantize and check a candidate's model file; see :class:`autoprune.deploy.runtime.Runtime`.

        Raises:
            ExportError: If a format is asked of a layer that torch has no kernel for, or the outputs differ by more
                than the bounds.
        """
        written = self._write(model, formats, calibration)
        session = open_session(self.target, written.raw, usable_cores())
        outputs = run_all(session, written.inputs)
        error = check_outputs(written, outputs, self.target, written.described)
        executed = self._executed(written)
        write_file(path, written.raw)
        return Artifact(path, executed, error)

    def predict(self, path: Path, batches: Iterable[Tensor]) -> Tensor:
        """Return the outputs of a model file on all cores, ``(n, classes)``.

        Of a compiled target the file is run eager: the same arithmetic, without compiling for batches of other sizes.
        """
        eager = self.target.model_copy(update={"compile": False})
        session = open_session(eager, path, usable_cores())
        return predicted(session, batches)

    def _write(self, model: nn.Module, formats: Formats, calibration: Sequence[Tensor]) -> _Written:
        """Return the file of a candidate."""
        inputs = torch.cat(list(calibration))[:CALIBRATION_EXAMPLES]
        with torch.no_grad():
            wanted: Floats = model(inputs[:PARITY_EXAMPLES]).numpy()
        network = layered(model, inputs[:2], self.target.batch)
        own = {name for name, _ in model.named_modules()}
        others = [name for name in network.layers if name not in own]
        int8, dynamic, fp8 = (
            with_projections(set(names), others) for names in (formats.int8, formats.dynamic, formats.fp8)
        )
        self._check(network, formats, int8, dynamic, fp8)
        present = sorted(name for name in int8 if name in network.layers)
        ranges = {**network.input_ranges(present, network.batches(inputs)), **formats.ranges}
        made: dict[str, nn.Module] = {}
        padded = self.target.device == "cuda"
        for name in network.layers:
            layer, stored = network.layers[name], formats.weights.get(name)
            if name in int8 or name in dynamic:
                limits = None if name in dynamic else ranges[name]
                made[name] = Int8Linear(layer, stored, limits, self.dtype, padded)
            elif name in fp8:
                made[name] = Fp8Linear(layer, self.dtype)
            elif stored is not None and (stored.codes is not None or self.dtype == torch.float32):
                made[name] = StoredLayer(layer, stored, self.dtype)
        sparse = self._sparse(network, set(network.layers) - set(made)) if formats.packed else {}
        asked = (
            dict.fromkeys(int8, "int8") | dict.fromkeys(dynamic, "dynamic int8") | dict.fromkeys(fp8, "fp8")
        )
        asked |= dict.fromkeys(sparse, f"{SPARSE} {self.target.precision}")
        graph = network.with_layers(made)
        deployed = _Deployed(graph, self.dtype).eval()
        program, bound = export(deployed, inputs[:2], network.batch or self.target.batch)
        small = {name: each for name, each in formats.weights.items() if name in network.layers}
        return _Written(
            raw=write_pt2(program, sparse),
            deployed=deployed,
            inputs=inputs[:PARITY_EXAMPLES].numpy(),
            wanted=wanted,
            batch=bound,
            foreign=network.foreign,
            asked=asked,
            stored=dict(sorted(Counter(str(each.bits) for each in small.values()).items())),
            bfloat16=any(each.bfloat16 for each in small.values()),
        )

    def _check(
        self,
        network: Layered,
        formats: Formats,
        int8: Collection[str],
        dynamic: Collection[str],
        fp8: Collection[str],
    ) -> None:
        """Refuse formats that torch has no kernels for, by the names of the layers."""
        for kind, asked in (("int8", int8), ("dynamic int8", dynamic), ("fp8", fp8)):
            others = [name for name in asked if name in network.layers and not network.layers[name].is_linear]
            if others:
                raise ExportError(
                    f"torch runs no convolution in {kind}; asked for: {some(others)}; allowed: linear layers",
                    "keep these groups in float (bits: 32), or use onnxruntime, openvino or tensorrt",
                )
        if formats.int16:
            raise ExportError(
                f"torch has no inputs of int16; asked for: {some(formats.int16)}; allowed: int8 in linear layers"
            )
        blocks = [n for n in (*int8, *dynamic) if n in formats.weights and formats.weights[n].blocks > 1]
        if blocks:
            raise ExportError(
                f"torch's int8 products take one scale for each output channel, not blocks; asked for: {some(blocks)}"
            )
        if fp8 and (self.target.device != "cuda" or torch.cuda.get_device_capability() < _FP8_CAPABILITY):
            raise ExportError(
                f"fp8 runs on GPUs of capability 8.9 and above, not on target {self.target.spec!r} here; "
                f"asked for: {some(fp8)}",
                "use int8, or a newer GPU",
            )

    def _sparse(self, network: Layered, names: Collection[str]) -> dict[str, str]:
        """Return the linear layers that kernels for two of four values run: on a GPU, in 16 bits, in whole tiles."""
        if self.target.device != "cuda" or self.dtype == torch.float32:
            return {}
        linear = {name: network.layers[name].weight for name in names if network.layers[name].is_linear}
        return {
            name: SPARSE
            for name, weight in linear.items()
            if has_pattern(weight) and weight.shape[0] % 32 == 0 and weight.shape[1] % 64 == 0
        }

    def _executed(self, written: _Written) -> Executed:
        """Say what layers run in, in all of their calls, by torch's profiler."""
        eager = self.target.model_copy(update={"compile": False})
        session = TorchSession(read_pt2(written.raw, eager.device), eager, self.target.threads)
        inputs = torch.from_numpy(written.inputs)
        seen, operators = read_back(session, example_of(inputs, session, self.target.batch))
        if self.target.compile:
            compiled = TorchSession(
                read_pt2(written.raw, self.target.device), self.target, self.target.threads
            )
            operators = compiled_operators(compiled, example_of(inputs, compiled, self.target.batch))
        ran = {call: each.runs_in for call, each in seen.items()}
        why = {call: each.why for call, each in seen.items()}
        return told(written, ran, why, operators, self.target.precision)


class _Deployed(nn.Module):
    """What a file holds: a network between inputs and outputs in float32.

    Convolutions run on images whose channels lie together: on two cores of a server processor, one thread, ResNet-18
    took 54 ms instead of 70, in bfloat16 27 instead of 62, EfficientNet-B0 32 instead of 35.

    Args:
        graph: The network.
        dtype: What it computes in.
    """

    def __init__(self, graph: fx.GraphModule, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        # Not ``graph``, which is taken in the module that torch makes of a file.
        self.network = graph
        self.has_images = False
        for module in graph.modules():
            for kind in (module._parameters, module._buffers):
                for name, tensor in kind.items():
                    if tensor is not None:
                        kind[name] = self._placed(tensor, module)  # type: ignore[assignment]

    def _placed(self, tensor: Tensor, module: nn.Module) -> Tensor:
        """Return a tensor of a module in the type and the layout that it is computed in."""
        own = isinstance(module, Int8Linear | Fp8Linear | StoredLayer)
        made = tensor if own or not tensor.is_floating_point() else tensor.detach().to(self.dtype)
        if tensor.dim() == 4:
            self.has_images = True
            made = made.detach().to(memory_format=torch.channels_last)
        return made if made is tensor or not isinstance(tensor, nn.Parameter) else nn.Parameter(made, False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's outputs in float32."""
        images = images.to(self.dtype)
        if self.has_images and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        outputs: Tensor = self.network(images)
        return outputs.to(torch.float32)


@dataclass(frozen=True)
class _Written:
    """A candidate's file and what it is compared with.

    Attributes:
        raw: Content of the file.
        deployed: What was exported into it.
        inputs: Inputs on which it is checked, ``(n, C, H, W)``.
        wanted: The network's outputs for them.
        batch: Examples that it is bound to; None where their number is free.
        foreign: Number of products with weights that belong to no layer by name.
        asked: What each layer is to run in, where that is not plain float.
        stored: Count of layers by the bits of their stored weights.
        bfloat16: Whether weights are stored in bfloat16.
    """

    raw: bytes
    deployed: nn.Module
    inputs: Floats
    wanted: Floats
    batch: int | None
    foreign: int
    asked: Mapping[str, str]
    stored: Mapping[str, int]
    bfloat16: bool

    def described(self) -> Floats:
        """Return the outputs with the products of integers and fp8 as they are defined."""
        quantized = [m for m in self.deployed.modules() if isinstance(m, Int8Linear | Fp8Linear)]
        for module in quantized:
            module.forward = module.described  # type: ignore[method-assign]
        try:
            with torch.no_grad():
                return in_pieces(
                    lambda x: self.deployed(torch.from_numpy(x)).numpy(), self.inputs, self.batch
                )
        finally:
            for module in quantized:
                del module.forward


def layers_of_nodes(
    model: Path, nodes: Sequence[NodeTime], layers: Collection[str], target: Target
) -> list[str]:
    """Return the layer that each timed node works for; see :func:`autoprune.deploy.owners.layers_of_nodes`."""
    module = folded(read_pt2(model).module)
    owners: dict[fx.Node, tuple[int, str]] = {}
    found: dict[str, str] = {}
    for place, node in enumerate(module.graph.nodes):
        layer = layer_of(node.meta.get("custom", {}).get("layer", ""))
        feeding = max((owners[n] for n in node.all_input_nodes if n in owners), default=(-1, ""))
        owners[node] = (place, layer) if layer in layers else feeding
        found[node.name] = owners[node][1]
    return [found.get(node.name, "") for node in nodes]
