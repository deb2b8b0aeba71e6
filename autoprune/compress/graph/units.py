"""Units: what can be removed from a network, as equivalence classes of numbers. Arrays only.

Every index along every dimension of every tensor *needs* a set of units: it stays in the network as long as all of
them do. A dimension of size ``n`` is an array ``(n, columns)`` of units; the columns of one row are its set. Unit 0
is always there, so it stands for no condition.

Reshapes make sets of more than one unit: where 768 channels become 12 heads of 64, what is left has to be a rectangle
of heads by places, so that channel ``(h, d)`` needs head ``h`` and place ``d``. The channel's own unit is then
*defined* by those two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Dim = NDArray[np.int64]

ALWAYS = 0
# Divisions of divisions; networks have two or three.
_DEEPEST = 8


class Units:
    """A growing set of units, which of them are one, and which can never be removed."""

    def __init__(self) -> None:
        self._parent: Ids = np.zeros(1024, dtype=np.int64)
        self._count = 1
        # By representative: what a unit is made of, and why it cannot be removed.
        self._parts: dict[int, tuple[int, ...]] = {}
        self._reasons: dict[int, str] = {ALWAYS: "always there"}

    @property
    def count(self) -> int:
        """How many units there are."""
        return self._count

    def new(self, count: int) -> Ids:
        """Return ``count`` units that were not there before."""
        first, self._count = self._count, self._count + count
        while self._count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros_like(self._parent)])
        made = np.arange(first, self._count)
        self._parent[first : self._count] = made
        return made

    def find(self, ids: Ids) -> Ids:
        """Return the representatives of units, of the same shape."""
        found = self._parent[ids]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                break
            found = above
        self._parent[ids] = found
        return found

    def join(self, first: Ids, second: Ids, why: str) -> None:
        """Make units one, pair by pair; what is joined with :data:`ALWAYS` can never be removed.

        Args:
            first: Units, ``(n,)``.
            second: Units, ``(n,)``.
            why: What ties them, in case it ends with a unit that cannot be removed.
        """
        while True:
            one, two = self.find(first), self.find(second)
            apart = one != two
            if not apart.any():
                return
            low, high = np.minimum(one, two)[apart], np.maximum(one, two)[apart]
            if (low == ALWAYS).any():
                self.fix(high[low == ALWAYS], why)
                keep = low != ALWAYS
                first, second = low[keep], high[keep]
                if not len(first):
                    return
                continue
            # A unit that is joined with several takes the lowest now, and the others in the next round.
            taken, place = np.unique(high, return_index=True)
            self._parent[taken] = low[place]
            for upper, lower in zip(taken.tolist(), low[place].tolist(), strict=True):
                self._inherit(upper, lower, why)

    def _inherit(self, upper: int, lower: int, why: str) -> None:
        reason = self._reasons.pop(upper, None)
        if reason is not None:
            self._reasons.setdefault(lower, reason)
        parts = self._parts.pop(upper, None)
        if parts is None:
            parts_below = self._parts.get(lower)
            if parts_below is not None and lower in self._reasons:
                self.fix(np.array(parts_below), self._reasons[lower])
            return
        if lower not in self._parts:
            self._parts[lower] = parts
        elif len(self._parts[lower]) == len(parts):
            self.join(np.array(self._parts[lower]), np.array(parts), why)
        else:
            self.fix(np.array([*self._parts[lower], *parts]), f"two shapes of one dimension meet at {why}")
        if lower in self._reasons:
            self.fix(np.array(self._parts[lower]), self._reasons[lower])

    def fix(self, ids: Ids, why: str) -> None:
        """Note that units can never be removed.

        Args:
            ids: Units, of any shape.
            why: The first reason that is given for a unit stays.
        """
        for root in np.unique(self.find(ids)).tolist():
            if root == ALWAYS or root in self._reasons:
                continue
            self._reasons[root] = why
            parts = self._parts.get(root)
            if parts is not None:
                self.fix(np.array(parts), why)

    def define(self, ids: Ids, parts: Ids, why: str) -> None:
        """Note that units are there exactly if all of their parts are.

        Args:
            ids: Units without parts, ``(n,)``; one that occurs twice joins the parts.
            parts: Units, ``(n, parts)``.
            why: What divides them.
        """
        roots = self.find(ids)
        distinct, place, which = np.unique(roots, return_index=True, return_inverse=True)
        first = parts[place]
        self.join(first[which].ravel(), parts.ravel(), why)
        for root, own in zip(distinct.tolist(), first.tolist(), strict=True):
            if root == ALWAYS:
                self.fix(np.array(own), why)
                continue
            if root in self._reasons:
                self.fix(np.array(own), self._reasons[root])
            self._parts[root] = tuple(own)

    def reason(self, unit: int) -> str:
        """Return why a unit cannot be removed; empty if nothing was found against it."""
        return self._reasons.get(int(self.find(np.array([unit]))[0]), "")

    def resolved(self, dim: Dim) -> Dim:
        """Return a dimension in representatives, defined units replaced by their parts, empty columns left out."""
        columns = [self.find(column) for column in dim.T]
        for _ in range(_DEEPEST):
            split = [self._split(column) for column in columns]
            columns = [column for each in split for column in each]
            if all(len(each) == 1 for each in split):
                break
        else:  # something is made of itself
            self.fix(np.concatenate(columns), "its dimensions are divided without end")
            return fixed(len(dim))
        kept: list[Ids] = []
        for column in columns:
            if column.any() and not any(np.array_equal(column, other) for other in kept):
                kept.append(column)
        return np.stack(kept, axis=1) if kept else np.zeros((len(dim), 0), dtype=np.int64)

    def _split(self, column: Ids) -> list[Ids]:
        """Return the columns that take the place of one in which some units have parts."""
        distinct, which = np.unique(column, return_inverse=True)
        parts = [self._parts.get(root) for root in distinct.tolist()]
        width = max((len(p) for p in parts if p is not None), default=1)
        if width == 1 and all(p is None for p in parts):
            return [column]
        table = np.zeros((len(distinct), max(2, width)), dtype=np.int64)
        for row, (root, own) in enumerate(zip(distinct.tolist(), parts, strict=True)):
            values = (root,) if own is None else own
            table[row, : len(values)] = self.find(np.array(values))
        return list(table[which].T)


def fixed(size: int) -> Dim:
    """Return a dimension of which every index is always there."""
    return np.zeros((size, 0), dtype=np.int64)


def flat(ids: Ids) -> Dim:
    """Return a dimension of which each index needs one unit."""
    return ids[:, None]


def merged(dims: Sequence[Dim]) -> Dim:
    """Return the dimension that several become when they are flattened into one, the last one fastest."""
    sizes = [len(dim) for dim in dims]
    total = int(np.prod(sizes)) if sizes else 1
    columns = []
    for place, dim in enumerate(dims):
        if dim.shape[1]:
            inner = int(np.prod(sizes[place + 1 :]))
            outer = int(np.prod(sizes[:place]))
            columns.append(np.tile(np.repeat(dim, inner, axis=0), (outer, 1)))
    return np.concatenate(columns, axis=1) if columns else fixed(total)
