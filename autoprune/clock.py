"""The one clock. Budgets and durations read the monotonic time, records the wall time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Source of time; injected so that an 8 hour search runs in a test in a second."""

    def monotonic(self) -> float:
        """Return seconds from an arbitrary origin; never jumps."""
        ...

    def wall(self) -> float:
        """Return seconds since the epoch; may jump, so it is only ever recorded."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        """Return seconds from an arbitrary origin; never jumps."""
        return time.monotonic()

    def wall(self) -> float:
        """Return seconds since the epoch; may jump, so it is only ever recorded."""
        return time.time()


class FakeClock:
    """A clock that moves only when told to; for tests.

    Args:
        start_s: First reading of both clocks, in seconds.
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self.now_s = start_s

    def monotonic(self) -> float:
        """Return the time set so far."""
        return self.now_s

    def wall(self) -> float:
        """Return the time set so far."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Move both clocks forward by ``seconds``."""
        self.now_s += seconds
