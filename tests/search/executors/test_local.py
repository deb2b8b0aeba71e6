"""Workers of this machine: side by side, each on its cores, and what becomes of a request whose worker dies."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autoprune.errors import TrialError, WorkerError
from autoprune.search.executors.contract import Reference, Reply, Request
from autoprune.search.executors.limits import RequestLimits
from autoprune.search.executors.local import LocalExecutor, seats
from autoprune.space.recipe import Recipe
from tests.search.executors.serving import serve
from tests.search.fakes import make_groups, make_measurement


def make_executor(
    count: int = 1, given: Any = "", limit_s: float = 60.0, lease_s: float = 30.0
) -> LocalExecutor:
    return LocalExecutor(
        given, seats(count), RequestLimits(lambda: None, limit_s), serve=serve, lease_s=lease_s
    )


@pytest.fixture(scope="module")
def pair() -> Iterator[LocalExecutor]:
    executor = make_executor(2)
    executor.start()
    yield executor
    executor.close()


def ask(executor: LocalExecutor, name: str) -> Reply:
    return executor.run(Request(executor.next_token(), "screen", name, Recipe()))


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def test_processors_are_shared_out_without_overlap_while_there_are_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 5, 7, 9})
    assert [seat.cores for seat in seats(3)] == [(0, 1), (2, 3), (5, 7, 9)]
    assert [seat.cores for seat in seats(7)] == [(c,) for c in (0, 1, 2, 3, 5, 7, 9)]
    assert {seat.cores for seat in seats(9)} == {(c,) for c in (0, 1, 2, 3, 5, 7, 9)}
    assert [seat.gpu for seat in seats(3, ["0", "1"])] == ["0", "1", "0"]


def test_requests_run_side_by_side_each_on_its_own_cores(pair: LocalExecutor) -> None:
    where = [ask(pair, "where") for _ in range(2)]  # the workers take turns
    threads = [threading.Thread(target=ask, args=(pair, "sleep 2")) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    assert [state.doing for state in pair.states()] == ["sleep 2", "sleep 2"]
    for thread in threads:
        thread.join()
    assert len({reply.score for reply in where}) == 2
    cores = [set(reply.timings["cores"]) for reply in where]
    assert not cores[0] & cores[1] or len(os.sched_getaffinity(0)) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [("exit 5", "exit code 5"), ("exit 0", "exit code 0"), ("kill", "SIGKILL")],
)
def test_a_worker_that_dies_costs_its_request_and_is_replaced(
    pair: LocalExecutor, name: str, reason: str
) -> None:
    before = {ask(pair, "where").score for _ in range(2)}
    with pytest.raises(TrialError, match=reason) as caught:
        ask(pair, name)
    assert caught.value.kind == "worker-lost"
    after = {ask(pair, "where").score for _ in range(2)}
    assert len(after) == 2
    assert len(before & after) == 1
    assert sum(state.lost for state in pair.states()) >= 1


def test_what_a_trial_fails_of_keeps_its_kind(pair: LocalExecutor) -> None:
    with pytest.raises(TrialError, match="NaN") as caught:
        ask(pair, "fail")
    assert caught.value.kind == "nan"


def test_a_full_disk_is_no_trial_s_failure(pair: LocalExecutor) -> None:
    with pytest.raises(OSError, match="No space left"):
        ask(pair, "full")


def test_new_workers_are_told_the_reference_too(pair: LocalExecutor) -> None:
    assert ask(pair, "reference").score == 0.0
    pair.adopt_dense(Reference(Path("dense"), make_measurement(Recipe(), make_groups())))
    with pytest.raises(TrialError):
        ask(pair, "kill")
    assert [ask(pair, "reference").score for _ in range(2)] == [1.0, 1.0]


def test_a_hung_request_is_ended_at_its_limit() -> None:
    executor = make_executor(limit_s=1.0)
    try:
        ask(executor, "where")
        with pytest.raises(TrialError, match="longer than 1 s") as caught:
            ask(executor, "hang")
        assert caught.value.kind == "hung"
    finally:
        executor.close()


def test_a_stopped_worker_is_given_up_after_its_lease() -> None:
    executor = make_executor(lease_s=2.0)
    try:
        pid = int(ask(executor, "where").score or 0)
        with pytest.raises(TrialError, match="no sign of life for 2 s") as caught:
            ask(executor, "stop")
        assert caught.value.kind == "worker-lost"
        assert not is_alive(pid)  # so that it cannot wake up and write
        assert int(ask(executor, "where").score or 0) != pid
    finally:
        executor.close()


def test_trainings_end_in_order_when_asked_and_everything_at_once_when_stopped() -> None:
    executor = make_executor()
    try:
        pid = int(ask(executor, "where").score or 0)
        threading.Timer(0.3, executor.ask_to_end).start()
        assert ask(executor, "train").steps == 7
        threading.Timer(0.3, executor.stop).start()
        with pytest.raises(TrialError, match="stopped at once") as caught:
            ask(executor, "hang")
        assert caught.value.kind == "interrupted"
        assert not is_alive(pid)
    finally:
        executor.close()


def test_closing_leaves_no_process() -> None:
    executor = make_executor()
    pid = int(ask(executor, "where").score or 0)
    executor.close()
    assert not is_alive(pid)


@pytest.mark.parametrize(
    ("given", "message"),
    [("raise", "cannot start: RuntimeError: the data is not there"), ("exit", "exit code 3")],
)
def test_a_worker_that_cannot_start_ends_the_search_with_the_reason(given: str, message: str) -> None:
    executor = make_executor(given=given)
    try:
        with pytest.raises(WorkerError, match=message):
            ask(executor, "where")
    finally:
        executor.close()
