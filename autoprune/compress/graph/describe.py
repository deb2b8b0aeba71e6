"""Groups, as plain data, from what the walk over a network's graph found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from autoprune.compress.graph.network import GraphNetwork
from autoprune.compress.graph.propagate import Propagation
from autoprune.compress.graph.sizes import Size
from autoprune.compress.graph.units import ALWAYS, Dim, Ids
from autoprune.compress.layers import Conv, channel_count, layer_kind, split_name
from autoprune.space.groups import Axis, Group, LayerKind, Member

_MAKERS = ("conv", "depthwise", "linear")


@dataclass(frozen=True)
class _Side:
    """One side of one layer: which units each of its channels needs."""

    layer: str
    kind: LayerKind
    axis: Axis
    dim: Dim
    place: int = 0


@dataclass
class _Found:
    """What belongs to one group."""

    makers: list[_Side] = field(default_factory=list)
    others: list[_Side] = field(default_factory=list)
    # Units, in the order in which the first maker has them.
    order: dict[int, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    # Makers whose bit-width is this group's.
    owned: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Described:
    """Groups, and which units they are made of.

    Attributes:
        groups: In the order of the model's modules.
        units: For each group that can be cut its units, by name.
    """

    groups: tuple[Group, ...]
    units: dict[str, Ids]


def describe_groups(
    model: nn.Module, network: GraphNetwork, found: Propagation, sizes: Sequence[Size]
) -> Described:
    """Return all groups; each convolution and linear layer is a producer in exactly one.

    Args:
        model: The network.
        network: The same as a graph, whose layers the groups name.
        found: The walk.
        sizes: Numbers in the code that count units.
    """
    return _Description(model, network, found, sizes).described()


class _Description:
    def __init__(
        self, model: nn.Module, network: GraphNetwork, found: Propagation, sizes: Sequence[Size]
    ) -> None:
        self.model = model
        self.found = found
        self.units = found.units
        # Layers that run in training alone are the model's own.
        self.modules = {**dict(model.named_modules()), **dict(network.named_modules())}
        self.before = {name: index for index, (name, _) in enumerate(model.named_modules())}
        self.read = {str(node.target) for node in network.graph.nodes if node.op == "get_attr"}
        self.sides = [*self._layer_sides(), *self._tensor_sides(), *self._size_sides(sizes)]
        # Numbers of the sides that need each unit.
        self.needed_by: dict[int, list[int]] = {}
        for number, side in enumerate(self.sides):
            for unit in np.unique(side.dim).tolist():
                self.needed_by.setdefault(unit, []).append(number)

    def described(self) -> Described:
        """Join columns of makers that share a unit, and list who else needs their units."""
        makers = [s for s in self.sides if s.axis == "out" and s.kind in _MAKERS]
        components = [part for whole in self._components(makers) for part in self._kinds(whole)]
        for each in components:
            self._add_reasons(each)
        self._share_out(components)
        kept = [each for each in components if each.owned or not each.reasons]
        taken: set[str] = set()
        pairs = [(each, self._group(each, taken)) for each in sorted(kept, key=self._first)]
        used = {side.layer for each in kept for side in each.makers if side.layer in each.owned}
        # With the network's own layers that nothing runs; an attention's input projection is none of them.
        names = [name for name, m in self.model.named_modules() if isinstance(m, Conv | nn.Linear)]
        alone = [self._unused(name) for name in names if name not in used]
        groups = sorted([*(group for _, group in pairs), *alone], key=lambda g: self._position(g.name))
        units = {
            group.name: np.fromiter(each.order, dtype=np.int64) for each, group in pairs if group.prunable
        }
        return Described(tuple(groups), units)

    def _first(self, found: _Found) -> tuple[bool, tuple[int, str]]:
        """Order groups: those that own layers name themselves first."""
        return (not found.owned, self._position(found.makers[0].layer))

    # -- sides -------------------------------------------------------------------------------

    def _layer_sides(self) -> Iterator[_Side]:
        for (layer, axis), dim in self.found.sides.items():
            module = self.modules.get(layer)
            kind = layer_kind(module) if module is not None else None
            if kind is None or (kind == "depthwise" and axis == "in"):
                continue
            yield _Side(layer, kind, axis, self.units.resolved(dim))

    def _tensor_sides(self) -> Iterator[_Side]:
        """Return the sides of parameters and buffers that operations read as they are."""
        for name, dims in self.found.tensors.items():
            names = self.found.captured.aliases.get(name, (name,))
            target = next((alias for alias in names if alias in self.read), None)
            if target is None or self._belongs(target):
                continue
            for place, dim in enumerate(dims):
                resolved = self.units.resolved(dim)
                if resolved.shape[1]:
                    yield _Side(target, "parameter", "out", resolved, place)

    def _belongs(self, name: str) -> bool:
        """Return whether a parameter is cut with its layer."""
        layer, own = split_name(name)
        if own not in ("weight", "bias", "running_mean", "running_var"):
            return False
        return any((layer, axis) in self.found.sides for axis in ("in", "out")) and (
            layer_kind(self.modules[layer]) is not None if layer in self.modules else False
        )

    def _size_sides(self, sizes: Sequence[Size]) -> Iterator[_Side]:
        for size in sizes:
            yield _Side(size.name, "size", "out", self.units.resolved(size.counted))

    # -- groups ------------------------------------------------------------------------------

    def _components(self, makers: Sequence[_Side]) -> list[_Found]:
        """Return the sets of columns that share units, each with its makers in the order of the modules."""
        makers = sorted(makers, key=lambda side: self._position(side.layer))
        columns = [(side, column) for side in makers for column in side.dim.T if (column != ALWAYS).any()]
        if not columns:
            return []
        held = [np.unique(column[column != ALWAYS]) for _, column in columns]
        rows = np.concatenate([np.full(len(ids), row) for row, ids in enumerate(held)])
        ids = np.concatenate(held)
        size = len(columns) + int(ids.max()) + 1
        graph = coo_matrix((np.ones(len(rows)), (rows, ids + len(columns))), shape=(size, size))
        _, labels = connected_components(graph, directed=False)
        found: dict[int, _Found] = {}
        for (side, column), label in zip(columns, labels[: len(columns)].tolist(), strict=True):
            each = found.setdefault(label, _Found())
            if side not in each.makers:
                each.makers.append(side)
            for unit in column.tolist():
                if unit != ALWAYS:
                    each.order.setdefault(unit, len(each.order))
        return list(found.values())

    def _kinds(self, found: _Found) -> list[_Found]:
        """Divide units that lie in one column by the sides that need them.

        Units of several kinds (the width of queries and keys, and that of values) share a column of one layer, and
        nothing else: ranked against each other, one kind could go whole.
        """
        parts: dict[tuple[int, ...], _Found] = {}
        for unit in found.order:
            part = parts.setdefault(tuple(self.needed_by[unit]), _Found())
            part.order[unit] = len(part.order)
        for numbers, part in parts.items():
            sides = [self.sides[number] for number in numbers]
            part.makers = [side for side in found.makers if any(side is each for each in sides)]
            made = {(side.layer, side.axis) for side in part.makers}
            part.others = [side for side in sides if (side.layer, side.axis) not in made]
        return list(parts.values())

    def _add_reasons(self, found: _Found) -> None:
        """Add why a group cannot be cut."""
        reasons = [self.units.reason(unit) for unit in found.order]
        reasons += [self._uncuttable(side) for side in [*found.makers, *found.others]]
        found.reasons = [*filter(None, reasons), *found.reasons]
        if len(found.order) == 1:
            found.reasons.append("all its channels are tied into one unit")

    def _share_out(self, components: Sequence[_Found]) -> None:
        """Give every layer's bit-width to one group: one that can be cut, of several the outermost (heads)."""
        by_layer: dict[str, list[tuple[bool, int, _Found]]] = {}
        for each in components:
            for side in each.makers:
                column = next(c for c in side.dim.T if any(unit in each.order for unit in np.unique(c)))
                changes = int((column[1:] != column[:-1]).sum())
                by_layer.setdefault(side.layer, []).append((bool(each.reasons), changes, each))
        for layer, candidates in by_layer.items():
            min(candidates, key=lambda found: found[:2])[2].owned.add(layer)

    def _group(self, found: _Found, taken: set[str]) -> Group:
        owned = [side.layer for side in found.makers if side.layer in found.owned]
        sides = sorted([*found.makers, *found.others], key=self._place)
        members = [
            Member(
                layer=side.layer,
                kind=side.kind,
                axis=side.axis,
                index_map=_index_map(side.dim, found.order),
                dim=side.place,
                own=side.kind not in _MAKERS or side.axis == "in" or side.layer in found.owned,
            )
            for side in sides
        ]
        first = owned[0] if owned else found.makers[0].layer
        reasons = list(dict.fromkeys(found.reasons))
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        return Group(
            name=first if owned else self._name(first, found, taken),
            type="linear" if isinstance(self.modules[first], nn.Linear) else "conv",
            size=len(found.order),
            members=tuple(members),
            prunable=not reasons,
            reason=reasons[0] + more if reasons else "",
        )

    def _name(self, layer: str, found: _Found, taken: set[str]) -> str:
        """Return a name for units that lie along a layer of another group: its width, or a part of its channels."""
        side = found.makers[0]
        columns = [int(np.isin(column, list(found.order)).sum()) for column in side.dim.T]
        what = "width" if side.dim.shape[1] > 1 and max(columns) > 0 else "part"
        number = 1
        while (name := f"{layer}/{what}{'' if number == 1 else number}") in taken:
            number += 1
        taken.add(name)
        return name

    def _uncuttable(self, side: _Side) -> str:
        """Return why surgery cannot cut this layer; empty if it can."""
        module = self.modules.get(side.layer)
        if isinstance(module, Conv):
            if side.kind == "conv" and module.groups == module.out_channels > 1:
                return f"{side.layer!r} is a depthwise convolution with unequal numbers of inputs and outputs"
            if module.transposed and module.groups > 1:
                return f"{side.layer!r} is a grouped transposed convolution"
        if isinstance(module, Conv | nn.Linear) and "weight" not in module._parameters:
            return f"the weight of {side.layer!r} is parametrised"
        return ""

    def _unused(self, name: str) -> Group:
        module = self.model.get_submodule(name)
        made = self.found.sides.get((name, "out"))
        reason = "the forward pass does not use it as a layer"
        if made is not None:
            reason = "some of its channels always have to stay"
        kind: LayerKind = layer_kind(module) or "conv"
        count = channel_count(module, "out")
        return Group(
            name=name,
            type="linear" if isinstance(module, nn.Linear) else "conv",
            size=count,
            members=(Member(layer=name, kind=kind, axis="out", index_map=tuple((i,) for i in range(count))),),
            prunable=False,
            reason=reason,
        )

    def _position(self, name: str) -> tuple[int, str]:
        """Return where a layer stands among the network's modules; a new one stands where its owner does."""
        known = name.partition("/")[0]
        while known and known not in self.before:
            known = split_name(known)[0]
        return (self.before.get(known, len(self.before)), name)

    def _place(self, side: _Side) -> tuple[bool, tuple[int, str]]:
        """Order members: makers before readers, both in the order of the modules."""
        return (side.axis == "in", self._position(side.layer))


def _index_map(dim: Dim, order: dict[int, int]) -> tuple[tuple[int, ...], ...]:
    """Return for each unit the indices that need it."""
    table: list[list[int]] = [[] for _ in order]
    for column in dim.T:
        for index, unit in enumerate(column.tolist()):
            if unit in order:
                table[order[unit]].append(index)
    return tuple(tuple(sorted(owned)) for owned in table)
