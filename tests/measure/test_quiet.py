"""Nothing trains while something is measured, seen in real processes by the one monotonic clock that they share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autoprune.errors import TrialError, UsageError
from autoprune.measure.lock import lock_machine
from autoprune.measure.process import environment, run_worker
from autoprune.measure.quiet import Working, current_gate, quiet, standing_aside, training, working
from autoprune.target import Target
from tests.measure.test_latency import network

Interval = tuple[float, float]

# What the processes run; each writes the intervals in which it trained or measured.
HEAD = """
import random, sys, time
from autoprune.measure.quiet import quiet, working
file = open(sys.argv[1], "w")
def spend(what, seconds):
    begun = time.monotonic()
    time.sleep(seconds)
    print(what, begun, time.monotonic(), file=file, flush=True)
"""
TRAIN = """
with working() as gate:
    while True:
        gate.give_way()
        spend("step", random.uniform(0.001, 0.003))
"""
MEASURE = """
while True:
    with quiet(20.0):
        spend("measured", random.uniform(0.01, 0.03))
"""
BOTH = """
with working() as gate:
    while True:
        for _ in range(5):
            gate.give_way()
            spend("step", 0.002)
        with quiet(20.0):
            spend("measured", 0.01)
"""
HOLD = "with working():\n    spend('step', 0.0)\n    time.sleep(60)"
HOLD_QUIET = "with quiet(5.0):\n    spend('measured', 0.0)\n    time.sleep(60)"


class Running:
    """A program in a process of its own, and what it has written so far."""

    def __init__(self, program: str, path: Path) -> None:
        command = [sys.executable, "-c", HEAD + program, str(path)]
        self.path = path
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
        self.pid = self.process.pid

    def lines(self) -> list[list[str]]:
        text = self.path.read_text() if self.path.exists() else ""
        return [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_for_a_line(self) -> Running:
        while not self.lines():
            assert self.process.poll() is None
            time.sleep(0.01)
        return self

    def intervals(self, what: str) -> list[Interval]:
        return [(float(begun), float(ended)) for word, begun, ended in self.lines() if word == what]

    def end(self) -> str:
        """Kill it and return what it wrote as errors."""
        self.process.kill()
        return self.process.communicate()[1] if self.process.returncode is None else ""


Start = Callable[[str], Running]


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOPRUNE_LOCKS", str(tmp_path / "locks"))
    return tmp_path / "locks"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start programs that end with the test."""
    begun: list[Running] = []

    def begin(program: str) -> Running:
        begun.append(Running(program, tmp_path / f"{len(begun)}.txt"))
        return begun[-1]

    yield begin
    for running in begun:
        running.end()


def overlapping(intervals_s: list[Interval], others_s: list[Interval]) -> list[tuple[Interval, Interval]]:
    return [
        (one, other) for one in intervals_s for other in others_s if one[0] < other[1] and other[0] < one[1]
    ]


def apart(measured: list[Interval]) -> bool:
    return all(one[1] <= other[0] for one, other in pairwise(sorted(measured)))


def until(holds: Callable[[], bool]) -> None:
    """Wait for what has to come sooner or later, however slow the machine is; the test's time limit ends it."""
    while not holds():
        time.sleep(0.1)


def pauses(running: Running) -> list[bool]:
    """Return for each step but the last one whether a measurement may have followed it, and not just another step."""
    return [after[0] - before[1] > 0.008 for before, after in pairwise(running.intervals("step"))]


def test_no_step_of_any_process_lies_in_a_measurement_and_none_starves(start: Start) -> None:
    workers = [start(TRAIN) for _ in range(4)]
    measurers = [start(MEASURE) for _ in range(3)]
    # Measurements are always asked for and steps always wait; each gets its turn again and again.
    until(lambda: all(len(running.intervals("measured")) >= 4 for running in measurers))
    until(lambda: all(min(pauses(each).count(True), pauses(each).count(False)) >= 4 for each in workers))
    assert [running.end() for running in workers + measurers] == [""] * 7
    measured = [interval for running in measurers for interval in running.intervals("measured")]
    assert overlapping(measured, [step for running in workers for step in running.intervals("step")]) == []
    assert apart(measured)


def test_processes_that_train_and_measure_in_turn_do_not_wait_for_themselves(start: Start) -> None:
    both = [start(BOTH) for _ in range(4)]
    until(lambda: all(len(running.intervals("measured")) >= 4 for running in both))
    assert [running.end() for running in both] == [""] * 4
    measured = [interval for running in both for interval in running.intervals("measured")]
    assert overlapping(measured, [step for running in both for step in running.intervals("step")]) == []
    assert apart(measured)


@pytest.mark.parametrize("program", [HOLD, HOLD_QUIET], ids=["training", "measuring"])
def test_a_killed_process_holds_nothing(start: Start, program: str) -> None:
    running = start(program).wait_for_a_line()
    with pytest.raises(TrialError), quiet(0.1):
        pass
    running.end()
    with working(), quiet(5.0), lock_machine():
        pass


def test_a_stopped_process_is_named(start: Start) -> None:
    running = start(TRAIN).wait_for_a_line()
    os.kill(running.pid, signal.SIGSTOP)
    with pytest.raises(TrialError) as caught, quiet(0.2):
        pass
    assert caught.value.kind == "latency"
    assert f"waited 0.2 s for process {running.pid} (stopped)" in caught.value.reason
    os.kill(running.pid, signal.SIGCONT)
    with quiet(10.0) as waited_s:
        assert waited_s < 10.0


def test_another_measurement_that_does_not_end_is_named(start: Start) -> None:
    running = start(HOLD_QUIET).wait_for_a_line()
    with pytest.raises(TrialError, match=rf"process {running.pid} \(sleeping\) to measure"), quiet(0.2):
        pass


def test_a_system_that_names_nobody_still_has_a_reason(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprune.measure.quiet._holders", lambda _: [])
    with working(), quiet(1.0):  # its own gate is no obstacle
        pass
    other = Working()
    with pytest.raises(TrialError, match="a process that the system does not name to train"), quiet(0.05):
        pass
    other.close()


def is_free(start: Start) -> bool:
    """Ask from another process, for which this one's gate is not its own."""
    running = start("with quiet(0.1):\n    spend('measured', 0.0)")
    errors = running.process.communicate(timeout=20)[1]
    assert running.lines() or f"process {os.getpid()}" in errors
    return bool(running.lines())


def test_blocks_inside_of_one_another(start: Start) -> None:
    assert current_gate() is None
    with working() as gate:
        assert current_gate() is gate
        with working() as same:
            assert same is gate
        assert not is_free(start)  # the inner block's end released nothing
        with gate.paused():
            with gate.paused(), standing_aside():
                pass
            assert is_free(start)  # nor did an inner one take anything
            assert gate.give_way() == 0.0
        assert not is_free(start)
    assert current_gate() is None
    assert is_free(start)


def test_a_pause_that_fails_or_is_interrupted(start: Start) -> None:
    with working() as gate:
        with pytest.raises(ValueError), gate.paused():
            raise ValueError
        assert not is_free(start)
        with pytest.raises(KeyboardInterrupt), gate.paused():
            raise KeyboardInterrupt
        assert is_free(start)  # it does not wait at its end
        time.sleep(0.03)
        gate.give_way()
        assert not is_free(start)


def test_what_was_waited_is_told(start: Start) -> None:
    with working() as gate:
        assert gate.give_way() == 0.0
        running = start("with quiet(20.0):\n    spend('measured', 0.2)")
        while (waited_s := gate.give_way()) == 0.0:
            time.sleep(0.005)
        begun, ended = running.intervals("measured")[0]
        assert waited_s >= ended - begun
        assert gate.waited_s == pytest.approx(waited_s, abs=0.01)


def test_a_step_asks_the_system_only_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    asked: list[float] = []
    monkeypatch.setattr("autoprune.measure.quiet.time.monotonic", lambda: now[0])
    with working() as gate:

        def take(*_: object) -> bool:
            asked.append(now[0])
            return True

        monkeypatch.setattr("autoprune.measure.quiet.take", take)
        for _ in range(50):
            gate.give_way()
            now[0] += 0.001
    assert asked == pytest.approx([100.02, 100.04], abs=2e-3)


def test_a_forked_process_leaves_the_lock_to_the_one_that_took_it(start: Start) -> None:
    with working():
        pid = os.fork()
        if pid == 0:  # pragma: no cover
            time.sleep(30 if current_gate() is None else 0)
            os._exit(0)
        assert not is_free(start)
    assert is_free(start)  # though the child lives
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def job(path: Path) -> dict[str, Any]:
    return {
        "kind": "memory", "models": [str(path)], "dense": str(path), "input_shape": [8],
        "target": Target().model_dump(mode="json"),
    }  # fmt: skip


def test_a_measuring_process_waits_for_others_that_train_and_not_for_its_own(
    tmp_path: Path, start: Start
) -> None:
    wanted = job(network(tmp_path / "a.onnx", 8))
    with working() as gate:
        assert "memory_bytes" in run_worker(wanted, 60.0)
        assert gate.waited_s < 1.0
        process = start(HOLD)
        with pytest.raises(
            TrialError, match=f"the measurement failed: waited 0.3 s for process {process.pid}"
        ):
            run_worker({**wanted, "quiet_timeout_s": 0.3}, 60.0)


def test_a_folder_that_cannot_hold_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOPRUNE_LOCKS", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot be opened") as caught, working():
        pass
    assert "AUTOPRUNE_LOCKS" in caught.value.hint
    assert current_gate() is None
    link = tmp_path / "autoprune-turn.lock"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError), working(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_every_user_can_lock_the_files(locks: Path) -> None:
    before = os.umask(0o077)
    try:
        with working():
            pass
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in locks.iterdir()} == {
        "autoprune-turn.lock": 0o644, "autoprune-quiet.lock": 0o644,
    }  # fmt: skip
    for path in locks.iterdir():
        path.chmod(0o444)
    with working(), quiet(1.0):
        pass


def test_who_trains_gives_way_whenever_it_asks_whether_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOPRUNE_LOCKS", str(tmp_path))
    gave: list[Working] = []

    def give_way(gate: Working) -> float:
        gave.append(gate)
        return 0.0

    monkeypatch.setattr(Working, "give_way", give_way)
    answers = iter((False, True))
    with training(lambda: next(answers)) as asked:
        assert [asked(), asked()] == [False, True]
        assert gave == [current_gate()] * 2
    assert current_gate() is None


def test_what_was_asked_of_a_gpu_is_waited_for_before_others_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []

    class Cuda:
        used = False

        def is_initialized(self) -> bool:
            return self.used

        def synchronize(self) -> None:
            calls.append(gate._holds)

    cuda = Cuda()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    gate = Working(tmp_path)
    gate.close()
    assert calls == []
    cuda.used = True
    gate = Working(tmp_path)
    gate.close()
    assert calls == [True], "it was waited for after others had begun"
