"""Lineage: which recovered network a recipe starts from, so that training adds up along the front. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from autoprune.study.records import TrialRecord


def prunes_further(counts: Mapping[str, int], parent: Mapping[str, int]) -> bool:
    """Return whether ``counts`` keeps no more of any group than ``parent`` does, and less of one.

    Args:
        counts: Kept units of every group.
        parent: Kept units of the same groups.
    """
    changes = [counts[name] - kept for name, kept in parent.items()]
    return all(change <= 0 for change in changes) and any(change < 0 for change in changes)


def find_parent(
    counts: Mapping[str, int],
    records: Sequence[TrialRecord],
    counts_of: Callable[[TrialRecord], Mapping[str, int]],
    is_kept: Callable[[TrialRecord], bool],
) -> TrialRecord | None:
    """Return the trial whose recovered network a recipe should start from; None for the dense network.

    Of the trained networks that keep at least as much of every group, it is the one with the most steps in its line;
    of equal ones the one that has the least left to cut. Blocks that the parent lost stay lost.

    Args:
        counts: Units that the recipe keeps of every group.
        records: Trials of the study.
        counts_of: Returns the units that a trial's recipe keeps of every group.
        is_kept: Whether a trial's weights are still there.
    """
    found = []
    for record in records:
        if record.recipe is None or record.state != "complete" or not record.train_steps:
            continue
        # Two layers in the place of one cannot be cut further, and integers are not what others are cut from.
        if record.recipe.factorises or record.recipe.trains_integers:
            continue
        parent = counts_of(record)
        if prunes_further(counts, parent) and is_kept(record):
            left = sum(parent[name] - counts[name] for name in parent)
            found.append((record.train_steps, -left, record.number, record))
    return max(found, key=lambda entry: entry[:3])[3] if found else None
