"""A reference for surgery that knows nothing of graphs: weights that read a dropped channel are zero."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from autoprune.compress.layers import Conv, channel_count, split_name, submodule
from autoprune.compress.surgery import Plan, kept_channels
from autoprune.space.groups import Groups


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
        self.inner.normalized_shape = (len(kept),)
        for name in ("weight", "bias"):
            setattr(self.inner, name, nn.Parameter(getattr(norm, name).detach()[torch.tensor(kept)]))

    def forward(self, x: Tensor) -> Tensor:
        dim = -1 if self.plain or x.dim() != 4 else 1
        index = self.get_buffer("index")
        return torch.zeros_like(x).index_copy(dim, index, self.inner(x.index_select(dim, index)))
