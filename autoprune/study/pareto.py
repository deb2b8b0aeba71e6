"""Pareto fronts and hypervolumes in NumPy. Everything is minimised."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def non_dominated(values: Array) -> NDArray[np.bool_]:
    """Return which rows no other row dominates.

    Args:
        values: Outcomes to minimise, ``(n, m)``. A row with NaN or infinity counts as dominated; equal rows do
            not dominate each other.

    Returns:
        Mask of the non-dominated rows, ``(n,)``.
    """
    values = np.asarray(values, dtype=np.float64)
    mask: NDArray[np.bool_] = np.asarray(np.isfinite(values).all(axis=1), dtype=np.bool_)
    rows = np.flatnonzero(mask)
    # In lexicographic order a row can only be dominated by an earlier one: the first of those left is on the front.
    order = rows[np.lexsort(values[rows].T[::-1])]
    left = values[order]
    while len(order):
        beaten = (left[0] <= left).all(axis=1) & (left[0] < left).any(axis=1)
        mask[order[beaten]] = False
        beaten[0] = True
        order, left = order[~beaten], left[~beaten]
    return mask


def hypervolume(values: Array, reference: Array) -> float:
    """Return the exact volume that ``values`` dominate below ``reference``, by slicing the last axis.

    Optuna's own function is private, so this is ours. O(n^2 log n) in three dimensions.

    Args:
        values: Outcomes to minimise, ``(n, m)``, m from 1 to 3; rows not below the reference add nothing.
        reference: Worst corner, ``(m,)``.

    Raises:
        ValueError: If m is not 1, 2 or 3.
    """
    values = np.asarray(values, dtype=np.float64).reshape(-1, len(reference))
    values = values[np.isfinite(values).all(axis=1) & (values < reference).all(axis=1)]
    if values.shape[1] not in (1, 2, 3):
        raise ValueError(f"hypervolume of {values.shape[1]} objectives; 1, 2 or 3 are allowed")
    if not len(values):
        return 0.0
    values = values[non_dominated(values)]
    if values.shape[1] == 1:
        return float(reference[0] - values[:, 0].min())
    if values.shape[1] == 2:
        return _area(values, reference)
    values = values[np.argsort(values[:, 2], kind="stable")]
    tops = np.append(values[1:, 2], reference[2])
    heights = tops - values[:, 2]
    return float(sum(h * _area(values[: i + 1, :2], reference[:2]) for i, h in enumerate(heights) if h > 0))


def _area(values: Array, reference: Array) -> float:
    ordered = values[np.lexsort((values[:, 1], values[:, 0]))]
    lowest = np.minimum.accumulate(np.append(reference[1], ordered[:, 1]))
    return float(((reference[0] - ordered[:, 0]) * np.maximum(0.0, lowest[:-1] - ordered[:, 1])).sum())


def knee(values: Array) -> int:
    """Return the row where the trade turns: farthest below the plane through the axes' extremes.

    Columns are scaled to ``[0, 1]`` over the rows; the distance to the plane through the worst corners of each
    axis grows with the sum of the scaled columns, so the row with the smallest sum is the knee.

    Args:
        values: Non-dominated outcomes to minimise, ``(n, m)``, at least one row.
    """
    span = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1.0)
    return int(np.argmin(scaled.sum(axis=1)))
