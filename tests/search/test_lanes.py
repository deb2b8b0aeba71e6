"""Lanes: one decides at a time, what was decided runs side by side, and nothing waits for ever."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from autoprune.errors import TrialError
from autoprune.search.lanes import Lanes

_COUNTS = pytest.mark.parametrize("count", [1, 2, 32])


def in_time(work: Callable[[], None], seconds: float = 20.0) -> BaseException | None:
    """Do ``work`` in a thread; return what it raised, and fail if it does not end."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "the lanes wait for ever"
    return raised[0] if raised else None


class Work:
    """So many pieces of work, with what is asserted of how lanes do them."""

    def __init__(self, lanes: Lanes, pieces: int, seconds: float = 0.002) -> None:
        self.lanes, self.left, self.seconds = lanes, pieces, seconds
        self.done = 0
        self.deciding = 0
        self.running = 0
        self.most = 0
        self.lock = threading.Lock()

    def step(self) -> bool:
        """Take a piece: what is counted without a lock is decided by one lane at a time."""
        self.deciding += 1
        assert self.deciding == 1
        time.sleep(0)  # another thread would now come in between
        assert self.deciding == 1
        self.deciding -= 1
        if not self.left:
            return False
        self.left -= 1
        with self.lanes.waiting():
            with self.lock:
                self.running += 1
                self.most = max(self.most, self.running)
            time.sleep(self.seconds)
            with self.lock:
                self.running -= 1
        self.done += 1
        return True


@_COUNTS
def test_each_piece_is_done_once_and_one_lane_decides_at_a_time(count: int) -> None:
    work = Work(Lanes(count), 200)
    assert in_time(lambda: work.lanes.run(work.step)) is None
    assert work.done == 200
    assert work.running == 0


@pytest.mark.parametrize("count", [2, 32])
def test_what_is_waited_for_runs_side_by_side(count: int) -> None:
    work = Work(Lanes(count), 2 * count, seconds=0.1)
    assert in_time(lambda: work.lanes.run(work.step)) is None
    assert work.most == count


def test_one_lane_uses_no_thread() -> None:
    lanes = Lanes(1)
    seen: list[threading.Thread] = []
    lanes.run(lambda: seen.append(threading.current_thread()) is not None)  # type: ignore[func-returns-value]
    assert seen == [threading.current_thread()]


@_COUNTS
def test_a_step_that_finds_nothing_is_asked_again_when_a_result_is_there(count: int) -> None:
    """Each result makes one more piece of work: with the first lane's only, the others find nothing for a while."""
    lanes = Lanes(count)
    ready, done = [1], []

    def step() -> bool:
        if not ready:
            return False
        ready.pop()
        with lanes.waiting():
            time.sleep(0.002)
        done.append(threading.current_thread().name)
        if len(done) < 64:
            ready.extend([1] if len(done) % 4 else [1, 1])
        return True

    assert in_time(lambda: lanes.run(step)) is None
    assert len(done) >= 64
    assert not ready
    assert count == 1 or len(set(done)) > 1


@_COUNTS
def test_lanes_end_when_nothing_runs_and_nothing_is_left(count: int) -> None:
    asked: list[int] = []
    assert in_time(lambda: Lanes(count).run(lambda: asked.append(1) is not None)) is None  # type: ignore[func-returns-value]
    assert 1 <= len(asked) <= 2 * count


@_COUNTS
def test_the_first_failure_is_raised_and_the_rest_let_go(count: int) -> None:
    lanes = Lanes(count)
    let_go = threading.Event()
    begun: list[int] = []
    stops: list[int] = []

    def step() -> bool:
        begun.append(1)
        if len(begun) == count:
            raise TrialError("nan", "first")
        with lanes.waiting():
            let_go.wait(60.0)
        raise TrialError("nan", "later")

    def stop() -> None:
        stops.append(1)
        let_go.set()

    error = in_time(lambda: lanes.run(step, stop))
    assert isinstance(error, TrialError)
    assert error.reason == "first"
    assert len(begun) == count
    assert stops == ([] if count == 1 else [1])


@pytest.mark.parametrize("count", [2, 32])
def test_no_lane_that_waits_for_another_survives_a_failure(count: int) -> None:
    lanes = Lanes(count)
    begun: list[int] = []

    def step() -> bool:
        begun.append(1)
        if len(begun) == count:
            with lanes.waiting():
                time.sleep(0.05)
            raise TrialError("nan", "first")
        lanes.until(lambda: False)
        return True

    error = in_time(lambda: lanes.run(step))
    assert isinstance(error, TrialError)
    assert len(begun) == count


@pytest.mark.parametrize("count", [2, 32])
def test_until_gives_way_to_those_who_bring_about_what_is_waited_for(count: int) -> None:
    lanes = Lanes(count)
    order: list[str] = []
    running: set[str] = set()
    pieces = list(range(4 * count))

    def step() -> bool:
        if not pieces:
            return False
        pieces.pop()
        lanes.until(lambda: "same" not in running)
        running.add("same")
        order.append("begin")
        with lanes.waiting():
            time.sleep(0.001)
        order.append("end")
        running.discard("same")
        return True

    assert in_time(lambda: lanes.run(step)) is None
    assert order == ["begin", "end"] * 4 * count


@_COUNTS
def test_no_step_is_begun_once_the_search_is_to_end(count: int) -> None:
    asked: list[int] = []
    lanes = Lanes(count, interrupted=lambda: len(asked) >= 40)

    def step() -> bool:
        asked.append(1)
        with lanes.waiting():
            time.sleep(0.001)
        return True

    assert in_time(lambda: lanes.run(step)) is None
    assert 40 <= len(asked) < 40 + count


def test_a_second_ctrl_c_stops_what_runs_and_is_raised() -> None:
    """In the main thread, where alone Python raises it."""
    lanes = Lanes(4)
    let_go = threading.Event()

    def step() -> bool:
        with lanes.waiting():
            assert let_go.wait(20.0)
        return True

    def press() -> None:
        # Python drops what is raised while a finalizer runs; a user presses again.
        while not let_go.wait(1.0):
            _thread.interrupt_main()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever an earlier test left
    presser = threading.Thread(target=press)
    presser.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            lanes.run(step, let_go.set)
    finally:
        presser.join()
        signal.signal(signal.SIGINT, before)
    assert let_go.is_set()
    assert not [t for t in threading.enumerate() if t.name.startswith("lane-")]


@_COUNTS
def test_tasks_are_taken_one_by_one_as_lanes_become_free(count: int) -> None:
    lanes = Lanes(count)
    done: list[int] = []
    taken: list[int] = []

    def tasks() -> Iterator[Callable[[], object]]:
        for number in range(100):
            taken.append(number)

            def task(number: int = number) -> None:
                with lanes.waiting():
                    time.sleep(0.001)
                assert len(taken) <= len(done) + count
                done.append(number)

            yield task

    assert in_time(lambda: lanes.each(tasks())) is None
    assert sorted(done) == list(range(100))


@_COUNTS
def test_lanes_can_be_used_again_after_they_failed(count: int) -> None:
    lanes = Lanes(count)

    def fail() -> bool:
        raise TrialError("nan", "once")

    assert isinstance(in_time(lambda: lanes.run(fail)), TrialError)
    work = Work(lanes, 20)
    assert in_time(lambda: lanes.run(work.step)) is None
    assert work.done == 20
