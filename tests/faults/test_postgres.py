"""A study in PostgreSQL: two drivers, one that is stopped past its lease, a server that restarts, readers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from autoprune.study.store import StudyStore
from tests.faults.conftest import Tell
from tests.faults.crew import Crew, alive, assert_whole
from tests.faults.harness import Forker, until
from tests.study.postgres import Postgres, database, postgres

__all__ = ["database", "postgres"]


@pytest.fixture
def crew(crew_forker: Forker, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Crew:
    monkeypatch.setenv("AUTOPRUNE_STORAGE", database)
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(tmp_path / "under-fault" / "studies"))
    return Crew(crew_forker, tmp_path / "under-fault", "crew").prepared(storage=database)


@contextmanager
def reading(crew: Crew) -> Iterator[list[int]]:
    """Read the study all the while; what was once read as finished has to stay as it was."""
    over, seen = threading.Event(), [0]
    faults: list[int] = []

    def read() -> None:
        ended: dict[int, str] = {}
        while not over.wait(0.05):
            found: dict[int, str] = {
                r.number: r.state for r in StudyStore.open(crew.name).records() if r.state != "running"
            }
            faults.extend(number for number, state in ended.items() if found.get(number) != state)
            ended = found
            seen[0] += 1

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
    assert not faults, f"what readers saw of trials {faults} changed"


def test_a_stopped_driver_is_replaced_and_wakes_to_a_refusal(crew: Crew, tell: Tell) -> None:
    first = crew.begin(lease_s=2.0, trial_s=0.1, budget="30trials")
    until(lambda: len(crew.told) >= 6)
    second = crew.begin()
    assert second.wait() == 4
    assert f"process {first.pid}, which has it until" in second.said
    with reading(crew) as seen:
        first.kill(signal.SIGSTOP)
        told = len(crew.told)
        time.sleep(3.0)
        second = crew.begin(trial_s=0.02, budget="8trials")
        until(lambda: len(crew.told) > told + 2)
        first.kill(signal.SIGCONT)
        assert first.wait() == 4
        assert second.wait() == 0, second.said
    assert "took the study 'crew' over" in first.said, first.said
    assert "Traceback" not in first.said
    until(lambda: not alive(crew.workers), 5.0)
    counts = assert_whole(crew)
    assert 1 <= counts["lost"] <= 2  # what the first had under way
    tell(counts, readings=seen[0])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_server_that_restarts_under_four_workers(
    crew: Crew, postgres: Postgres, tell: Tell, mode: str
) -> None:
    run = crew.begin(workers=4, trial_s=0.1, budget="60trials")
    until(lambda: len(crew.told) >= 12)
    restarts = 0
    while alive([run.pid]) and restarts < 4:
        postgres.stop(mode)
        time.sleep(0.5)
        postgres.start()
        before = len(crew.told)
        until(lambda: len(crew.told) >= before + 5 or not alive([run.pid]))  # noqa: B023
        restarts += 1
    assert run.wait() == 0, run.said
    assert restarts >= 3
    assert run.said == ""
    counts = assert_whole(crew)
    assert counts["lost"] == counts["retried"] == 0
    tell(counts, restarts=restarts)


@pytest.mark.slow
def test_readers_see_a_search_with_four_workers(crew: Crew, tell: Tell) -> None:
    run = crew.begin(workers=4, trial_s=0.1, budget="60trials")
    until(lambda: len(crew.told) >= 3)
    with reading(crew) as seen:
        assert run.wait() == 0, run.said
    assert seen[0] >= 3
    tell(assert_whole(crew), readings=seen[0])


@pytest.mark.slow
def test_a_killed_driver_of_this_machine_is_replaced_at_once(crew: Crew, tell: Tell) -> None:
    for _ in range(3):
        told = len(crew.told)
        run = crew.begin(trial_s=0.1, budget="10trials")
        until(lambda: len(crew.told) >= told + 3)  # noqa: B023
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        until(lambda: not alive(crew.workers), 5.0)
    crew.end()
    tell(assert_whole(crew), drivers=3)
