"""Groups: the coupled channels that can only be removed together, as plain data.

Torch-free, so that reports and studies can read it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict

Axis = Literal["out", "in"]
Side = Axis | int
LayerKind = Literal["conv", "depthwise", "linear", "norm", "embedding", "parameter", "size"]


class Member(BaseModel):
    """One side of one layer that a group cuts.

    Attributes:
        layer: Name of the module in ``model.named_modules()`` (of the parameter or buffer for ``parameter``, of the
            attribute for ``size``).
        kind: ``conv`` and ``linear`` have weights on both sides; ``depthwise`` is cut on both sides
            at once and listed once, with axis ``out``; ``norm`` is any per-channel normalisation; ``size`` is a number
            in a rewritten network that counts channels.
        axis: ``out`` where the layer makes the channels, ``in`` where it reads them.
        index_map: For each unit of the group the indices that it owns along that axis of the layer.
        dim: Dimension of a ``parameter`` that the channels lie along.
        own: Whether the layer's bit-width is this group's. Channels that are divided into heads and places belong to
            two groups.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: str
    kind: LayerKind
    axis: Axis
    index_map: tuple[tuple[int, ...], ...]
    dim: int = 0
    own: bool = True

    @property
    def side(self) -> Side:
        """What is cut of the layer: an axis, of a parameter a dimension."""
        return self.dim if self.kind == "parameter" else self.axis


class Group(BaseModel):
    """Coupled channels: the unit of the search.

    Attributes:
        name: Name of the first layer that makes the channels.
        type: ``conv`` or ``linear``: the kind of that layer.
        size: Number of units that can be removed one by one.
        members: All layers cut together.
        prunable: Whether surgery of this group was verified on this model.
        reason: Why it is left alone; empty if ``prunable``.
        block: Module that gives way to the identity when all units are removed; empty where some have to stay.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    type: Literal["conv", "linear"]
    size: int
    members: tuple[Member, ...]
    prunable: bool
    reason: str = ""
    block: str = ""

    @property
    def producers(self) -> tuple[str, ...]:
        """Convolution and linear layers that make the channels and whose bit-width is the group's."""
        return tuple(
            m.layer
            for m in self.members
            if m.own and m.axis == "out" and m.kind in ("conv", "depthwise", "linear")
        )

    @property
    def consumers(self) -> tuple[str, ...]:
        """Convolution and linear layers that read the channels."""
        return tuple(m.layer for m in self.members if m.axis == "in" and m.kind in ("conv", "linear"))


class Groups(BaseModel):
    """All groups of a model; every convolution and linear layer is a producer in exactly one.

    Attributes:
        groups: In the order of the model's modules.
        input_shape: ``(channels, height, width)`` of one example that they were found with.
        rewritten: Whether they are those of the network written as a graph, whose code holds no sizes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    groups: tuple[Group, ...]
    input_shape: tuple[int, ...]
    rewritten: bool = False

    @cached_property
    def by_name(self) -> dict[str, Group]:
        """Groups by their names."""
        return {group.name: group for group in self.groups}

    def removed_blocks(self, counts: Mapping[str, int]) -> tuple[str, ...]:
        """Return the blocks that are gone where groups keep ``counts`` units; those not named are whole."""
        return tuple(g.block for g in self.groups if g.block and counts.get(g.name, g.size) == 0)

    def without(self, blocks: Collection[str]) -> Groups:
        """Return the groups of the network without some blocks: a group that has no layer left is not there."""
        if not blocks:
            return self
        rest = []
        for group in self.groups:
            members = tuple(m for m in group.members if not is_inside(m.layer, blocks))
            if any(m.axis == "out" for m in members):
                rest.append(group.model_copy(update={"members": members}))
        # Not by model_copy, which would copy the cached names too.
        return Groups(groups=tuple(rest), input_shape=self.input_shape, rewritten=self.rewritten)

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that can be pruned."""
        return tuple(group for group in self.groups if group.prunable)


def is_inside(layer: str, blocks: Collection[str]) -> bool:
    """Return whether a layer lies in one of the blocks."""
    return any(layer.startswith(f"{block}.") for block in blocks)


def count_step(size: int, width: int) -> int:
    """Return the step of a group's kept counts: ``width``, halved until the group has at least four of them.

    Args:
        size: Units in the group, at least 1.
        width: Step that the target's kernels reward, at least 1.
    """
    step = width
    while step > 1 and step * 4 > size:
        step //= 2
    return step


def kept_count(size: int, ratio: float, width: int) -> int:
    """Return how many of ``size`` units stay when the share ``ratio`` is removed.

    The count is the multiple of a step nearest to ``size * (1 - ratio)`` (the smaller one at a tie). The step is
    ``width``, halved for small groups until they have at least four of them. A positive ratio always removes
    something and, below 1, never everything.

    Args:
        size: Units in the group, at least 1.
        ratio: Share removed, in ``[0, 1]``; 1 takes the group's block out.
        width: Step of kept counts that the target's kernels reward, at least 1.
    """
    if ratio >= 1.0:
        return 0
    if ratio <= 0.0 or size == 1:
        return size
    step = count_step(size, width)
    wanted = size * (1.0 - ratio)
    below = int(wanted // step) * step
    kept = below if wanted - below <= step / 2 else below + step
    largest_cut = (size - 1) // step * step
    return max(step, min(kept, largest_cut))
