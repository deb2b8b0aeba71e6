"""Lanes: one search whose decisions are made one at a time, while what they decided runs side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# How often the main thread looks whether a signal came, in seconds.
_LOOK_S = 0.2


class Lanes:
    """Runs the steps of a search in several threads, of which only the one that holds the baton decides.

    A step reads and changes the search's state as if it were alone. Where it waits for a worker it gives the baton
    away (:meth:`waiting`), and finds another state when it has it again. With one lane there are no threads, and a
    search is what it would be without this class.

    Args:
        count: Steps that may run side by side.
        interrupted: Returns whether the search is to end; lanes then begin no further step.
    """

    def __init__(self, count: int = 1, interrupted: Callable[[], bool] = lambda: False) -> None:
        self.count = count
        self._interrupted = interrupted
        self._baton = threading.Condition(threading.Lock())
        self._busy = 0
        self._failure: BaseException | None = None
        self._local = threading.local()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let other lanes decide for the length of the block, which waits for something."""
        if not getattr(self._local, "in_lane", False):
            yield
            return
        self._busy += 1
        self._baton.release()
        try:
            yield
        finally:
            self._baton.acquire()
            self._busy -= 1
            self._baton.notify_all()

    def until(self, done: Callable[[], bool]) -> None:
        """Let other lanes decide until ``done``, which looks at what they decide; or until the search is ended."""
        if getattr(self._local, "in_lane", False):
            while not done() and self._failure is None:
                self._baton.wait()

    def run(self, step: Callable[[], bool], stop: Callable[[], object] = lambda: None) -> None:
        """Take steps until none is left and nothing runs any more.

        A step that finds nothing to do is asked again once another lane's result is there.

        Args:
            step: Does one thing; returns whether there may be more to do.
            stop: Called when a step failed or the user ended the search at once: ends what the lanes wait for. May be
                called again.

        Raises:
            BaseException: What the first step that failed raised.
        """
        if self.count == 1:
            while not self._interrupted() and step():
                pass
            return
        self._failure = None
        threads = [
            threading.Thread(target=self._lane, args=(step,), name=f"lane-{n}", daemon=True)
            for n in range(self.count)
        ]
        while True:
            try:
                self._watch(threads, stop)
                break
            except (
                KeyboardInterrupt
            ) as error:  # wherever in there it comes: what runs is ended, and waited for
                self._failure = self._failure or error
        if self._failure is not None:
            raise self._failure

    def _watch(self, threads: list[threading.Thread], stop: Callable[[], object]) -> None:
        """Start the lanes, and return once they are over; what they wait for is ended after a failure."""
        for thread in threads:
            if thread.ident is None:
                thread.start()
        stopped = False
        while any(thread.is_alive() for thread in threads):
            if self._failure is not None and not stopped:
                stop()
                stopped = True
                with self._baton:
                    self._baton.notify_all()
            for thread in threads:
                thread.join(_LOOK_S / self.count)

    def each(self, tasks: Iterator[Callable[[], object]], stop: Callable[[], object] = lambda: None) -> None:
        """Do every task; the iterator decides, when a lane is free, whether there is one more."""

        def step() -> bool:
            task = next(tasks, None)
            if task is None:
                return False
            task()
            return True

        self.run(step, stop)

    def _lane(self, step: Callable[[], bool]) -> None:
        self._local.in_lane = True
        with self._baton:
            try:
                while self._failure is None:
                    if not self._interrupted() and step():
                        continue
                    if self._busy == 0:
                        return
                    self._baton.wait()
            except BaseException as error:
                self._failure = self._failure or error
            finally:
                self._local.in_lane = False
                self._baton.notify_all()
