"""Surgery: channels cut out of a network by the index maps of its groups, and the reference for it.

The cut copy computes what the dense network computes with the same channels zeroed wherever they are read;
:func:`zero_mask` builds that reference, and discovery compares both on every network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from autoprune.compress.blocks import take_out
from autoprune.compress.criteria import score_group
from autoprune.compress.layers import (
    BatchNorm,
    Conv,
    InstanceNorm,
    channel_count,
    parameter_dim,
    split_name,
    submodule,
)
from autoprune.compress.ranking import kept_counts
from autoprune.compress.statistics import LayerStatistics
from autoprune.errors import CompressionError
from autoprune.naming import unknown_name
from autoprune.space.groups import Axis, Group, Groups, is_inside
from autoprune.space.recipe import Recipe

Plan = dict[str, tuple[int, ...]]
"""Kept unit indices, sorted, of every group that is cut, by the group's name."""

Kept = dict[str, dict[Axis, list[int]]]
"""Kept channel indices of every layer that is cut, by the layer's name and axis."""


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
    removed: dict[tuple[str, Axis], set[int]] = {}
    blocks = gone_blocks(groups, plan)
    for name, kept_units in plan.items():
        group = _checked(groups, name, kept_units)
        gone = sorted(set(range(group.size)) - set(kept_units))
        for member in (m for m in group.members if not is_inside(m.layer, blocks)):
            channels = (channel for unit in gone for channel in member.index_map[unit])
            removed.setdefault((member.layer, member.axis), set()).update(channels)
    parameters = dict(model.named_parameters())
    kept: Kept = {}
    for (layer, axis), lost in removed.items():
        if not lost:
            continue
        if layer in parameters:
            parameter = parameters[layer]
            count = int(parameter.shape[parameter_dim(parameter)])
        else:
            count = channel_count(submodule(model, layer), axis)
        kept.setdefault(layer, {})[axis] = [channel for channel in range(count) if channel not in lost]
    return kept


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
    copy = deepcopy(model)
    for block in gone_blocks(groups, plan):
        take_out(copy, block)
    for name, sides in kept.items():
        owner, own = split_name(name)
        if isinstance(parameter := getattr(submodule(copy, owner), own, None), nn.Parameter):
            setattr(submodule(copy, owner), own, _select(parameter, parameter_dim(parameter), sides["out"]))
            continue
        _cut(name, submodule(copy, name), sides)
    return copy


def zero_mask(model: nn.Module, groups: Groups, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` that ignores the units that ``plan`` drops, with all shapes as before.

    Every weight that reads a dropped channel is zero. A LayerNorm, whose statistics run over all channels,
    is replaced by one that sees the kept channels alone.

    Raises:
        CompressionError: If the plan does not fit the groups.
    """
    copy = deepcopy(model)
    for name, sides in kept_channels(model, groups, plan).items():
        module = dict(copy.named_modules()).get(name)
        if isinstance(module, nn.LayerNorm):
            owner, own = split_name(name)
            setattr(submodule(copy, owner), own, _PartialLayerNorm(module, sides["out"]))
        elif isinstance(module, Conv | nn.Linear) and "in" in sides:
            _zero_reads(module, sides["in"])
    return copy


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


def _select(parameter: Tensor, dim: int, indices: Sequence[int]) -> nn.Parameter:
    index = torch.tensor(indices, dtype=torch.long, device=parameter.device)
    return nn.Parameter(parameter.detach().index_select(dim, index), requires_grad=parameter.requires_grad)


def _cut(name: str, module: nn.Module, sides: dict[Axis, list[int]]) -> None:
    """Slice one layer in place."""
    if any(not indices for indices in sides.values()):
        raise CompressionError(f"layer {name!r} would lose all its channels")
    if isinstance(module, Conv):
        _cut_conv(name, module, sides)
    elif isinstance(module, nn.Linear):
        if "in" in sides:
            module.weight = _select(module.weight, 1, sides["in"])
            module.in_features = len(sides["in"])
        if "out" in sides:
            module.weight = _select(module.weight, 0, sides["out"])
            module.out_features = len(sides["out"])
            _select_attributes(module, ("bias",), sides["out"])
    elif isinstance(module, BatchNorm | InstanceNorm):
        _select_attributes(module, ("weight", "bias", "running_mean", "running_var"), sides["out"])
        module.num_features = len(sides["out"])
    elif isinstance(module, nn.LayerNorm):
        _select_attributes(module, ("weight", "bias"), sides["out"])
        module.normalized_shape = (len(sides["out"]),)
    elif isinstance(module, nn.PReLU):
        _select_attributes(module, ("weight",), sides["out"])
        module.num_parameters = len(sides["out"])
    else:
        raise CompressionError(f"layer {name!r} ({type(module).__name__}) cannot be cut")


def _select_attributes(module: nn.Module, names: Sequence[str], indices: Sequence[int]) -> None:
    """Keep ``indices`` of the vectors called ``names`` that the module has."""
    for name in names:
        tensor = getattr(module, name, None)
        if isinstance(tensor, nn.Parameter):
            setattr(module, name, _select(tensor, 0, indices))
        elif isinstance(tensor, Tensor):
            setattr(module, name, tensor[torch.tensor(indices, dtype=torch.long, device=tensor.device)])


def _cut_conv(name: str, conv: nn.modules.conv._ConvNd, sides: dict[Axis, list[int]]) -> None:
    if conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels:
        conv.weight = _select(conv.weight, 0, sides["out"])
        conv.in_channels = conv.out_channels = conv.groups = len(sides["out"])
        _select_attributes(conv, ("bias",), sides["out"])
        return
    outputs = sides.get("out", list(range(conv.out_channels)))
    inputs = sides.get("in", list(range(conv.in_channels)))
    if conv.groups > 1:
        conv.weight = _grouped_weight(name, conv, outputs, inputs)
    else:
        out_dim, in_dim = (1, 0) if conv.transposed else (0, 1)
        conv.weight = _select(_select(conv.weight, out_dim, outputs), in_dim, inputs)
    conv.out_channels, conv.in_channels = len(outputs), len(inputs)
    if "out" in sides:
        _select_attributes(conv, ("bias",), outputs)


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
        blocks.append(_select(_select(conv.weight, 0, rows), 1, columns).detach())
    return nn.Parameter(torch.cat(blocks), requires_grad=conv.weight.requires_grad)


def _zero_reads(module: nn.modules.conv._ConvNd | nn.Linear, kept: Sequence[int]) -> None:
    """Zero the weights that read channels outside ``kept``."""
    with torch.no_grad():
        weight = module.weight
        alive = torch.zeros(channel_count(module, "in"), dtype=weight.dtype, device=weight.device)
        alive[torch.tensor(kept, dtype=torch.long, device=weight.device)] = 1
        if isinstance(module, Conv) and module.transposed:
            weight.mul_(alive.reshape(-1, *[1] * (weight.dim() - 1)))
            return
        groups = module.groups if isinstance(module, Conv) else 1
        mask = alive.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).flatten(0, 1)
        weight.mul_(mask.reshape(*mask.shape, *[1] * (weight.dim() - 2)))


class _PartialLayerNorm(nn.Module):
    """A LayerNorm over some of the channels that passes zeros for the others."""

    def __init__(self, norm: nn.LayerNorm, kept: Sequence[int]) -> None:
        super().__init__()
        # torchvision's LayerNorm2d keeps channels in dimension 1, a plain LayerNorm in the last one.
        self.plain = type(norm) is nn.LayerNorm
        self.register_buffer("index", torch.tensor(kept, dtype=torch.long))
        self.inner = deepcopy(norm)
        _cut("", self.inner, {"out": list(kept)})

    def forward(self, x: Tensor) -> Tensor:
        dim = -1 if self.plain or x.dim() != 4 else 1
        index = self.get_buffer("index")
        return torch.zeros_like(x).index_copy(dim, index, self.inner(x.index_select(dim, index)))
