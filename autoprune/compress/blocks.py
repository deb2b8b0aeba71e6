"""Residual blocks that are taken out whole.

A block is what computes ``x + f(x)``. Without the branch it is the identity, and the network runs on without its
layers: the only cut that saves their time whatever widths the kernels like.
:mod:`autoprune.compress.graph.residual` finds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from autoprune.compress.graph.network import GraphNetwork, bypass
from autoprune.compress.layers import split_name, submodule
from autoprune.compress.outputs import flat_outputs


def take_out(model: nn.Module, block: str) -> None:
    """Put the identity in the place of a block, in place."""
    if isinstance(model, GraphNetwork):
        bypass(model, block)
        return
    owner, own = split_name(block)
    setattr(submodule(model, owner), own, nn.Identity())


def that_can_go(model: nn.Module, blocks: Mapping[str, str], example: Tensor) -> dict[str, str]:
    """Return the blocks in whose place a network runs with the identity: its code may ask more of a module.

    Args:
        model: The dense network on the CPU in evaluation mode; it is not changed.
        blocks: Names of modules by the groups that they go with.
        example: One batch of inputs.
    """
    with torch.no_grad():
        before = [tensor.shape for tensor in flat_outputs(model(example))]
    if _runs_without(model, list(blocks.values()), example, before):
        return dict(blocks)
    return {name: block for name, block in blocks.items() if _runs_without(model, [block], example, before)}


@torch.no_grad()
def _runs_without(model: nn.Module, blocks: list[str], example: Tensor, before: list[torch.Size]) -> bool:
    copy = deepcopy(model).eval()
    try:
        for block in blocks:
            take_out(copy, block)
        after = flat_outputs(copy(example))
    except Exception:  # the network asks something of a block that the identity lacks
        return False
    return before == [t.shape for t in after] and all(bool(torch.isfinite(t).all()) for t in after)
