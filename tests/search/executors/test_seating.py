"""What is known of workers that are only heard of by messages."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from autoprune.errors import TrialError, WorkerError
from autoprune.search.executors import seating
from autoprune.search.executors.contract import Reply
from autoprune.search.executors.seating import Occupation, Seating


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


class Hall:
    """Three seats, and what was asked of the outside."""

    def __init__(self) -> None:
        self.dismissed: list[tuple[int, str]] = []
        self.failures: list[WorkerError] = []
        self.seats = Seating(
            3, 60.0, lambda seat, node: self.dismissed.append((seat, node)), self.failures.append
        )

    def hear(self, *events: tuple[str, int, str, Any]) -> None:
        self.seats.hear(events)

    def ready(self, seat: int, node: str) -> None:
        self.hear(("join", seat, node, None), ("ready", seat, node, None))

    @property
    def doing(self) -> list[str]:
        return [state.doing for state in self.seats.states()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(seating, "time", made)
    return made


@pytest.fixture
def hall(clock: Clock) -> Hall:
    return Hall()


def lost(waiting: seating.Waiting) -> TrialError:
    answer = waiting.answers.get_nowait()
    assert isinstance(answer, TrialError)
    return answer


def test_a_share_of_the_time_was_spent_with_work(clock: Clock) -> None:
    occupation = Occupation("idle")
    clock.now_s += 6.0
    occupation.set("trial 1", busy=True)
    clock.now_s += 3.0
    state = occupation.state("w", "n")
    assert state.is_busy
    assert state.busy_share == pytest.approx(3 / 9)
    occupation.set("idle")
    clock.now_s += 1.0
    state = occupation.state("w", "n")
    assert state.busy_share == pytest.approx(0.3)
    assert (state.is_busy, state.since_s, state.doing) == (False, 1.0, "idle")


def test_a_request_is_taken_and_answered(hall: Hall, clock: Clock) -> None:
    waiting = hall.seats.wait_for(7, "trial 3")
    assert hall.doing == ["waiting for a node"] * 3
    assert not hall.seats.is_anybody_ready()
    clock.now_s += 5.0
    hall.ready(1, "b:1")
    assert hall.seats.is_anybody_ready()
    assert hall.seats.last_ready_s == clock.now_s
    clock.now_s += 5.0
    hall.hear(("take", 1, "b:1", 7))
    assert waiting.taken_s == clock.now_s
    state = hall.seats.states()[1]
    assert (state.name, state.node, state.doing, state.is_busy) == ("seat 1", "b", "trial 3", True)
    hall.hear(("reply", 1, "b:1", Reply(7, score=0.5)))
    answer = waiting.answers.get_nowait()
    assert isinstance(answer, Reply)
    assert answer.score == 0.5
    assert hall.doing[1] == "idle"
    assert hall.seats.refused == 0


def test_late_replies_are_refused(hall: Hall) -> None:
    hall.ready(0, "a:1")
    hall.hear(("reply", 0, "a:0", Reply(5, score=0.5)))  # of the worker that was there before
    assert hall.seats.refused == 1
    waiting = hall.seats.wait_for(6, "trial")
    hall.hear(("take", 0, "a:1", 6))
    hall.seats.forget(6)
    hall.hear(("reply", 0, "a:1", Reply(6, score=0.5)))  # of a request that was given up
    assert hall.seats.refused == 2
    with pytest.raises(queue.Empty):
        waiting.answers.get_nowait()


def test_what_a_worker_takes_as_it_is_given_up_is_tried_by_another(hall: Hall) -> None:
    hall.ready(0, "a:1")
    hall.seats.wait_for(6, "trial 6")
    next_one = hall.seats.wait_for(7, "trial 7")
    hall.hear(("take", 0, "a:1", 6))
    hall.seats.give_up(6)
    hall.hear(("reply", 0, "a:1", Reply(6, score=0.5)), ("take", 0, "a:1", 7))
    assert lost(next_one).kind == "worker-lost"
    hall.hear(("take", 0, "a:1", 7))  # once
    with pytest.raises(queue.Empty):
        next_one.answers.get_nowait()


def test_a_worker_that_is_replaced_loses_what_it_had(hall: Hall) -> None:
    hall.ready(0, "a:1")
    waiting = hall.seats.wait_for(6, "trial")
    hall.hear(("take", 0, "a:1", 6), ("join", 0, "b:1", None))
    error = lost(waiting)
    assert (error.kind, error.reason) == ("worker-lost", "worker on a:1 ended")
    assert hall.seats.states()[0].lost == 1
    hall.hear(("reply", 0, "a:1", Reply(6, score=0.5)))
    assert hall.seats.refused == 1


def test_silence_beyond_the_lease_costs_the_seat(hall: Hall, clock: Clock) -> None:
    hall.ready(0, "a:1")
    hall.ready(1, "b:1")
    waiting = hall.seats.wait_for(6, "trial")
    hall.hear(("take", 0, "a:1", 6))
    clock.now_s += 60.0
    hall.hear(("beat", 1, "b:1", None))
    assert hall.dismissed == []
    clock.now_s += 0.1
    hall.hear()
    assert hall.dismissed == [(0, "a:1")]
    assert lost(waiting).reason == "worker on a:1 gave no sign of life for 60 s"
    assert hall.doing == ["lost", "idle", "waiting for a node"]
    clock.now_s += 1000.0
    hall.hear(("beat", 1, "b:1", None))
    assert hall.dismissed == [(0, "a:1")]  # an empty seat is silent
    clock.now_s += 60.1
    hall.hear()
    assert hall.dismissed == [(0, "a:1"), (1, "b:1")]
    assert hall.doing[1] == "lost"  # it had no request
    assert [state.lost for state in hall.seats.states()] == [1, 0, 0]
    hall.hear(("reply", 0, "a:1", Reply(6, score=0.5)))
    assert hall.seats.refused == 1


def test_a_hung_worker_is_dismissed_with_its_request(hall: Hall) -> None:
    hall.ready(0, "a:1")
    hall.ready(2, "c:1")
    hall.seats.wait_for(6, "trial")
    hall.hear(("take", 2, "c:1", 6))
    hall.seats.give_up(6)
    assert hall.dismissed == [(2, "c:1")]
    assert [state.lost for state in hall.seats.states()] == [0, 0, 1]
    assert hall.doing == ["idle", "waiting for a node", "hung"]


def test_workers_that_die_while_they_start_end_the_search(hall: Hall) -> None:
    for number in range(5):
        hall.hear(("join", 0, f"a:{number}", None))
    assert hall.failures == []
    hall.hear(("join", 0, "a:6", None))
    assert "died 5 times in a row while they started, last on a:6" in hall.failures[0].message
    assert "--cpus-per-trial" in hall.failures[0].hint
    hall.failures.clear()
    hall.ready(1, "b:1")
    for number in range(5):  # one that became ready begins anew
        hall.hear(("join", 1, f"b:{number}", None))
    assert hall.failures == []


def test_a_worker_that_cannot_start_ends_the_search_only_where_no_other_works(hall: Hall) -> None:
    hall.hear(("join", 0, "a:1", None), ("failed", 0, "a:1", ("no data", "copy it")))
    assert (hall.failures[0].message, hall.failures[0].hint) == (
        "a worker on a:1 cannot start: no data",
        "copy it",
    )
    hall.failures.clear()
    hall.ready(1, "b:1")
    hall.hear(("join", 2, "c:1", None), ("failed", 2, "c:1", ("no data", "copy it")))
    assert hall.failures == []
    assert hall.doing[2] == "cannot start"
