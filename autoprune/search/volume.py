"""Hypervolume gains of many candidates at once, for proposals and promotions. Three objectives or fewer, minimised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoprune.study.pareto import non_dominated

Array = NDArray[np.float64]

# Candidates whose gains are computed together, to bound memory.
_AT_ONCE = 256


class Volume:
    """The region that a set of points dominates below the reference ``(1, 1, 1)``.

    Space is cut at the points' coordinates on the last two axes; in each cell of that grid the region is as high as
    the lowest first coordinate of the points that reach the cell, so gains are exact.

    Args:
        values: Outcomes, ``(n, 3)``; those not below 1 everywhere add nothing. An objective that does not count is 0.
    """

    def __init__(self, values: Array) -> None:
        values = np.asarray(values, dtype=np.float64).reshape(-1, 3)
        values = np.clip(values[(values < 1.0).all(axis=1)], 0.0, None)
        self.front: Array = values[non_dominated(values)] if len(values) else values
        self._rows = _edges(self.front[:, 1])
        self._columns = _edges(self.front[:, 2])
        self._floor = np.ones((len(self._rows) - 1, len(self._columns) - 1))
        for first, second, third in self.front:
            reached = self._floor[self._rows[:-1] >= second][:, self._columns[:-1] >= third]
            place = np.ix_(self._rows[:-1] >= second, self._columns[:-1] >= third)
            self._floor[place] = np.minimum(reached, first)

    @property
    def total(self) -> float:
        """Volume of the region, in ``[0, 1]``."""
        return float(np.diff(self._rows) @ (1.0 - self._floor) @ np.diff(self._columns))

    def gains(self, candidates: Array) -> Array:
        """Return what each candidate alone would add, ``(m,)``.

        Args:
            candidates: ``(m, 3)``.
        """
        candidates = np.clip(candidates, 0.0, None)
        gains = np.zeros(len(candidates))
        # Most candidates are dominated, which is cheap to see.
        beaten = np.any(np.all(self.front[None] <= candidates[:, None], axis=2), axis=1)
        hopeful = np.flatnonzero(np.all(candidates < 1.0, axis=1) & ~beaten)
        for start in range(0, len(hopeful), _AT_ONCE):
            some = hopeful[start : start + _AT_ONCE]
            high = _overlaps(self._rows, candidates[some, 1])
            wide = _overlaps(self._columns, candidates[some, 2])
            won = np.maximum(0.0, self._floor[None] - candidates[some, 0][:, None, None])
            gains[some] = ((won @ wide[:, :, None])[:, :, 0] * high).sum(axis=1)
        return gains


def counted_axes(objectives: Sequence[str]) -> Array:
    """Return 1 for each of capability lost, size and latency that is an objective, else 0, ``(3,)``."""
    return np.array([1.0, float("size" in objectives), float("latency" in objectives)])


def _edges(values: Array) -> Array:
    edges: Array = np.unique(np.concatenate([[0.0], values, [1.0]]))
    return edges


def _overlaps(edges: Array, starts: Array) -> Array:
    """Return the length of each cell that lies beyond each start, ``(m, cells)``."""
    lengths: Array = np.maximum(0.0, edges[1:][None] - np.maximum(edges[:-1][None], starts[:, None]))
    return lengths


def pick_greedily(known: Array, candidates: Array, count: int) -> list[int]:
    """Choose candidates one after the other, each by what it adds to ``known`` and those chosen before.

    Args:
        known: ``(n, 3)``.
        candidates: ``(m, 3)``.
        count: Most candidates to choose.

    Returns:
        Rows of ``candidates``, the best first; those that add nothing are not chosen.
    """
    chosen: list[int] = []
    while len(chosen) < min(count, len(candidates)):
        gains = Volume(np.concatenate([known.reshape(-1, 3), candidates[chosen]])).gains(candidates)
        gains[chosen] = 0.0
        best = int(gains.argmax())
        if gains[best] <= 0:
            break
        chosen.append(best)
    return chosen


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; NaN below four pairs or where one side is constant."""
    if len(first) < 4 or len(set(first)) < 2 or len(set(second)) < 2:
        return float("nan")
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)
