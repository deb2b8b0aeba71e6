"""Promotion: which results of one rung go on to the next. Arrays only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoprune.study.pareto import Array, non_dominated

# Losses below this share of where the volume ends are alike: no test set tells them apart.
_LEAST_LOST = 0.03
# A row that another one beats in loss by less than this factor may still be chosen.
_NEAR_FRONT = 1.15
# What a network that starts a line of its own counts as: it will lose more, having less training behind it.
_ALONE = 1.3
# A trained candidate covers a part of an axis if its price is within this factor of the best.
_AS_GOOD = 1.1
# What a row at the end of a part counts as against one in its middle, so that parts are covered evenly.
_AT_EDGE = 1.25
# Bounds of a front's elasticity: by how much the logarithm of the loss grows as that of the cost falls.
_ELASTICITY = (1.0, 6.0)


def are_hopeless(hopeful: Array, trained: Array) -> NDArray[np.bool_]:
    """Return whether a trained network beats what a candidate may at best come to, so that training it is wasted.

    Args:
        hopeful: Least capability that each candidate may lose, its size and its latency, ``(m, 3)``.
        trained: The same of trained networks, of the rung that the candidates would reach, ``(n, 3)``.

    Returns:
        ``(m,)``.
    """
    beaten: NDArray[np.bool_] = np.all(trained[None] <= hopeful[:, None], axis=2)
    found: NDArray[np.bool_] = np.any(beaten, axis=1)
    return found


def cover(
    values: Array, parts: int, *, by_loss: bool = True, nested: NDArray[np.bool_] | None = None
) -> list[int]:
    """Choose rows so that every axis of costs is covered from the mildest to the deepest.

    Whoever has a limit on one cost alone asks for the best capability at that cost, whatever the others are. So each
    axis has its own front, of capability lost against that cost, which is cut into parts; each part gives one row.

    Args:
        values: Capability lost as a share of where the volume ends, and costs, positive, ``(n, 1 + axes)``.
        parts: Parts of each axis.
        by_loss: Whether parts are equal in the logarithms of what is lost (for who gives half a point, one, two, four)
            and of the cost together, for losses that can be trusted; a part then gives the row that loses least for its
            cost, measured along the front. Else parts are equal in the logarithm of the cost, and a part gives the row
            in its middle.
        nested: ``nested[i, j]`` where row ``i`` cuts row ``j`` further and can be trained from there. Such a row
            is taken before one that stands alone and is a little better.

    Returns:
        Different rows; the first parts of all axes come first.
    """
    chosen: list[list[int]] = []
    for axis in range(1, values.shape[1]):
        own: list[int] = []
        front = _front(values, axis, slack=_NEAR_FRONT if by_loss else 1.0)
        part, off_middle = _parts(values, front, axis, parts, by_loss=by_loss)
        price = _prices(values, axis, front) * _AT_EDGE ** (2 * off_middle)
        for number in range(parts):
            rows = [int(row) for row in front if part[row] == number]
            if rows and by_loss:
                own.append(_cheapest(price, rows, own, nested))
            elif rows:
                places = np.log(values[rows, axis])
                own.append(rows[int(np.abs(places - (places.min() + places.max()) / 2).argmin())])
        chosen.append(own)
    in_turn = [own[place] for place in range(parts) for own in chosen if place < len(own)]
    return list(dict.fromkeys(in_turn))


def uncovered(values: Array, trained: Sequence[bool], parts: int) -> int | None:
    """Return a candidate from a part of an axis of costs where nothing as good was trained; None if there is none.

    Args:
        values: Capability lost and costs, as shares of where the volume ends, ``(n, 1 + axes)``.
        trained: Whether each went on before.
        parts: Parts of each axis, by what is lost and the cost; see :func:`cover`.
    """
    known = np.array(trained, dtype=bool)
    useful = (values < 1.0).all(axis=1) & (values[:, 0] > 0)
    if useful.sum() < 2:
        return None
    for axis in range(1, values.shape[1]):
        front = np.flatnonzero(useful)[_front(values[useful], axis)]
        part, _ = _parts(values, front, axis, parts, by_loss=True)
        price = _prices(values, axis, front)
        for number in range(parts):
            rows = front[part[front] == number]
            if not len(rows):
                continue
            best = rows[price[rows].argmin()]
            if not (known & (part == number) & (price <= _AS_GOOD * price[best])).any():
                return int(best)
    return None


def _cheapest(prices: Array, rows: list[int], line: list[int], nested: NDArray[np.bool_] | None) -> int:
    """Return the row with the least price; one that no row of the line leads to counts as worse."""

    def price(row: int) -> float:
        alone = nested is not None and bool(line) and not nested[row, line].any()
        return float(prices[row] * (_ALONE if alone else 1.0))

    return min(rows, key=price)


def _prices(values: Array, axis: int, front: NDArray[np.intp]) -> Array:
    """Return what each row loses for its cost, such that all along a front of even elasticity it is the same.

    The plain product of loss and cost falls towards the mild end, where a little more cost saves most of the loss.
    """
    lost, cost = _logarithms(values, axis)
    elasticity = _ELASTICITY[0]
    if len(front) > 2 and np.ptp(cost[front]) > 0:
        elasticity = float(np.clip(-np.polyfit(cost[front], lost[front], 1)[0], *_ELASTICITY))
    prices: Array = np.exp(lost + elasticity * cost)
    return prices


def _logarithms(values: Array, axis: int) -> tuple[Array, Array]:
    """Return the logarithms of what each row loses, as far as it can be told, and of its cost."""
    return np.log(np.maximum(values[:, 0], _LEAST_LOST)), np.log(np.maximum(values[:, axis], 1e-9))


def _front(values: Array, axis: int, slack: float = 1.0) -> NDArray[np.intp]:
    """Return the rows of the front of capability lost against one cost, ordered by cost.

    With a ``slack`` above 1 it takes in what only rows beat that lose less by that factor.
    """
    if slack > 1.0:
        lost, cost = values[:, 0], values[:, axis]
        beaten = (lost[None] <= lost[:, None] / slack) & (cost[None] <= cost[:, None])
        front = np.flatnonzero(~beaten.any(axis=1))
    else:
        front = np.flatnonzero(non_dominated(values[:, [0, axis]]))
    return front[np.argsort(values[front, axis], kind="stable")]


def _parts(
    values: Array, front: NDArray[np.intp], axis: int, parts: int, *, by_loss: bool
) -> tuple[NDArray[np.int64], Array]:
    """Return the part of an axis that each row lies in, 0 for the mildest, and how far from its middle.

    The front spans all parts; from the middle of a part to its end it is 0.5.
    """
    lost, cost = _logarithms(values, axis)
    along = lost - cost if by_loss else -cost
    if not len(front):
        return np.zeros(len(values), dtype=np.int64), np.zeros(len(values))
    low, high = along[front].min(), along[front].max()
    place = (along - low) / max(high - low, 1e-9) * parts
    part: NDArray[np.int64] = np.floor(place).astype(np.int64)
    # The deepest of the front belongs to the last part; what lies beyond the front's ends to none.
    part[np.isclose(along, high)] = parts - 1
    return part, np.clip(np.abs(place - part - 0.5), 0.0, 0.5)
