"""Ranking across groups: how many units each group keeps where scores of several groups are compared.

References:
    [Lee2021] Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021.
    [Fang2024] Isomorphic Pruning for Vision Models, ECCV 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autoprune.compress.criteria import score_group
from autoprune.compress.statistics import LayerStatistics
from autoprune.space.groups import Group, Groups, count_step
from autoprune.space.recipe import SHARE_CRITERIA, Recipe


def kept_counts(
    model: nn.Module, groups: Groups, recipe: Recipe, statistics: LayerStatistics | None
) -> dict[str, int]:
    """Return the units that each group keeps under the recipe's ranking.

    By ``group`` they follow from each group's ratio. By ``global`` the ratios say together how many units go, and the
    scores of all groups, each divided by its group's mean, say which; ``lamp`` is compared as it is [Lee2021]_. By
    ``alike`` the same is done among groups that have the same number of units and the same kinds of layers.
    [Fang2024]_ compares what has the same graph, whatever its size, and by raw scores; ours are scaled in each layer.

    Groups of ratio 0, and blocks of ratio 1, are as the recipe says and take no part.

    Args:
        model: The dense network.
        groups: Its groups.
        recipe: Ratios, criteria, ranking and the width of kept counts.
        statistics: What the recipe's criteria read; may be None for those that read weights alone.

    Returns:
        Units that stay by the group's name: whole steps of the width, at least one.

    Raises:
        UsageError: If a criterion is unknown.
        CompressionError: If a criterion misses its statistics or gives scores that are not finite.
    """
    counts = recipe.kept_counts(groups)
    if recipe.ranking == "group":
        return counts
    left = groups.without(groups.removed_blocks(counts)).by_name
    pools: dict[object, list[Group]] = {}
    for group in groups.groups:
        if group.name in left and 0 < counts[group.name] < group.size:
            pools.setdefault(_kind(group) if recipe.ranking == "alike" else None, []).append(group)
    for pool in pools.values():
        wanted = sum(group.size - counts[group.name] for group in pool)
        scores = [_comparable(model, group, recipe, statistics) for group in pool]
        counts |= share_out(pool, scores, wanted, recipe.width)
    return counts


def share_out(groups: Sequence[Group], scores: Sequence[Tensor], wanted: int, width: int) -> dict[str, int]:
    """Return what each group keeps when about ``wanted`` units of the lowest scores go.

    Units go by whole steps, the lowest of a group first; a step counts as much as its units do in the mean. As many
    steps go as bring the number of units nearest to ``wanted``, one at least.

    Args:
        groups: Groups to compare.
        scores: For each its units' scores, ``(group.size,)``.
        wanted: Units to remove, of all groups together.
        width: Step of kept counts.
    """
    steps = []
    for place, (group, own) in enumerate(zip(groups, scores, strict=True)):
        rising = torch.sort(own).values
        begin = 0
        for end in _cuts(group.size, width):
            # Means of a sorted row rise, so a group's steps come in their order.
            steps.append((float(rising[begin:end].mean()), place, begin, end))
            begin = end
    gone = [0] * len(groups)
    for _, place, begin, end in sorted(steps):
        removed, size = sum(gone), end - begin
        if removed and abs(removed + size - wanted) > abs(removed - wanted):
            break
        gone[place] = end
    return {group.name: group.size - lost for group, lost in zip(groups, gone, strict=True)}


def _cuts(size: int, width: int) -> list[int]:
    """Return how many units of a group may go, from the fewest on, so that whole steps stay."""
    step = count_step(size, width)
    return [size - kept for kept in range((size - 1) // step * step, 0, -step)]


def _kind(group: Group) -> object:
    return group.type, group.size, tuple(sorted((member.kind, member.axis) for member in group.members))


def _comparable(model: nn.Module, group: Group, recipe: Recipe, statistics: LayerStatistics | None) -> Tensor:
    criterion = recipe.criterion_of(group)
    scores = score_group(model, group, criterion, statistics)
    mean = float(scores.mean())
    return scores if criterion in SHARE_CRITERIA or mean == 0 else scores / mean
