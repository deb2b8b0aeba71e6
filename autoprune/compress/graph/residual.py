"""Residual blocks of a network that is a graph; see :mod:`autoprune.compress.blocks`."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn

from autoprune.compress.graph.network import GraphNetwork, block_ends, bypass
from autoprune.compress.layers import Conv
from autoprune.compress.outputs import flat_outputs
from autoprune.space.groups import Group, Groups

# With a constant branch and inputs this large, a residual block returns its inputs up to this share.
_LARGE = 1e4
_NEAR = 0.05


def removable_blocks(
    network: GraphNetwork, groups: Groups, example: Tensor, *, stop: Callable[[], bool] = lambda: False
) -> dict[str, str]:
    """Find for each group the block that goes when all of its units are removed.

    The block is the smallest module of the original network that holds every layer of the group, reads one value and
    makes one that is the same once the group's channels are constant.

    Args:
        network: The dense network on the CPU; it is not changed.
        groups: Its groups.
        example: One batch of inputs.
        stop: Whether time is over; groups that were not looked at by then have no block.

    Returns:
        Name of the block by the name of the group; of several groups in one block only the first has it.
    """
    found: dict[str, str] = {}
    with torch.no_grad():
        before = [t.shape for t in flat_outputs(network(example))]
    for group in groups.prunable:
        if stop():
            break
        block = _block_of(network, group, example)
        nested = any(f"{block}.".startswith(f"{b}.") or b.startswith(f"{block}.") for b in found.values())
        if block and not nested and _runs_without(network, block, example, before):
            found[group.name] = block
    return found


def _block_of(network: GraphNetwork, group: Group, example: Tensor) -> str:
    paths = [member.layer.split(".") for member in group.members]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    for depth in range(min(shared, min(len(path) for path in paths) - 1), 0, -1):
        name = ".".join(paths[0][:depth])
        ends = block_ends(network.graph, name)
        if ends is not None and _is_residual(network, name, group, ends, example):
            return name
    return ""


@torch.no_grad()
def _is_residual(
    network: GraphNetwork, name: str, group: Group, ends: tuple[fx.Node, fx.Node], example: Tensor
) -> bool:
    copy = deepcopy(network)
    for member in group.members:
        if member.axis == "in" and member.layer.startswith(f"{name}."):
            layer = copy.get_submodule(member.layer)
            if isinstance(layer, Conv | nn.Linear):
                layer.weight.zero_()
    probe = _Probe(copy, ends)
    try:
        probe.run(example)
    except Exception:  # whatever the network raises on values that it was not made for
        return False
    large, made = probe.large, probe.made
    if large is None or made is None or made.shape != large.shape:
        return False
    return float((made - large).abs().max()) <= _NEAR * _LARGE


class _Probe(fx.Interpreter):
    """Runs a network with large values where a block begins, and keeps what the block makes of them."""

    def __init__(self, network: GraphNetwork, ends: tuple[fx.Node, fx.Node]) -> None:
        super().__init__(network, graph=network.graph)
        self.extra_traceback = False
        self.ends = ends
        self.large: Tensor | None = None
        self.made: Tensor | None = None

    def run_node(self, node: fx.Node) -> Any:
        """Run one operation."""
        made = super().run_node(node)
        if node is self.ends[0] and isinstance(made, Tensor):
            # Positive, so that an activation after the addition lets it pass.
            random = torch.rand(made.shape, generator=torch.Generator().manual_seed(0))
            self.large = ((1.0 + random) * _LARGE).to(made)
            return self.large.clone()  # a block that writes into its input is no identity
        if node is self.ends[1] and isinstance(made, Tensor):
            self.made = made.clone()
        return made


@torch.no_grad()
def _runs_without(network: GraphNetwork, block: str, example: Tensor, before: list[torch.Size]) -> bool:
    copy = deepcopy(network)
    try:
        bypass(copy, block)
        after = flat_outputs(copy(example))
    except Exception:  # the network asks something of the block that its input lacks
        return False
    return before == [t.shape for t in after] and all(bool(torch.isfinite(t).all()) for t in after)
