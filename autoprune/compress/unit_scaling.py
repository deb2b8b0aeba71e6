"""Weights of a group seen unit by unit: their norms over all coupled layers, and their scaling in place."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from autoprune.compress.layers import Conv, channel_count, submodule, weight_rows
from autoprune.errors import CompressionError
from autoprune.space.groups import Axis, Group, Member

BOTH: tuple[Axis, ...] = ("out", "in")
READERS: tuple[Axis, ...] = ("in",)
# Members that are no layers.
_BARE = ("parameter", "size")


def unit_norms(model: nn.Module, group: Group) -> Tensor:
    r"""Return the Euclidean norm of each unit over all layers that it couples, as DepGraph does [Fang2023]_.

    It runs over the filters that make a unit, the weights that read it and the scales of the normalisations between;
    biases, shifts and the slopes of PReLUs are left out.

    Args:
        model: The network that the group belongs to.
        group: One of its groups.

    Returns:
        ``(group.size,)``, float32, on the device of the network.

    References:
        [Fang2023] DepGraph: Towards Any Structural Pruning, CVPR 2023, section 3.3.
    """
    total: Tensor | None = None
    for member in group.members:
        squares = _squares(model, member)
        if squares is None:
            continue
        units, channels = pairs(member.index_map, squares.device)
        own = squares.new_zeros(group.size).index_add_(0, units, squares[channels])
        total = own if total is None else total + own
    if total is None:
        raise CompressionError(f"no layer of group {group.name!r} has weights")
    return total.sqrt()


@torch.no_grad()
def scale_units(model: nn.Module, group: Group, factors: Tensor, axes: Collection[Axis] = BOTH) -> None:
    """Multiply all weights of each unit by one factor, in place.

    Args:
        model: The network that the group belongs to.
        group: One of its groups.
        factors: One for each unit, ``(group.size,)``.
        axes: ``out`` scales what makes the units (filters, their biases, scales and shifts of normalisations), ``in``
            what reads them. Zeros on ``in`` alone make the network ignore a unit, as if it were cut; of a group that
            no layer reads (the width of queries and keys) what makes it is scaled instead.
    """
    if not any(member.axis == "in" for member in group.members):
        axes = BOTH
    for member in group.members:
        module = submodule(model, member.layer) if member.kind not in _BARE else None
        if member.axis not in axes or module is None or isinstance(module, nn.PReLU):
            continue
        each = _of_channels(module, member, factors)
        if isinstance(module, Conv | nn.Linear):
            module.weight.mul_(spread(module, member.axis, each))
        elif isinstance(module, nn.Embedding):
            module.weight.mul_(each)
        if member.axis == "out":
            for name in ("weight", "bias") if member.kind == "norm" else ("bias",):
                parameter = getattr(module, name, None)
                if isinstance(parameter, nn.Parameter) and parameter.shape == each.shape:
                    parameter.mul_(each)


def spread(module: nn.Module, axis: Axis, each: Tensor) -> Tensor:
    """Return factors of channels in a shape that multiplies the weight of a convolution or linear layer.

    Args:
        module: The layer.
        axis: Whether its outputs or its inputs are meant.
        each: One factor for each channel along ``axis``, ``(channels,)``.
    """
    if not isinstance(module, Conv | nn.Linear):
        raise CompressionError(f"{type(module).__name__} has no weight matrix")
    rest = [1] * (module.weight.dim() - 2)
    transposed = isinstance(module, Conv) and module.transposed
    if axis == ("in" if transposed else "out"):
        return each.reshape(-1, 1, *rest)
    if transposed or not isinstance(module, Conv) or module.groups == 1:
        return each.reshape(1, -1, *rest)
    # Each block of filters of a grouped convolution reads its own inputs.
    by_block = each.reshape(module.groups, 1, -1).expand(-1, module.weight.shape[0] // module.groups, -1)
    return by_block.reshape(module.weight.shape[0], -1, *rest)


def pairs(index_map: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return an index map as unit and channel of each entry, two ``(entries,)``."""
    units = [unit for unit, channels in enumerate(index_map) for _ in channels]
    channels = [channel for owned in index_map for channel in owned]
    return torch.tensor(units, dtype=torch.long, device=device), torch.tensor(
        channels, dtype=torch.long, device=device
    )


def _of_channels(module: nn.Module, member: Member, factors: Tensor) -> Tensor:
    weight = getattr(module, "weight", None)
    like = weight if isinstance(weight, Tensor) else factors
    each = torch.ones(channel_count(module, member.axis), dtype=like.dtype, device=like.device)
    units, channels = pairs(member.index_map, each.device)
    each[channels] = factors.to(each)[units]
    return each


@torch.no_grad()
def _squares(model: nn.Module, member: Member) -> Tensor | None:
    if member.kind in _BARE:
        return None
    module = submodule(model, member.layer)
    if isinstance(module, Conv | nn.Linear):
        return weight_rows(module, member.axis).float().square().sum(1)
    if isinstance(module, nn.Embedding):
        return module.weight.float().square().sum(0)
    weight = None if isinstance(module, nn.PReLU) else getattr(module, "weight", None)
    return weight.float().square() if isinstance(weight, nn.Parameter) else None
