"""A clock for studies of many workers: real while the driver decides, and skipped while all that runs are trials."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from autoprune.search.lanes import Lanes


class Clockwork:
    """The machine's clock, less the time in which every worker sleeps and nothing is left to decide.

    What the driver takes for its decisions and its records, and what it is kept from by its own threads, counts in full.
    """

    def __init__(self) -> None:
        self.skipped_s = 0.0
        self._sleepers: dict[threading.Event, float] = {}
        self._changed = threading.Condition()
        self._lanes: Lanes | None = None

    def monotonic(self) -> float:
        """Return seconds, the skipped ones included."""
        return time.monotonic() + self.skipped_s

    def wall(self) -> float:
        """Return seconds since the epoch, the skipped ones included."""
        return time.time() + self.skipped_s

    def sleep(self, seconds: float) -> None:
        """Return after so many seconds of this clock."""
        if self._lanes is None:  # nobody else does anything
            self.skipped_s += seconds
            return
        awake = threading.Event()
        with self._changed:
            self._sleepers[awake] = self.monotonic() + seconds
            self._changed.notify()
        awake.wait()

    @contextmanager
    def driving(self, lanes: Lanes) -> Iterator[None]:
        """Wake sleepers for the length of the block."""
        if lanes.count == 1:
            yield
            return
        self._lanes = lanes
        over = threading.Event()
        thread = threading.Thread(target=self._drive, args=(lanes, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._lanes = None

    def _drive(self, lanes: Lanes, over: threading.Event) -> None:
        while not over.is_set():
            self._wake()
            # Who holds the baton decides; with it nobody does. A lane that was woken and waits for it is busy, and no
            # sleeper any more.
            with lanes._baton, self._changed:
                if self._sleepers and len(self._sleepers) == lanes._busy and _at_rest(lanes):
                    self.skipped_s += max(0.0, min(self._sleepers.values()) - self.monotonic())
                    continue
            with self._changed:
                self._changed.wait(self._pause_s())

    def _wake(self) -> None:
        with self._changed:
            now_s = self.monotonic()
            for awake in [awake for awake, at_s in self._sleepers.items() if at_s <= now_s]:
                del self._sleepers[awake]
                awake.set()

    def _pause_s(self) -> float:
        next_s = min(self._sleepers.values(), default=float("inf")) - self.monotonic()
        return min(0.02, max(0.0, next_s))


def _at_rest(lanes: Lanes) -> bool:
    """Return whether no lane has anything to decide: all wait for workers, or for what others decide."""
    left = sum(thread.name.startswith("lane-") for thread in threading.enumerate())
    return lanes._busy + len(lanes._baton._waiters) == left  # type: ignore[attr-defined]
