"""A network as a graph of its own layers: every convolution and linear layer a module, BatchNorm folded into it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from autoprune.deploy.layers import Layer, constants, foreign_products, module_name, take_layers
from autoprune.errors import ExportError

_aten = torch.ops.aten
_ASSERTIONS = (_aten._assert_tensor_metadata.default, _aten._assert_async.msg, _aten._assert_scalar.default)
_DROPOUTS = (_aten.dropout.default, _aten.dropout_.default)
# Examples on which files are checked, and from which ranges of inputs are taken, in batches of so many.
PARITY_EXAMPLES = 8
CALIBRATION_EXAMPLES = 256
_BATCH = 64
_log = logging.getLogger(__name__)


def whole_batches(inputs: Tensor, batch: int | None) -> Tensor:
    """Return inputs, and of the first ones so many again that the last batch is full, where a graph needs that."""
    return inputs if batch is None else inputs[torch.arange(-(-len(inputs) // batch) * batch) % len(inputs)]


@dataclass(frozen=True)
class Layered:
    """A network as a graph of its layers.

    Attributes:
        graph: The graph; its only modules are the layers.
        layers: The layers by name.
        foreign: Number of products and convolutions whose weights belong to no layer by name.
        batch: Examples in one inference where the network does not leave their number free.
    """

    graph: fx.GraphModule
    layers: Mapping[str, Layer]
    foreign: int
    batch: int | None

    def with_layers(self, replaced: Mapping[str, nn.Module]) -> fx.GraphModule:
        """Return the graph with other modules in the place of some layers; it shares the rest with this one."""
        modules = {module_name(n): replaced.get(n, layer) for n, layer in self.layers.items()}
        return fx.GraphModule({**constants(self.graph, self.graph.graph), **modules}, self.graph.graph)

    def batches(self, inputs: Tensor) -> list[Tensor]:
        """Return inputs in batches that fit into the graph; the last one begins anew where it is not full."""
        return list(torch.split(whole_batches(inputs, self.batch), self.batch or _BATCH))

    def input_ranges(self, names: Sequence[str], batches: Sequence[Tensor]) -> dict[str, tuple[float, float]]:
        """Return the least and the largest value, and 0, of what layers get.

        Args:
            names: Layers.
            batches: Inputs of the network, ``(n, C, H, W)``.
        """
        found = dict.fromkeys(names, (0.0, 0.0))

        def see(name: str) -> Callable[[nn.Module, Any], None]:
            def hook(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
                seen = given[0]
                low, high = found[name]
                found[name] = (min(low, float(seen.min())), max(high, float(seen.max())))

            return hook

        handles = [self.layers[name].register_forward_pre_hook(see(name)) for name in names]
        try:
            with torch.no_grad():
                for batch in batches if names else ():
                    self.graph(batch)
        finally:
            for handle in handles:
                handle.remove()
        return found


def layered(model: nn.Module, example: Tensor, batch: int) -> Layered:
    """Return ``model`` as a graph of its layers.

    Args:
        model: Network in eval mode on the CPU; it is not changed.
        example: Inputs, ``(n, C, H, W)``, n at least 2.
        batch: Batch of the graph where the network does not leave it free.

    Raises:
        ExportError: If the network cannot be exported; holds the exporter's first line.
    """
    program, fixed = export(model, example, batch)
    module = program.module(check_guards=False)
    if not isinstance(module, fx.GraphModule):
        raise TypeError(f"an exported module is a {type(module).__name__}")
    graph = module.graph
    outputs = next(node for node in graph.nodes if node.op == "output")
    made = outputs.args[0]
    if not (isinstance(made, Sequence) and len(made) == 1 and program.call_spec.out_spec.is_leaf()):
        raise ExportError(
            f"the network returns {program.call_spec.out_spec}; allowed: one tensor",
            "wrap it in a module that returns the tensor that is to be scored",
        )
    outputs.args = (made[0],)
    graph.set_codegen(fx.graph.CodeGen())
    _drop_idle(graph)
    layers = take_layers(graph, module)
    graph.eliminate_dead_code()
    modules = {module_name(name): layer for name, layer in layers.items()}
    # Made anew of what the graph reads, so that nothing of the folded weights is left.
    rest = fx.GraphModule({**constants(module, graph), **modules}, graph)
    return Layered(rest, layers, foreign_products(graph), fixed)


def export(model: nn.Module, example: Tensor, batch: int) -> tuple[ExportedProgram, int | None]:
    """Export a network with a free batch if it leaves it free, else with ``batch``.

    Args:
        model: Network in eval mode.
        example: Inputs, ``(n, C, H, W)``, n at least 2 so that the exporter leaves the batch free.
        batch: Batch otherwise.

    Returns:
        The program, and the batch that it is bound to or None.

    Raises:
        ExportError: If the exporter refuses; holds its first line.
    """
    free = ({0: Dim("batch", min=1)},)
    one = example[:1].repeat_interleave(batch, dim=0)
    with torch.no_grad(), _unfused_attention():
        try:
            return torch.export.export(model, (example,), dynamic_shapes=free, strict=False), None
        except Exception as error:  # the exporter raises whatever its passes meet
            _log.info("export with a free batch failed, trying a fixed one: %s", error)
        try:
            return torch.export.export(model, (one,), strict=False), batch
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(
                f"the network cannot be exported: {type(error).__name__}: {reason}",
                "control flow that depends on the data cannot be exported",
            ) from error


@contextmanager
def _unfused_attention() -> Any:
    """Keep the layers of attention apart, which a fused operator would hide."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _drop_idle(graph: fx.Graph) -> None:
    """Take out assertions and what does nothing in inference."""
    for node in list(graph.nodes):
        if node.target in _ASSERTIONS or node.name.startswith("_guards_fn"):
            graph.erase_node(node)
        elif (
            node.op == "call_function"
            and node.target in (_aten.dropout.default, _aten.dropout_.default)
            and not node.args[2]
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
