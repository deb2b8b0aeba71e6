"""The database goes away and comes back: the driver waits, and nothing is lost or doubled."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

import psycopg
import pytest
import sqlalchemy

from autoprune.errors import StorageError
from autoprune.space.recipe import uniform_recipe
from autoprune.study.decode import Plan
from autoprune.study.store import StudyStore
from tests.study.made import GROUPS, add, make_measurement, open_for_writing
from tests.study.postgres import Postgres

RECIPE = uniform_recipe(GROUPS, 0.5, 8)


@pytest.fixture
def store(database: str, monkeypatch: pytest.MonkeyPatch) -> StudyStore:
    monkeypatch.setenv("AUTOPRUNE_STORAGE", database)
    return open_for_writing("study")


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_driver_waits_while_the_server_restarts(store: StudyStore, postgres: Postgres, mode: str) -> None:
    ended = threading.Event()

    def restart() -> None:
        for _ in range(2):
            time.sleep(0.3)
            postgres.stop(mode)
            time.sleep(0.3)
            postgres.start()
        ended.set()

    thread = threading.Thread(target=restart)
    thread.start()
    acknowledged = [add(store, 0.5)]
    while not ended.is_set():
        acknowledged.append(add(store, 0.5))
        store.set_spent(float(len(acknowledged)))
        assert len(store.records()) == len(acknowledged)
    thread.join()
    acknowledged.append(add(store, 0.5))
    records = StudyStore.open("study").records()
    assert acknowledged == list(range(len(acknowledged)))
    assert [r.number for r in records] == acknowledged
    assert {r.state for r in records} == {"complete"}
    store.release()


def losing(store: StudyStore, monkeypatch: pytest.MonkeyPatch, nth: int, *, landed: bool) -> None:
    """Let the acknowledgement of the ``nth`` commit from now be lost."""
    dialect: Any = store._storage.engine.dialect
    commit, seen = dialect.do_commit, count()

    def cut(link: Any) -> None:
        if threading.current_thread() is not threading.main_thread() or next(seen) != nth:
            commit(link)
            return
        if landed:
            commit(link)
        link.driver_connection.close()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(dialect, "do_commit", cut)


@pytest.mark.parametrize("landed", [True, False])
def test_a_write_whose_acknowledgement_was_lost_is_done_once(
    store: StudyStore, monkeypatch: pytest.MonkeyPatch, landed: bool
) -> None:
    add(store, 0.1)
    parent = store.record(0)
    measured = make_measurement(RECIPE, GROUPS, report=True)
    made: dict[str, Any] = {}

    def begin() -> None:
        made["trial"].suggest_int("x", 0, 3)
        store.begin(made["trial"], Plan(RECIPE, "tpe"))

    steps: list[Callable[[], Any]] = [
        lambda: made.update(trial=store.ask({"x": 2})),
        begin,
        lambda: store.complete(made["trial"], measured, train_steps=0, duration_s=1.0),
        lambda: made.update(trial=store.ask()),
        lambda: store.fail(made["trial"], "nan", "no number", duration_s=1.0),
        lambda: store.add_final(parent, measured, recipe=RECIPE, train_steps=1, duration_s=1.0, label="x"),
        lambda: store.note("key", "value"),
        lambda: store.end_round(5.0, "1h"),
    ]
    for nth in range(4):  # no step has more commits
        for step in steps:
            with monkeypatch.context() as patch:
                losing(store, patch, nth, landed=landed)
                step()
    records = StudyStore.open("study").records()
    assert [r.number for r in records] == list(range(1 + 3 * 4))
    assert Counter((r.state, r.fidelity) for r in records) == {
        ("complete", "search"): 1 + 4, ("failed", "search"): 4, ("complete", "final"): 4,
    }  # fmt: skip
    found = store._study.get_trials()
    assert [trial.params for trial in found] == [{}, *[{"x": 2}, {}, {}] * 4]
    assert (store.notes(), store.ended_rounds_s) == ({"key": "value"}, [5.0] * 4)
    store.release()


def test_a_server_that_stays_away_ends_the_search_with_a_message(
    store: StudyStore, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, 0.5)
    monkeypatch.setattr(store._storage, "patience_s", 0.3)
    postgres.stop()
    try:
        with pytest.raises(StorageError, match="run the same command again; finished trials are kept"):
            store.note("key", "value")
    finally:
        postgres.start()
    add(store, 0.5)
    assert len(store.records()) == 2
    store.release()


def test_a_locked_file_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOPRUNE_STORAGE", raising=False)
    store = open_for_writing("locked")
    store._storage.engine.dispose()
    # Far less than it takes, so that SQLite itself gives up at once.
    sqlalchemy.event.listen(
        store._storage.engine, "connect", lambda link, _: link.execute("PRAGMA busy_timeout=1")
    )
    other = sqlalchemy.create_engine(f"sqlite:///{store.paths.database}")
    with other.connect() as link:
        link.exec_driver_sql("BEGIN IMMEDIATE")
        begun_s = time.monotonic()
        released = threading.Event()

        def add_one() -> None:
            add(store, 0.5)
            released.set()

        thread = threading.Thread(target=add_one)
        thread.start()
        assert not released.wait(0.5)
        link.rollback()
    thread.join()
    assert released.is_set() and time.monotonic() - begun_s >= 0.5
    assert [r.state for r in store.records()] == ["complete"]
    store.release()


def test_readers_leave_no_connection_open(store: StudyStore, postgres: Postgres, database: str) -> None:
    add(store, 0.5)

    def connections() -> int:
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'autoprune'"
        return int(postgres.sql(query, database))

    before = connections()
    readers = [StudyStore.open("study") for _ in range(8)]
    assert [len(reader.records()) for reader in readers] == [1] * 8
    assert all(reader.notes() == {} and reader.phase == "search" for reader in readers)
    assert connections() == before
    store.release()
