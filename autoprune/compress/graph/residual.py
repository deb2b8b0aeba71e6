"""Residual blocks: the modules of the original network through which a value goes unchanged but for an addition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from autoprune.compress.graph.network import GraphNetwork, block_ends
from autoprune.compress.layers import Conv
from autoprune.space.groups import Group, Groups

# With a constant branch and inputs this large, a residual block returns its inputs up to this share.
_LARGE = 1e4
_NEAR = 0.05

_Made = tuple[torch.Size, torch.dtype]


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
    shapes = _Shapes(network).of_all(example)
    for group in groups.prunable:
        if stop():
            break
        block = _block_of(network, group, shapes, list(found.values()))
        if block:
            found[group.name] = block
    return found


def _block_of(network: GraphNetwork, group: Group, shapes: Mapping[str, _Made], taken: Sequence[str]) -> str:
    paths = [member.layer.split(".") for member in group.members]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    for depth in range(min(shared, min(len(path) for path in paths) - 1), 0, -1):
        name = ".".join(paths[0][:depth])
        if any(f"{name}.".startswith(f"{block}.") or block.startswith(f"{name}.") for block in taken):
            return ""  # so is every module around it
        ends = block_ends(network.graph, name)
        if ends is not None and _is_residual(network, name, group, ends, shapes):
            return name
    return ""


@torch.no_grad()
def _is_residual(
    network: GraphNetwork, name: str, group: Group, ends: tuple[fx.Node, fx.Node], shapes: Mapping[str, _Made]
) -> bool:
    """Whether a block returns what it gets, once what reads the group's channels is zero and its inputs are large."""
    before, after = (shapes.get(end.name) for end in ends)
    if before is None or before != after:
        return False
    # Positive, so that an activation after the addition lets it pass.
    random = torch.rand(before[0], generator=torch.Generator().manual_seed(0))
    large = ((1.0 + random) * _LARGE).to(before[1])
    readers = [m.layer for m in group.members if m.axis == "in" and m.layer.startswith(f"{name}.")]
    try:
        with _zeroed(network, readers):
            # A block that writes into its input is no identity.
            made = _Block(network, ends, len(large)).run_on(large.clone())
    except Exception:  # whatever the block raises on values that it was not made for
        return False
    return float((made - large).abs().max()) <= _NEAR * _LARGE


@contextmanager
def _zeroed(network: GraphNetwork, layers: Iterable[str]) -> Iterator[None]:
    """Let the weights of some layers be zero for a while."""
    found = [network.get_submodule(layer) for layer in layers]
    weights = [layer.weight for layer in found if isinstance(layer, Conv | nn.Linear)]
    kept = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:
            weight.zero_()
        yield
    finally:
        for weight, before in zip(weights, kept, strict=True):
            weight.copy_(before)


class _Shapes(fx.Interpreter):
    """Notes the shape and type of every value."""

    def __init__(self, network: GraphNetwork) -> None:
        super().__init__(network, graph=network.graph)
        self.seen: dict[str, _Made] = {}

    @torch.no_grad()
    def of_all(self, example: Tensor) -> dict[str, _Made]:
        """Run the network and return what was seen by the nodes' names."""
        self.run(example)
        return self.seen

    def run_node(self, node: fx.Node) -> Any:
        """Run one operation."""
        made = super().run_node(node)
        if isinstance(made, Tensor):
            self.seen[node.name] = (made.shape, made.dtype)
        return made


class _Block(fx.Interpreter):
    """Runs the nodes of one block alone."""

    def __init__(self, network: GraphNetwork, ends: tuple[fx.Node, fx.Node], examples: int) -> None:
        super().__init__(network, garbage_collect_values=False, graph=network.graph)
        self.ends = ends
        self.examples = examples

    def run_on(self, large: Tensor) -> Tensor:
        """Return what the block makes of ``large``."""
        counted = [node for node in self.graph.nodes if "sym_size" in str(node.target)]
        self.env = {self.ends[0]: large, **dict.fromkeys(counted, self.examples)}
        made = self._value(self.ends[1])
        assert isinstance(made, Tensor)  # noqa: S101
        return made

    def _value(self, node: fx.Node) -> Any:
        """Return a node's value, computed with all that it needs; in the order of the graph, for writes in place."""
        needed: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            each = waiting.pop()
            if each not in needed and each not in self.env:
                needed.add(each)
                waiting += each.all_input_nodes
        for each in self.graph.nodes:
            if each in needed:
                self.env[each] = self.run_node(each)
        return self.env[node]
