"""Surgery: channels cut out of a network by the index maps of its groups.

The cut copy computes what the dense network computes that ignores the same channels; discovery compares both on every
network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.compress.blocks import take_out
from autoprune.compress.criteria import score_group
from autoprune.compress.layers import (
    BatchNorm,
    Conv,
    InstanceNorm,
    channel_count,
    split_name,
    submodule,
)
from autoprune.compress.ranking import kept_counts
from autoprune.compress.statistics import LayerStatistics
from autoprune.errors import CompressionError
from autoprune.naming import unknown_name
from autoprune.space.groups import Group, Groups, Side, is_inside
from autoprune.space.recipe import Recipe

Plan = dict[str, tuple[int, ...]]
"""Kept unit indices, sorted, of every group that is cut, by the group's name."""

Kept = dict[str, dict[Side, list[int]]]
"""Kept channel indices of every layer that is cut, by the layer's name and axis (of a parameter its dimension)."""


def make_plan(
    model: nn.Module,
    groups: Groups,
    recipe: Recipe,
    statistics: LayerStatistics | None,
    counts: Mapping[str, int] | None = None,
) -> Plan:
    """Choose the units that stay: those with the highest scores, equal ones by the lower index.

    Args:
        model: The dense network.
        groups: Its groups.
        recipe: Ratios, criteria and the width of kept counts.
        statistics: What ``activation`` and ``taylor`` read; may be None for the other criteria.
        counts: Units to keep of each group; from the ratios and the ranking if not given. A network that was cut
            before needs them, for ratios are shares of the dense network's units.

    Returns:
        The plan; groups that lose nothing are not in it.

    Raises:
        UsageError: If the recipe asks for what the groups cannot do.
        CompressionError: If a criterion misses its statistics or gives scores that are not finite.
    """
    recipe.check(groups)
    plan: Plan = {}
    kept = kept_counts(model, groups, recipe, statistics) if counts is None else counts
    for group in groups.groups:
        keep = kept[group.name]
        if keep == 0:
            plan[group.name] = ()
        elif keep < group.size:
            scores = score_group(model, group, recipe.criterion_of(group), statistics)
            best = torch.argsort(scores, descending=True, stable=True)[:keep]
            plan[group.name] = tuple(sorted(best.tolist()))
    return plan


def kept_channels(model: nn.Module, groups: Groups, plan: Plan) -> Kept:
    """Translate a plan into the channel indices that each layer keeps.

    Args:
        model: The dense network.
        groups: Its groups.
        plan: Kept units by group.

    Returns:
        For each layer that is cut, and each axis that it is cut along, the sorted indices that stay. Where
        several groups meet in one layer (a concatenation) it is what all of them leave. Layers of blocks that
        are taken out are not among them.

    Raises:
        UsageError: If the plan names an unknown group.
        CompressionError: If the plan cuts a group that is left alone, keeps no unit of a group or names a
            unit that does not exist.
    """
    removed: dict[tuple[str, Side], set[int]] = {}
    blocks = gone_blocks(groups, plan)
    for name, kept_units in plan.items():
        group = _checked(groups, name, kept_units)
        gone = sorted(set(range(group.size)) - set(kept_units))
        for member in (m for m in group.members if not is_inside(m.layer, blocks)):
            channels = (channel for unit in gone for channel in member.index_map[unit])
            removed.setdefault((member.layer, member.side), set()).update(channels)
    kept: Kept = {}
    for (layer, side), lost in removed.items():
        if lost:
            count = _count(model, layer, side)
            kept.setdefault(layer, {})[side] = [channel for channel in range(count) if channel not in lost]
    return kept


def _count(model: nn.Module, layer: str, side: Side) -> int:
    """Return how many channels a member has along one side."""
    owner, own = split_name(layer)
    held = getattr(submodule(model, owner), own, None)
    if isinstance(held, int):
        return held
    if isinstance(held, Tensor) and isinstance(side, int):
        return int(held.shape[side])
    return channel_count(submodule(model, layer), "in" if side == "in" else "out")


def gone_blocks(groups: Groups, plan: Plan) -> tuple[str, ...]:
    """Return the blocks that a plan takes out."""
    return groups.removed_blocks({name: len(units) for name, units in plan.items()})


def prune(model: nn.Module, groups: Groups, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` without the units that ``plan`` drops.

    Args:
        model: The dense network; it is not changed.
        groups: Its groups.
        plan: Kept units by group; groups that are not named stay whole, and one that keeps none goes with its block,
            in whose place the identity is put.

    Returns:
        The smaller network, on the same device and in the same mode.

    Raises:
        CompressionError: If the plan does not fit the groups, or a layer cannot be cut as asked.
    """
    kept = kept_channels(model, groups, plan)
    # What is cut anew is not copied before.
    shared = {id(tensor): tensor for name in kept for tensor in _tensors_of(model, name)}
    copy = deepcopy(model, dict(shared))
    for block in gone_blocks(groups, plan):
        take_out(copy, block)
    cutter = _Cutter()
    for name, sides in kept.items():
        owner, own = split_name(name)
        holder = submodule(copy, owner)
        held = getattr(holder, own, None)
        if isinstance(held, int):
            setattr(holder, own, len(sides["out"]))
        elif isinstance(held, Tensor):
            for side, indices in sides.items():
                held = cutter.select(held, int(side), indices)
            setattr(holder, own, held)
        else:
            cutter.cut(name, submodule(copy, name), sides)
    _own(copy, shared)
    return copy


def _tensors_of(model: nn.Module, name: str) -> list[Tensor]:
    """Return the tensors of a layer, or the one parameter or buffer of that name."""
    owner, own = split_name(name)
    held = getattr(submodule(model, owner), own, None)
    if isinstance(held, nn.Module):
        return [*held.parameters(recurse=False), *held.buffers(recurse=False)]
    return [held] if isinstance(held, Tensor) else []


def _own(model: nn.Module, shared: Mapping[int, Tensor]) -> None:
    """Give a network copies of the tensors that it still shares with another."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        held: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in held:
            own = {name: deepcopy(t, copies) for name, t in tensors.items() if id(t) in shared}
            tensors.update(own)


def _checked(groups: Groups, name: str, units: Sequence[int]) -> Group:
    if name not in groups.by_name:
        raise unknown_name("group", name, groups.by_name)
    group = groups.by_name[name]
    if not group.prunable and len(units) < group.size:
        raise CompressionError(f"group {name!r} cannot be pruned: {group.reason}")
    if not units and not group.block:
        raise CompressionError(
            f"the plan keeps no unit of group {name!r}; at least 1 of {group.size} must stay"
        )
    if units and (list(units) != sorted(set(units)) or units[0] < 0 or units[-1] >= group.size):
        raise CompressionError(
            f"the plan's units of group {name!r} must be sorted, distinct and in 0..{group.size - 1}, "
            f"got {tuple(units)}"
        )
    return group


class _Cutter:
    """Slices layers in place; what shared a parameter before shares it afterwards."""

    def __init__(self) -> None:
        # By the parameter that was sliced, which is held so that no other takes its identity.
        self._made: dict[tuple[int, int, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

    def select(self, tensor: Tensor, dim: int, indices: Sequence[int]) -> Tensor:
        """Return a parameter or buffer with some indices of one dimension alone."""
        key = (id(tensor), dim, tuple(indices))
        if key not in self._made:
            index = torch.tensor(indices, dtype=torch.long, device=tensor.device)
            sliced = tensor.detach().index_select(dim, index)
            if isinstance(tensor, nn.Parameter):
                sliced = nn.Parameter(sliced, requires_grad=tensor.requires_grad)
            self._made[key] = (tensor, sliced)
        return self._made[key][1]

    def cut(self, name: str, module: nn.Module, sides: dict[Side, list[int]]) -> None:
        """Slice one layer in place."""
        if any(not indices for indices in sides.values()):
            raise CompressionError(f"layer {name!r} would lose all its channels")
        if isinstance(module, Conv):
            self._cut_conv(name, module, sides)
        elif isinstance(module, nn.Linear):
            if "in" in sides:
                self._slice(module, ("weight",), sides["in"], 1)
                module.in_features = len(sides["in"])
            if "out" in sides:
                self._slice(module, ("weight", "bias"), sides["out"])
                module.out_features = len(sides["out"])
        elif isinstance(module, BatchNorm | InstanceNorm):
            self._slice(module, ("weight", "bias", "running_mean", "running_var"), sides["out"])
            module.num_features = len(sides["out"])
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            self._slice(module, ("weight", "bias"), sides["out"])
            module.normalized_shape = (len(sides["out"]),)
        elif isinstance(module, nn.GroupNorm):
            self._slice(module, ("weight", "bias"), sides["out"])
            module.num_channels = len(sides["out"])
        elif isinstance(module, nn.Embedding):
            self._slice(module, ("weight",), sides["out"], 1)
            module.embedding_dim = len(sides["out"])
        elif isinstance(module, nn.PReLU):
            self._slice(module, ("weight",), sides["out"])
            module.num_parameters = len(sides["out"])
        else:
            raise CompressionError(f"layer {name!r} ({type(module).__name__}) cannot be cut")

    def _slice(self, module: nn.Module, names: Sequence[str], indices: Sequence[int], dim: int = 0) -> None:
        """Keep ``indices`` of the tensors called ``names`` that the module has."""
        for name in names:
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor):
                setattr(module, name, self.select(tensor, dim, indices))

    def _cut_conv(self, name: str, conv: nn.modules.conv._ConvNd, sides: dict[Side, list[int]]) -> None:
        if conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels:
            self._slice(conv, ("weight", "bias"), sides["out"])
            conv.in_channels = conv.out_channels = conv.groups = len(sides["out"])
            return
        outputs = sides.get("out", list(range(conv.out_channels)))
        inputs = sides.get("in", list(range(conv.in_channels)))
        if conv.groups > 1:
            conv.weight = _grouped_weight(name, conv, outputs, inputs)
        else:
            self._slice(conv, ("weight",), outputs, 1 if conv.transposed else 0)
            self._slice(conv, ("weight",), inputs, 0 if conv.transposed else 1)
        conv.out_channels, conv.in_channels = len(outputs), len(inputs)
        if "out" in sides:
            self._slice(conv, ("bias",), outputs)


def _grouped_weight(
    name: str, conv: nn.modules.conv._ConvNd, outputs: Sequence[int], inputs: Sequence[int]
) -> nn.Parameter:
    """Slice the weight of a grouped convolution, whose groups stay and must stay alike in size."""
    if conv.transposed:
        raise CompressionError(f"layer {name!r}: grouped transposed convolutions cannot be cut")
    outs_each, ins_each = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    blocks = []
    for group in range(conv.groups):
        rows = [i for i in outputs if i // outs_each == group]
        columns = [i - group * ins_each for i in inputs if i // ins_each == group]
        if len(rows) * conv.groups != len(outputs) or len(columns) * conv.groups != len(inputs):
            raise CompressionError(
                f"layer {name!r}: its {conv.groups} groups would keep unequal numbers of channels"
            )
        blocks.append(conv.weight.detach()[rows][:, columns])
    return nn.Parameter(torch.cat(blocks), requires_grad=conv.weight.requires_grad)
