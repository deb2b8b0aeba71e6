"""Disjoint sets."""

from __future__ import annotations

from typing import Any


class UnionFind:
    """Disjoint sets of hashable items."""

    def __init__(self) -> None:
        self._parent: dict[Any, Any] = {}

    def find(self, item: Any) -> Any:
        """Return the representative of the item's set, adding the item if it is new."""
        root = self._parent.setdefault(item, item)
        while root != self._parent[root]:
            root = self._parent[root]
        while item != root:
            self._parent[item], item = root, self._parent[item]
        return root

    def union(self, first: Any, second: Any) -> None:
        """Join the sets of two items."""
        self._parent[self.find(second)] = self.find(first)
