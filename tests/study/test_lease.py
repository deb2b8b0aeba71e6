"""One driver in a shared database: refused, taken over, and fenced in the transaction of each write."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import event

from autoprune.errors import StorageError
from autoprune.naming import studies_root
from autoprune.space.recipe import uniform_recipe
from autoprune.study.decode import Plan
from autoprune.study.lease import OwnedByAnotherError, Owner, is_dead
from autoprune.study.store import StudyStore
from tests.study.made import GROUPS, add, make_measurement, open_for_writing
from tests.study.postgres import Postgres

RECIPE = uniform_recipe(GROUPS, 0.5, 8)


@pytest.fixture(autouse=True)
def in_postgres(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPRUNE_STORAGE", database)


def expire(postgres: Postgres, database: str) -> None:
    """Let the leases of a database end now, as they do where their drivers are stopped."""
    postgres.sql("UPDATE autoprune_leases SET until = clock_timestamp() - interval '1 second'", database)


def test_a_second_driver_is_told_who_has_it_and_until_when() -> None:
    store = open_for_writing("held")
    with pytest.raises(
        OwnedByAnotherError, match=rf"process {os.getpid()}, which has it until \d\d:\d\d:\d\d .*, \d+ s"
    ):
        open_for_writing("held")
    assert StudyStore.open("held").records() == [], "readers need no lease"
    store.release()
    open_for_writing("held").release()


def test_who_was_stopped_past_its_lease_is_refused_and_writes_nothing(
    postgres: Postgres, database: str
) -> None:
    stopped = open_for_writing("lost")
    trial = stopped.ask()
    stopped.begin(trial, Plan(RECIPE, "tpe"))
    expire(postgres, database)
    other = open_for_writing("lost")
    leases = [store._storage.lease for store in (stopped, other)]
    assert [lease.token for lease in leases if lease is not None] == [1, 2]
    add(other, 0.4)
    before = other.records()
    writes: list[Callable[[], object]] = [
        lambda: stopped.complete(trial, make_measurement(RECIPE, GROUPS), train_steps=0, duration_s=1.0),
        lambda: stopped.fail(trial, "nan", "late", duration_s=1.0),
        lambda: stopped.ask(),
        lambda: stopped.ask({"x": 1}),
        lambda: stopped.note("key", "late"),
        lambda: stopped.set_spent(99.0),
        lambda: stopped.end_round(99.0, "1h"),
        lambda: stopped.add_final(
            before[1], make_measurement(RECIPE, GROUPS, report=True), recipe=RECIPE, train_steps=0, duration_s=1.0,
            label="",
        ),
    ]  # fmt: skip
    for write in writes:
        with pytest.raises(StorageError) as caught:
            write()
        assert (caught.value.message, caught.value.hint) == (
            f"another driver (host {socket.gethostname()}, process {os.getpid()}) took the study 'lost' over: this one "
            "was stopped, or cut off from the database, for longer than its lease of 60 s, and writes nothing more",
            "the other one goes on with all finished trials",
        )
    assert StudyStore.open("lost").records() == before
    assert [(r.state, r.failure_kind) for r in before] == [("failed", "lost"), ("complete", "")]
    assert (other.notes(), other.spent_s, other.phase) == ({}, 0.0, "search")
    stopped.release()
    with pytest.raises(OwnedByAnotherError):
        open_for_writing("lost")


def test_a_lease_is_renewed(postgres: Postgres, database: str) -> None:
    store = open_for_writing("renewed", lease_s=0.6)
    time.sleep(1.5)
    with pytest.raises(OwnedByAnotherError):
        open_for_writing("renewed")
    store.release()


def test_every_transaction_that_writes_proves_the_lease() -> None:
    store = open_for_writing("proved")
    written: list[list[str]] = [[]]
    event.listen(store._storage.engine, "before_cursor_execute", lambda *args: written[-1].append(args[2]))
    event.listen(store._storage.engine, "commit", lambda link: written.append([]))
    trial = store.ask({"x": 1})
    trial.suggest_int("x", 0, 3)
    store.begin(trial, Plan(RECIPE, "tpe"))
    store.complete(trial, make_measurement(RECIPE, GROUPS), train_steps=0, duration_s=1.0)
    store.note("key", "value")
    add(store, 0.3)
    store.end_round(1.0, "1h")
    store.records()
    changing = [
        each for each in written if any(s.startswith(("INSERT", "DELETE")) or "UPDATE " in s for s in each)
    ]
    assert len(changing) >= 9
    for statements in changing:
        assert statements[-1].startswith("UPDATE autoprune_leases SET receipt"), statements
    store.release()


_DRIVER = """
import sys
from tests.study.made import add, open_for_writing
store = open_for_writing("two", lease_s=1.0)
print("mine", flush=True)
while True:
    try:
        print(add(store, 0.5), flush=True)
    except Exception as error:
        print(f"refused {error}", flush=True)
        sys.exit(4)
"""


def start_driver(repository: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _DRIVER],
        stdout=subprocess.PIPE,
        text=True,
        cwd=repository,
        env={**os.environ, "AUTOPRUNE_STUDIES": str(studies_root())},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    return process


def test_a_stopped_process_wakes_to_a_refusal(repository: Path) -> None:
    stopped = start_driver(repository)
    assert stopped.stdout is not None
    try:
        stopped.stdout.readline()
        stopped.send_signal(signal.SIGSTOP)
        with pytest.raises(OwnedByAnotherError, match=f"process {stopped.pid}"):
            open_for_writing("two")
        time.sleep(1.5)
        store = open_for_writing("two")
        taken = len(store.records())
        stopped.send_signal(signal.SIGCONT)
        rest = stopped.communicate(timeout=60)[0].split("\n")
    finally:
        stopped.kill()
    assert stopped.returncode == 4
    assert any("took the study 'two' over" in line for line in rest)
    assert len(store.records()) == taken
    assert all(r.state != "running" for r in store.records())
    add(store, 0.1)
    store.release()


def test_a_killed_driver_of_this_machine_is_replaced_at_once(repository: Path) -> None:
    killed = start_driver(repository)
    assert is_dead(Owner.here().word) is False
    killed.kill()
    killed.wait()
    open_for_writing("two").release()


def test_only_who_is_surely_gone_counts_as_dead() -> None:
    word = Owner.here().word
    boot, space, pid, started, random = word.split("/")
    assert is_dead("/".join([boot, space, pid, "1", random])), "its number went to another process"
    assert not is_dead("/".join(["another machine", space, pid, "1", random]))
    assert not is_dead("/".join([boot, "another container", pid, "1", random]))
    assert not is_dead("")
    assert not is_dead("////")
