"""The SQLite file of a study: damaged, cut, or left behind by a run that was killed while it made it."""

from __future__ import annotations

import pytest

from autoprune.errors import StorageError
from autoprune.naming import StudyPaths
from autoprune.study.listing import list_studies
from autoprune.study.store import StudyStore
from tests.study.made import add, open_for_writing


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 100])
def test_a_damaged_database_is_named(content: bytes) -> None:
    open_for_writing("damaged").release()
    paths = StudyPaths.of("damaged")
    for extra in ("-wal", "-shm"):
        paths.database.with_name(paths.database.name + extra).unlink(missing_ok=True)
    paths.database.write_bytes(content)
    with pytest.raises(StorageError, match=r"study\.db"):
        StudyStore.open("damaged").records()
    assert list_studies()[0]["phase"].startswith("unreadable")


def test_a_truncated_database_is_named_or_whole() -> None:
    store = open_for_writing("cut")
    for ratio in (0.2, 0.4, 0.6):
        add(store, ratio)
    store.release()
    paths = StudyPaths.of("cut")
    raw = paths.database.read_bytes()
    for extra in ("-wal", "-shm"):
        paths.database.with_name(paths.database.name + extra).unlink(missing_ok=True)
    paths.database.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(StorageError):
        open_for_writing("cut")
