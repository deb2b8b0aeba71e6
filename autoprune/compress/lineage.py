"""A network that was already cut, seen as a dense one: its groups, and its cuts told in the dense network's units.

Iterative pruning [Han2015]_ cuts a recovered network further instead of the dense one. The groups of the smaller
network are known without finding them again: they are the dense network's with the indices of what stayed.

References:
    [Han2015] Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015, section 3.3.
"""

from __future__ import annotations

from torch import nn

from autoprune.compress.surgery import Plan, gone_blocks, kept_channels
from autoprune.space.groups import Group, Groups, Member


def groups_after(dense: nn.Module, groups: Groups, plan: Plan) -> Groups:
    """Return the groups of the network that ``plan`` makes of ``dense``.

    Args:
        dense: The dense network.
        groups: Its groups.
        plan: Kept units of the groups that were cut.

    Returns:
        The same groups with fewer units, whose index maps are those of the smaller layers.

    Raises:
        CompressionError: If the plan does not fit the groups.
    """
    kept = kept_channels(dense, groups, plan)
    groups = groups.without(gone_blocks(groups, plan))
    places = {
        (layer, side): {channel: place for place, channel in enumerate(channels)}
        for layer, sides in kept.items()
        for side, channels in sides.items()
    }

    def member_after(member: Member, units: tuple[int, ...]) -> Member:
        moved = places.get((member.layer, member.side))
        index_map = tuple(
            member.index_map[unit]
            if moved is None
            # Of channels that belong to two groups the other one may have taken some.
            else tuple(moved[c] for c in member.index_map[unit] if c in moved)
            for unit in units
        )
        return member.model_copy(update={"index_map": index_map})

    def group_after(group: Group) -> Group:
        units = plan.get(group.name, tuple(range(group.size)))
        members = tuple(member_after(member, units) for member in group.members)
        return group.model_copy(update={"size": len(units), "members": members})

    return Groups(
        groups=tuple(group_after(g) for g in groups.groups),
        input_shape=groups.input_shape,
        rewritten=groups.rewritten,
    )


def in_dense_units(first: Plan, second: Plan) -> Plan:
    """Return the plan that cuts the dense network at once as ``first`` and then ``second`` do.

    Args:
        first: Kept units of the dense network.
        second: Kept units of the network that ``first`` makes.
    """
    composed = {name: tuple(units) for name, units in first.items()}
    for name, units in second.items():
        composed[name] = tuple(first[name][unit] for unit in units) if name in first else tuple(units)
    return composed
