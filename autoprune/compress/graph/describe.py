"""Groups, as plain data, from what the walk over a network's graph found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from autoprune.compress.graph.propagate import Propagation
from autoprune.compress.graph.units import ALWAYS, Dim
from autoprune.compress.layers import Conv, channel_count, layer_kind, parameter_dim, split_name
from autoprune.space.groups import Axis, Group, LayerKind, Member


@dataclass(frozen=True)
class _Side:
    """One side of one layer: which units each of its channels needs."""

    layer: str
    kind: LayerKind
    axis: Axis
    dim: Dim


@dataclass
class _Found:
    """What belongs to one group."""

    makers: list[_Side] = field(default_factory=list)
    others: list[_Side] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def describe_groups(model: nn.Module, found: Propagation) -> list[Group]:
    """Return all groups in the order of the model's modules; each convolution and linear layer makes one.

    Args:
        model: The network that was walked over.
        found: The walk.
    """
    return _Description(model, found).groups()


class _Description:
    def __init__(self, model: nn.Module, found: Propagation) -> None:
        self.found = found
        self.units = found.units
        self.modules = dict(model.named_modules())
        self.position = {name: index for index, name in enumerate(self.modules)}
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.producers = [n for n, m in self.modules.items() if isinstance(m, Conv | nn.Linear)]
        self.sides = list(self._sides())

    def groups(self) -> list[Group]:
        """Join makers that share a unit, and list who else needs their units."""
        makers = [s for s in self.sides if s.axis == "out" and s.kind in ("conv", "depthwise", "linear")]
        label = self._labels(makers)
        of: dict[int, _Found] = {}
        for side in makers:
            of.setdefault(label[side.layer], _Found()).makers.append(side)
        by_unit = {
            unit: of[label[side.layer]]
            for side in makers
            for unit in np.unique(side.dim).tolist()
            if unit != ALWAYS
        }
        for side in self.sides:
            if side not in makers:
                for each in {
                    id(g): g for u in np.unique(side.dim).tolist() if (g := by_unit.get(u))
                }.values():
                    each.others.append(side)
        self._note_tensors(by_unit)
        described = [self._group(each) for each in of.values()]
        used = {side.layer for side in makers}
        described += [self._unused(name) for name in self.producers if name not in used]
        return sorted(described, key=lambda g: self.position[g.name])

    # -- sides -------------------------------------------------------------------------------

    def _sides(self) -> Iterator[_Side]:
        for (layer, axis), dim in self.found.sides.items():
            module = self.modules.get(layer)
            if module is None:
                continue
            kind = layer_kind(module)
            if kind is None or (kind == "depthwise" and axis == "in"):
                continue
            yield _Side(layer, kind, axis, self.units.resolved(dim))
        for name, dims in self.found.tensors.items():
            if name in self.parameters and not self._belongs(name):
                parameter = self.parameters[name]
                place = parameter_dim(parameter)
                if parameter.dim():
                    yield _Side(name, "parameter", "out", self.units.resolved(dims[place]))

    def _belongs(self, name: str) -> bool:
        """Return whether a parameter is cut with its layer."""
        module = self.modules.get(split_name(name)[0])
        return module is not None and layer_kind(module) is not None

    def _note_tensors(self, by_unit: dict[int, _Found]) -> None:
        """Give reasons where tensors hold units along dimensions of which nothing can be cut."""
        for name, dims in self.found.tensors.items():
            if self._belongs(name):
                continue
            free = parameter_dim(self.parameters[name]) if name in self.parameters else -1
            for place, dim in enumerate(dims):
                if place == free:
                    continue
                for unit in np.unique(self.units.resolved(dim)).tolist():
                    if unit in by_unit:
                        by_unit[unit].reasons.append(f"it is tied to {name!r}, which cannot be cut there")

    # -- groups ------------------------------------------------------------------------------

    def _labels(self, makers: Sequence[_Side]) -> dict[str, int]:
        """Return a number for each layer, the same for layers that share a unit."""
        names = list(dict.fromkeys(side.layer for side in makers))
        number = {name: index for index, name in enumerate(names)}
        rows, columns = [], []
        for side in makers:
            used = np.unique(side.dim)
            used = used[used != ALWAYS]
            rows.append(np.full(len(used), number[side.layer]))
            columns.append(used + len(names))
        if not names:
            return {}
        row, column = np.concatenate(rows), np.concatenate(columns)
        size = int(max(column.max(initial=0), len(names))) + 1
        graph = coo_matrix((np.ones(len(row)), (row, column)), shape=(size, size))
        _, labels = connected_components(graph, directed=False)
        return {name: int(labels[number[name]]) for name in names}

    def _group(self, found: _Found) -> Group:
        found.makers.sort(key=lambda side: self.position[side.layer])
        order: dict[int, int] = {}
        for side in found.makers:
            for unit in side.dim[:, 0].tolist() if side.dim.shape[1] else ():
                if unit != ALWAYS:
                    order.setdefault(unit, len(order))
        reasons = [*self._reasons(found, order), *found.reasons]
        sides = sorted([*found.makers, *found.others], key=self._place)
        members = [
            Member(layer=s.layer, kind=s.kind, axis=s.axis, index_map=_index_map(s.dim, order)) for s in sides
        ]
        name = found.makers[0].layer
        size = len(order) or channel_count(self.modules[name], "out")
        if not order:
            members = [self._whole(side) for side in found.makers]
        reasons = list(dict.fromkeys(reasons))
        if not reasons and not any(side.axis == "in" for side in found.others):
            reasons = ["no layer is found that reads its channels"]
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        return Group(
            name=name,
            type="linear" if isinstance(self.modules[name], nn.Linear) else "conv",
            size=size,
            members=tuple(members),
            prunable=not reasons,
            reason=reasons[0] + more if reasons else "",
        )

    def _reasons(self, found: _Found, order: dict[int, int]) -> Iterator[str]:
        for side in [*found.makers, *found.others]:
            problem = self._uncuttable(side)
            if problem:
                yield problem
        for unit in order:
            reason = self.units.reason(unit)
            if reason:
                yield reason
        for side in found.makers:
            if side.dim.shape[1] > 1:
                yield "its channels are divided into heads, whose number the code holds"
            if (side.dim == ALWAYS).any():
                yield "some of its channels always have to stay"
        if len(order) == 1:
            yield "all its channels are tied into one unit"

    def _uncuttable(self, side: _Side) -> str:
        """Return why surgery cannot cut this layer; empty if it can."""
        module = self.modules.get(side.layer)
        owner = split_name(side.layer)[0]
        if module is None and isinstance(self.modules.get(owner), nn.MultiheadAttention | nn.RNNBase):
            return f"it is tied to {type(self.modules[owner]).__name__} {owner!r}, which cannot be cut"
        names = [side.layer] if module is None else [
            f"{side.layer}.{own}" for own, p in module.named_parameters(recurse=False) if p is not None
        ]  # fmt: skip
        shared = [name for name in names if len(self.found.captured.aliases.get(name, ())) > 1]
        if shared:
            return f"it is tied to parameter {shared[0]!r}, which several layers share"
        if isinstance(module, Conv):
            if side.kind == "conv" and module.groups == module.out_channels > 1:
                return f"{side.layer!r} is a depthwise convolution with unequal numbers of inputs and outputs"
            if module.transposed and module.groups > 1:
                return f"{side.layer!r} is a grouped transposed convolution"
        if isinstance(module, Conv | nn.Linear) and "weight" not in module._parameters:
            return f"the weight of {side.layer!r} is parametrised"
        return ""

    def _whole(self, side: _Side) -> Member:
        count = channel_count(self.modules[side.layer], "out")
        return Member(
            layer=side.layer, kind=side.kind, axis="out", index_map=tuple((i,) for i in range(count))
        )

    def _unused(self, name: str) -> Group:
        module = self.modules[name]
        reason = "the forward pass does not use it as a layer"
        for owner, holder in self.modules.items():
            if isinstance(holder, nn.MultiheadAttention) and name.startswith(f"{owner}."):
                reason = f"it is part of MultiheadAttention {owner!r}, which cannot be cut"
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

    def _place(self, side: _Side) -> tuple[bool, int, str]:
        """Order members: makers before readers, both in the order of the modules."""
        return (side.axis == "in", self.position.get(side.layer, len(self.position)), side.layer)


def _index_map(dim: Dim, order: dict[int, int]) -> tuple[tuple[int, ...], ...]:
    """Return for each unit the indices that need it."""
    table: list[list[int]] = [[] for _ in order]
    for column in dim.T:
        for index, unit in enumerate(column.tolist()):
            if unit in order:
                table[order[unit]].append(index)
    return tuple(tuple(sorted(owned)) for owned in table)
