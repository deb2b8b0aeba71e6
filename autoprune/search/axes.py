"""Axes: where each axis of the volume ends, and the volumes that results have. Arrays only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoprune.search.volume import Array, Volume, counted_axes

# Where the volume ends as a multiple of a hard cap, and the value of what exceeds the cap.
_BEYOND_CAP = 1.25
_OUTSIDE = 2.0
# A cost beyond the dense network's counts as just below it: smaller but slower is still smaller, and the predicted
# latencies of small networks may all be too high.
_MOST_COST = 0.999


class Axes:
    """The volumes of results over all objectives and, with several costs, over each cost alone.

    Whoever has a limit on one cost asks for the best capability at that cost, whatever the others are. The volume over
    all costs hardly grows by such a network once there are others that are small in everything.

    Args:
        ends: Where the volume ends on each axis: capability lost at this fidelity, size share, latency share. A cap
            that the user gave is the end of its axis.
        objectives: Objectives of the study.
        capped_loss: Whether the user capped the capability that may be lost.
    """

    def __init__(self, ends: Array, objectives: Sequence[str], *, capped_loss: bool = False) -> None:
        self.ends = ends
        self.capped_loss = capped_loss
        self.counts = counted_axes(objectives)
        single = [np.eye(3)[0] + np.eye(3)[axis] for axis in (1, 2) if self.counts[axis]]
        self._masks = [self.counts, *single] if len(single) > 1 else [self.counts]
        self._volumes = self._of(np.empty((0, 3)))

    def take(self, results: Array) -> None:
        """Measure the volumes of ``results``, ``(n, 3)``, unscaled."""
        self._volumes = self._of(results)

    @property
    def total(self) -> float:
        """The added volumes."""
        return sum(volume.total for volume in self._volumes)

    def total_of(self, results: Array) -> float:
        """Return the added volumes of other results, ``(n, 3)``, unscaled."""
        return sum(volume.total for volume in self._of(results))

    def gains(self, scaled: Array, results: Array | None = None) -> Array:
        """Return what each candidate alone would add to the volumes, ``(m,)``.

        Args:
            scaled: ``(m, 3)``, see :meth:`scaled`.
            results: Add to the volumes of these, ``(n, 3)``, unscaled; of those that were taken if not given.
        """
        volumes = self._volumes if results is None else self._of(results)
        pairs = zip(volumes, self._masks, strict=True)
        gains: Array = np.sum([volume.gains(_on(scaled, mask)) for volume, mask in pairs], axis=0)
        return gains

    def on_front(self, results: Array) -> NDArray[np.bool_]:
        """Return which of the results, those that were taken, lie on the front of one of the volumes, ``(n,)``."""
        scaled = self.scaled(results)
        found = np.zeros(len(results), dtype=bool)
        for volume, mask in zip(self._volumes, self._masks, strict=True):
            members = {row.tobytes() for row in volume.front}
            found |= np.array([row.tobytes() in members for row in np.clip(_on(scaled, mask), 0.0, None)])
        return found

    def scaled(self, values: Array, lost: float | None = None) -> Array:
        """Return capability lost, size and latency as shares of where the volume ends.

        The volume ends a little beyond a cap, or the best network that just keeps it would have none; what exceeds
        the cap has none. Without a cap, a cost beyond the dense network's leaves a rest of the volume.

        Args:
            values: ``(n, 3)``.
            lost: Where the volume ends in capability lost, for results of another fidelity.
        """
        ends = self.ends if lost is None else np.array([lost, *self.ends[1:]])
        capped = np.array([self.capped_loss, self.ends[1] < 1.0, self.ends[2] < 1.0])
        scaled: Array = values / (ends * np.where(capped, _BEYOND_CAP, 1.0)) * self.counts
        scaled[:, 1:] = np.where((scaled[:, 1:] > 1.0) & ~capped[1:], _MOST_COST, scaled[:, 1:])
        # A cap holds on an axis that is no objective, too.
        scaled[(values > ends) & capped] = _OUTSIDE
        return scaled

    def _of(self, results: Array) -> list[Volume]:
        scaled = self.scaled(results)
        return [Volume(_on(scaled, mask)) for mask in self._masks]


def _on(values: Array, mask: Array) -> Array:
    masked: Array = values * mask
    masked[(values >= _OUTSIDE).any(axis=1)] = _OUTSIDE  # a cap holds whatever axes are looked at
    return masked
