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
    # In lexicographic order a row can only be dominated by an earlier one: the first that is left is on the front.
    order = rows[np.lexsort(values[rows].T[::-1])]
    left = values[order]
    mask[:] = False
    while len(left):
        mask[order[0]] = True
        kept = ~((left >= left[0]).all(axis=1) & (left > left[0]).any(axis=1))
        kept[0] = False
        left, order = left[kept], order[kept]
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
    if values.shape[1] not in (1, 2, 3):
        raise ValueError(f"hypervolume of {values.shape[1]} objectives; 1, 2 or 3 are allowed")
    values = values[(values < reference).all(axis=1)]
    values = values[non_dominated(values)]
    if not len(values):
        return 0.0
    if values.shape[1] == 1:
        return float(reference.item() - values.min())
    if values.shape[1] == 2:
        return _area(values, reference)
    values = values[np.argsort(values[:, 2])]
    tops = np.append(values[1:, 2], reference[2])
    heights = tops - values[:, 2]
    return float(sum(h * _area(values[: i + 1], reference) for i, h in enumerate(heights)))


def _area(values: Array, reference: Array) -> float:
    """Return the area that the first two columns dominate."""
    ordered = values[np.argsort(values[:, 0])]
    lowest = np.minimum.accumulate(np.append(reference[1], ordered[:, 1]))
    return float(((reference[0] - ordered[:, 0]) * np.maximum(0.0, lowest[:-1] - ordered[:, 1])).sum())


def knee(values: Array) -> int:
    """Return the row where the trade turns: farthest below the plane through the axes' extremes.

    Columns are scaled to a range of 1 over the rows; the distance to the plane through the worst corners of each
    axis grows with the sum of the scaled columns, so the row with the smallest sum is the knee.

    Args:
        values: Non-dominated outcomes to minimise, ``(n, m)``, at least one row.
    """
    span = np.ptp(values, axis=0)
    # Where a scale begins changes no order of the sums.
    scaled = values / np.where(span > 0, span, 1.0)
    return int(np.argmin(scaled.sum(axis=1)))
