"""How dimensions are tied, merged and divided. Arrays only."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from autoprune.compress.graph.units import ALWAYS, Dim, Ids, Units, fixed, merged


def tie(units: Units, first: Dim, second: Dim, why: str) -> None:
    """Demand that two dimensions of one size lose the same indices.

    Args:
        units: All units.
        first: ``(n, columns)``.
        second: ``(n, columns)``.
        why: What ties them.
    """
    one, two = units.resolved(first), units.resolved(second)
    patterns = [_pattern(column) for column in two.T]
    free = list(range(len(patterns)))
    alone: list[Ids] = []
    for column in one.T:
        own = _pattern(column)
        hit = next((place for place in free if np.array_equal(patterns[place], own)), None)
        if hit is None:
            alone.append(column)
        else:
            units.join(column, two[:, hit], why)
            free.remove(hit)
    others = [two[:, place] for place in free]
    nothing = np.zeros(len(first), dtype=np.int64)
    if len(alone) <= 1 and len(others) <= 1:
        units.join(alone[0] if alone else nothing, others[0] if others else nothing, why)
    elif len(alone) == 1:
        units.define(alone[0], np.stack(others, axis=1), why)
    elif len(others) == 1:
        units.define(others[0], np.stack(alone, axis=1), why)
    else:
        units.fix(np.stack([*alone, *others]), f"it is tied at {why} in a way that is not followed")


def _pattern(column: Ids) -> Ids:
    """Return which places of a column are alike, as numbers in the order in which they come first."""
    _, first, which = np.unique(column, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))
    found: Ids = order[which]
    # What is always there is no unit like others.
    return np.where(column == ALWAYS, -1, found)


def divided(units: Units, dim: Dim, shape: Sequence[int], why: str) -> list[Dim]:
    """Return the dimensions that one is divided into, the last one fastest.

    A column that differs along one of the new dimensions alone belongs to that one. One that differs along several is
    made of new units, one for each place along each, because what is left has to be a rectangle.

    Args:
        units: All units.
        dim: ``(n, columns)``.
        shape: Sizes whose product is ``n``.
        why: What divides it.
    """
    resolved = units.resolved(dim)
    columns: list[list[Ids]] = [[] for _ in shape]
    for column in resolved.T:
        grid = column.reshape(*shape)
        varies = [axis for axis in range(len(shape)) if not (grid == np.take(grid, [0], axis=axis)).all()]
        if len(varies) > 1:
            made = [units.new(shape[axis]) for axis in varies]
            places = np.indices(shape)
            parts = [own[places[axis].ravel()] for own, axis in zip(made, varies, strict=True)]
            units.define(column, np.stack(parts, axis=1), why)
            for own, axis in zip(made, varies, strict=True):
                columns[axis].append(own)
        else:
            axis = varies[0] if varies else next((a for a, size in enumerate(shape) if size > 1), 0)
            index = [0] * len(shape)
            line = np.moveaxis(grid, axis, 0)[(slice(None), *index[1:])]
            columns[axis].append(np.ascontiguousarray(line))
    return [np.stack(own, axis=1) if own else fixed(size) for own, size in zip(columns, shape, strict=True)]


def reshaped(units: Units, dims: Sequence[Dim], shape: Sequence[int], why: str) -> list[Dim]:
    """Return the dimensions of a tensor that is seen with another shape.

    Args:
        units: All units.
        dims: Those before.
        shape: Sizes after, of the same product.
        why: Name of the operation.
    """
    before = [len(dim) for dim in dims]
    found: list[Dim] = []
    left = right = 0
    while left < len(before) or right < len(shape):
        start, begin = left, right
        here = there = 1
        while True:
            if here == there and (left > start or right > begin):
                break
            if here <= there and left < len(before):
                here *= before[left]
                left += 1
            else:
                there *= shape[right]
                right += 1
        old, new = list(dims[start:left]), list(shape[begin:right])
        if not new:
            if old and any(dim.shape[1] for dim in old):
                units.fix(np.concatenate([dim.ravel() for dim in old]), why)
        elif len(old) == 1 and len(new) == 1:
            found.append(old[0])
        else:
            whole = merged(old) if old else fixed(prod(new))
            found.extend(divided(units, whole, new, why) if len(new) > 1 else [whole])
    return found


def broadcast(units: Units, tensors: Sequence[Sequence[Dim]], why: str) -> list[Dim]:
    """Tie tensors that are combined place by place and return the dimensions of the outcome."""
    rank = max((len(dims) for dims in tensors), default=0)
    found: list[Dim] = []
    for place in range(rank):
        here = [dims[place - rank + len(dims)] for dims in tensors if place - rank + len(dims) >= 0]
        size = max(len(dim) for dim in here)
        full = [dim for dim in here if len(dim) == size]
        for other in full[1:]:
            tie(units, full[0], other, why)
        if size > 1:
            for dim in here:
                if len(dim) == 1 and dim.shape[1]:
                    units.fix(dim, f"{why} spreads it")
        found.append(full[0])
    return found
