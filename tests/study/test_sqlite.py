"""The SQLite file of a study: damaged, cut, or left behind by a run that was killed while it made it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from autoprune.errors import StorageError, UsageError
from autoprune.naming import StudyPaths, studies_root
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


def test_a_truncated_database_is_set_aside_for_its_copy_and_refused_without_one() -> None:
    store = open_for_writing("cut")
    for ratio in (0.2, 0.4, 0.6):
        add(store, ratio)
    before = store.records()
    store.release()
    paths = StudyPaths.of("cut")
    half = paths.database.read_bytes()[: paths.database.stat().st_size // 2]
    paths.database.write_bytes(half)
    with pytest.raises(StorageError, match="study.db"):
        StudyStore.open("cut")
    store = open_for_writing("cut")
    assert store.records() == before
    assert paths.database.with_name("study.db.damaged-1").read_bytes() == half
    store.release()
    paths.database.write_bytes(half)
    paths.database_copy.unlink()
    with pytest.raises(StorageError, match="study.db"):
        open_for_writing("cut")
    assert paths.database.read_bytes() == half


_MAKE = """
import os, signal, sys
import sqlalchemy
from tests.study.made import open_for_writing
left = int(sys.argv[1])

def count(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", count)
open_for_writing("made")
print("made")
"""


def test_a_run_that_is_killed_while_it_makes_the_file_leaves_none(repository: Path) -> None:
    environment = {**os.environ, "AUTOPRUNE_STUDIES": str(studies_root())}
    for statement in (3, 70):
        done = subprocess.run(
            [sys.executable, "-c", _MAKE, str(statement)], cwd=repository, env=environment, check=False
        )
        assert done.returncode == -signal.SIGKILL
        assert not StudyPaths.of("made").database.exists(), "it gets its name when it is whole"
        assert list_studies() == []
        with pytest.raises(UsageError, match="unknown study"):
            StudyStore.open("made")
    store = open_for_writing("made")
    assert [path.name for path in store.paths.root.glob(".study.db*")] == []
    add(store, 0.5)
    store.release()
    assert len(StudyStore.open("made").records()) == 1


def test_a_file_without_tables_of_an_earlier_version_is_told_and_mended() -> None:
    open_for_writing("bare").release()
    paths = StudyPaths.of("bare")
    for path in paths.root.glob("study.db*"):
        path.unlink()
    sqlite3.connect(paths.database).execute("PRAGMA journal_mode=WAL").connection.close()
    with pytest.raises(StorageError, match=r"has no tables.*\n.*run the same search again"):
        StudyStore.open("bare")
    store = open_for_writing("bare")
    add(store, 0.5)
    store.release()
    assert len(StudyStore.open("bare").records()) == 1
