"""Integer weights of layers: the grids that a network's weights are on, or the nearest ones."""

from __future__ import annotations

import torch
from torch import Tensor

from autoprune.deploy.layers import Layer
from autoprune.deploy.runtime import StoredWeight

# The fold of a BatchNorm rounds; weights of another layer are far off.
_SAME = 1e-3
INT8_TOP = 127


def integers_of(layer: Layer, stored: StoredWeight | None) -> tuple[Tensor, Tensor]:
    """Return a layer's weight as integers times scales.

    Args:
        layer: The layer.
        stored: Its grid, which is kept exactly: BatchNorm that was folded in is in the scales, and in the sign of the
            integers. Without one every output channel's grid ends at its largest magnitude and has 8 bits.

    Returns:
        Integers, int8 of the weight's shape, and positive scales, ``(out, blocks)``; see
        :class:`~autoprune.deploy.runtime.StoredWeight` for the blocks.

    Raises:
        ValueError: If the weight is not on the grid.
    """
    weight = layer.weight.detach().double()
    blocks = 1 if stored is None else stored.blocks
    rows = _rows(weight, layer.axis, blocks)
    if stored is None or stored.codes is None:
        scales = _positive(rows.abs().amax(dim=2) / INT8_TOP)
        codes = torch.round(rows / scales[:, :, None])
        return _like(codes, weight, layer.axis), scales.float()
    codes = _rows(torch.from_numpy(stored.codes).double(), layer.axis, blocks)
    scales = (rows * codes).sum(dim=2) / codes.square().sum(dim=2).clamp_min(1.0)
    off = float((rows - codes * scales[:, :, None]).abs().max()) if rows.numel() else 0.0
    if off > _SAME * float(weight.abs().max()):
        raise ValueError(f"the weight is off its grid of {stored.bits} bits by {off:.3g}")
    signed = torch.where(scales[:, :, None] < 0, -codes, codes)
    return _like(signed, weight, layer.axis), _positive(scales.abs()).float()


def put_together(codes: Tensor, scales: Tensor, axis: int) -> Tensor:
    """Return the weight that integers and scales stand for, laid out as the integers are where there are no blocks.

    See :func:`integers_of`.
    """
    if scales.shape[1] == 1:
        return codes * scales.reshape([-1 if dim == axis else 1 for dim in range(codes.dim())])
    rows = _rows(codes, axis, scales.shape[1]) * scales[:, :, None]
    return rows.reshape(codes.movedim(axis, 0).shape).movedim(0, axis)


def _rows(values: Tensor, axis: int, blocks: int) -> Tensor:
    """Return values as ``(out, blocks, features of a block)``."""
    return values.movedim(axis, 0).reshape(values.shape[axis], blocks, -1)


def _like(rows: Tensor, weight: Tensor, axis: int) -> Tensor:
    moved = weight.movedim(axis, 0).shape
    return rows.reshape(moved).movedim(0, axis).to(torch.int8).contiguous()


def _positive(scales: Tensor) -> Tensor:
    """Return scales without zeros, which a channel of zeros alone has."""
    return torch.where(scales > 0, scales, 1.0)
