"""The walk over an exported graph: what each index along each dimension needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autoprune.compress.graph.capture import Captured, arguments_of, layer_of, sizes_of, where
from autoprune.compress.graph.dims import broadcast, tie
from autoprune.compress.graph.units import Dim, Units, fixed, flat
from autoprune.space.groups import Axis

Dims = list[Dim]
Rule = Callable[["Propagation", fx.Node], Any]


class Propagation:
    """Runs the rule of every operation once, in the order of the graph.

    Args:
        captured: The exported network.
        rules: By the name of an operation, such as ``aten.conv2d.default``.
        layers: Names of the layers that operations are; of others their weights say it.
    """

    def __init__(
        self, captured: Captured, rules: dict[str, Rule], layers: Mapping[fx.Node, str] | None = None
    ) -> None:
        self.units = Units()
        self.rules = rules
        self.layers: Mapping[fx.Node, str] = layers or {}
        self.of: dict[fx.Node, Any] = {}
        # Dimensions of parameters and buffers, by name.
        self.tensors: dict[str, Dims] = {}
        # What each layer reads and makes.
        self.sides: dict[tuple[str, Axis], Dim] = {}
        self.captured = captured
        self._walk()

    def also(self, captured: Captured) -> None:
        """Follow another graph of the same network, which ties its units too."""
        own, self.captured = self.captured, captured
        self._walk()
        self.captured = own

    def _walk(self) -> None:
        for node in self.captured.nodes:
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.of[node] = self._placeholder(node)
        elif node.op == "call_function":
            found = self._rule(node)(self, node)
            self.of[node] = found if _fits(found, node.meta.get("val")) else unknown(self, node)
        elif node.op == "output":
            for each in node.all_input_nodes:
                self.fix(self.of.get(each), "its channels are the network's output")

    def _rule(self, node: fx.Node) -> Rule:
        name = str(node.target)
        # What happens in place is ruled as what does not.
        for each in (name, name.replace("_.", ".", 1)):
            if each in self.rules:
                return self.rules[each]
        return pointwise if torch.Tag.pointwise in getattr(node.target, "tags", ()) else unknown

    def _placeholder(self, node: fx.Node) -> Dims:
        name = self.captured.tensors.get(node.name)
        if not name:
            return [fixed(size) for size in sizes_of(node)]
        first = self.captured.aliases.get(name, (name,))[0]
        if first not in self.tensors:
            self.tensors[first] = [
                flat(self.units.new(size)) if size > 1 else fixed(size) for size in sizes_of(node)
            ]
        return self.tensors[first]

    # -- what rules use ----------------------------------------------------------------------

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """Return the arguments of an operation by name, defaults included."""
        return arguments_of(node)

    def dims(self, value: Any) -> Dims:
        """Return the dimensions of an argument: none for a number."""
        found = self.of.get(value) if isinstance(value, fx.Node) else None
        return found if isinstance(found, list) else []

    def note(self, node: fx.Node, weight: Any, *, reads: Dim | None = None, makes: Dim | None = None) -> None:
        """Note what the layer of an operation reads and makes; its weight says which layer that is."""
        name = self.captured.tensors.get(weight.name) if isinstance(weight, fx.Node) else None
        # All layers that share a weight do, where it is not known which one this is.
        names = self.captured.aliases.get(name, ()) if name else ()
        layers = [each.rpartition(".")[0] for each in names] or [layer_of(node)]
        layers = [self.layers[node]] if node in self.layers else layers
        sides: tuple[tuple[Axis, Dim | None], ...] = (("in", reads), ("out", makes))
        for layer in layers:
            for axis, dim in sides:
                if dim is not None:
                    known = self.sides.setdefault((layer, axis), dim)
                    if known is not dim and len(known) == len(dim):
                        tie(self.units, known, dim, where(node))

    def fix(self, dims: Any, why: str) -> None:
        """Note that nothing along these dimensions can be removed."""
        if isinstance(dims, tuple):
            for each in dims:
                self.fix(each, why)
            return
        for dim in dims or ():
            if dim.shape[1]:
                self.units.fix(dim, why)


def pointwise(p: Propagation, node: fx.Node) -> Dims:
    """Tie all tensors place by place."""
    tensors = [p.of[each] for each in node.all_input_nodes if sizes_of(each) or _is_tensor(each)]
    return broadcast(p.units, [dims for dims in tensors if isinstance(dims, list)], where(node))


def unknown(p: Propagation, node: fx.Node) -> Any:
    """Leave all that goes into an operation without a rule alone."""
    for each in node.all_input_nodes:
        p.fix(p.of.get(each), f"it goes through {where(node)}, of which nothing is known")
    value = node.meta.get("val")
    if isinstance(value, Sequence):
        return tuple([fixed(int(s)) for s in v.shape] if isinstance(v, Tensor) else None for v in value)
    return [fixed(size) for size in sizes_of(node)] if isinstance(value, Tensor) else None


def _fits(found: Any, value: Any) -> bool:
    """Return whether dimensions have the sizes of a result; those of a rule that was wrong do not."""
    if isinstance(value, Tensor):
        return isinstance(found, list) and [len(dim) for dim in found] == [int(size) for size in value.shape]
    return not isinstance(value, list | tuple) or isinstance(found, tuple)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
