"""Ctrl-C: once ends the search in order, twice at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Remembers whether the user, or the system, asked the search to end.

    Attributes:
        requested: Whether the search should end after tidying up.
    """

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        """Return whether the search should end."""
        return self.requested

    @contextmanager
    def listening(self) -> Iterator[Interrupt]:
        """Catch SIGINT and SIGTERM for the length of the block.

        The first signal sets :attr:`requested`; the second raises ``KeyboardInterrupt`` where the program
        stands. Outside the main thread, where Python has no signal handlers, nothing is caught.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
