"""Promotion: which results of one rung go on to the next. Arrays only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoprune.search.volume import Array, Volume
from autoprune.study.pareto import non_dominated


def is_hopeless(hopeful: Array, trained: Array) -> bool:
    """Return whether a trained network beats what a candidate may at best come to, so that training it is wasted.

    Args:
        hopeful: Least capability that the candidate may lose, its size and its latency, ``(3,)``.
        trained: The same of trained networks, of the rung that the candidate would reach, ``(n, 3)``.
    """
    return bool((trained <= hopeful).all(axis=1).any())


def uncovered(values: Array, trained: Sequence[bool], parts: int) -> int | None:
    """Return a candidate from a part of the costs where none was trained; None if every part has one.

    The axis of costs is the mean of their logarithms, from the mildest to the deepest candidate of the front that has
    any volume. It is cut into equal parts; the mildest empty one gives the candidate that adds most.

    Args:
        values: Capability lost, size and latency as shares of where the volume ends, ``(n, 3)``; an objective that
            does not count is 0.
        trained: Whether each went on before.
        parts: Number of parts.
    """
    useful = np.flatnonzero((values < 1.0).all(axis=1) & (values[:, 0] > 0))
    useful = useful[non_dominated(values[useful])] if len(useful) else useful
    if len(useful) < 2:
        return None
    costs = np.log(np.where(values[:, 1:] > 0, values[:, 1:], 1.0)).sum(axis=1)
    low, high = costs[useful].min(), costs[useful].max()
    part = np.clip(np.floor((costs - low) / max(high - low, 1e-9) * parts), 0, parts - 1)
    known = np.array(trained, dtype=bool)
    covered = {float(p) for p in part[known]}
    empty = sorted({float(p) for p in part[useful]} - covered, reverse=True)
    if not empty:
        return None
    inside = useful[part[useful] == empty[0]]
    gains = Volume(values[known]).gains(values[inside])
    return int(inside[int(gains.argmax())])
