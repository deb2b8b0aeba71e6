"""The trials of a study as records: each finished one read and checked once."""

from __future__ import annotations

import gc
import threading
from bisect import bisect_left
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from autoprune.study import decode
from autoprune.study.record_storage import RecordStorage
from autoprune.study.records import TrialRecord
from autoprune.study.rows import Row, count_trials, read_rows

_MANY = 1000


class TrialLog:
    """Reads the trials of one study.

    Args:
        storage: Its database.
        study_id: Its number there.
    """

    def __init__(self, storage: RecordStorage, study_id: int) -> None:
        self._storage = storage
        self._study_id = study_id
        self._found: list[TrialRecord] = []
        self._running: dict[int, int] = {}  # places in the list by the trial's id
        self._newest = -1
        self._ids: list[int] = []

    def rows(self) -> list[Row]:
        """Return all trials as they lie in the database."""
        return self._read(-1, (), ())

    def count(self) -> int:
        """Return how many trials there are."""

        def count() -> int:
            with self._storage.engine.connect() as link:
                return count_trials(link, self._study_id)

        return self._storage.patiently(count)

    def records(self) -> list[TrialRecord]:
        """Return every trial in the order of its number."""
        known = {each for each, place in self._running.items() if self._found[place].recipe is not None}
        self._take(self._read(self._newest, tuple(self._running), known))
        if self._found and self._found[-1].number != len(self._found) - 1:
            # A trial was seen before one of a smaller number was committed, as no single driver writes them.
            self._found, self._running, self._newest, self._ids = [], {}, -1, []
            self._take(self.rows())
        return list(self._found)

    def id_of(self, number: int) -> int:
        """Return the number in the database of a trial that was read; -1 before the first."""
        return self._ids[number] if number >= 0 else -1

    def last_id(self) -> int:
        """Return the largest number in the database of a trial that was read; -1 before the first."""
        return self._newest

    def numbers_of(self, ids: Collection[int]) -> set[int]:
        """Return the numbers of trials that were read by their numbers in the database."""
        places = ((bisect_left(self._ids, each), each) for each in ids)
        return {place for place, each in places if place < len(self._ids) and self._ids[place] == each}

    def _take(self, rows: list[Row]) -> None:
        with _uncollected(len(rows)):
            records = [decode.record(row.number, row.state, row.attributes) for row in rows]
        for row, record in zip(rows, records, strict=True):
            place = self._running.pop(row.id, len(self._found))
            self._found[place : place + 1] = [record]
            self._ids[place : place + 1] = [row.id]
            if record.state == "running":
                self._running[row.id] = place
            self._newest = max(self._newest, row.id)

    def _read(self, above: int, also: tuple[int, ...], known: Collection[int]) -> list[Row]:
        def read() -> list[Row]:
            with self._storage.engine.connect() as link:
                return read_rows(link, self._study_id, above=above, also=also, known=known)

        return self._storage.patiently(read)


class _Uncollected:
    """Makes no search for garbage meanwhile, and none among so many records later: each takes as long as reading them.

    Records live as long as their study is open, and hold no cycles. Several threads may read at once: the first to
    begin finds what the last to end brings back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._was = False

    @contextmanager
    def __call__(self, trials: int) -> Iterator[None]:
        """Read so many trials in the block."""
        with self._lock:
            if self._readers == 0:
                self._was = gc.isenabled()
                gc.disable()
            self._readers += 1
        try:
            yield
        finally:
            if trials >= _MANY:
                gc.freeze()
            with self._lock:
                self._readers -= 1
                if self._readers == 0 and self._was:
                    gc.enable()


_uncollected = _Uncollected()
