"""Quiet phases: nothing of ours trains on a host while something of ours is measured there.

Two files are locked, and the kernel unlocks them however a process dies. Who trains holds *quiet* shared, who measures
holds it alone. *Turn* is a turnstile in front of it: who measures holds it alone from when they ask until they have
measured, and who trains passes through it, so that a measurement waits for no more than the steps that run, and
training for no more than the measurement.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from autoprune.errors import TrialError
from autoprune.measure.lock import open_lock, take
from autoprune.naming import locks_root

GIVE_WAY_EVERY_S = 0.02
_POLL_S = 0.005
# Those that wait to train come through the turnstile in this time, before anybody measures again.
_BREATH_S = 0.05


class Working:
    """What a process holds while it trains; see :func:`working`.

    It is for one thread: that which trains and starts measurements.

    Attributes:
        waited_s: Seconds that it has waited for measurements in all.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.waited_s = 0.0
        self._turn, self._quiet = _open(folder)
        self._holds = self._paused = False
        self._asked_s = 0.0
        self._take()

    def give_way(self) -> float:
        """Let those measure who wait for that, and return the seconds that it took; to be called at every step.

        It costs next to nothing where nobody waits.
        """
        if self._paused or time.monotonic() - self._asked_s < GIVE_WAY_EVERY_S:
            return 0.0
        if not self._holds:
            return self._take()
        self._asked_s = time.monotonic()
        if take(self._turn, fcntl.LOCK_SH):
            fcntl.flock(self._turn, fcntl.LOCK_UN)
            return 0.0
        self._release()
        return self._take()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold nothing for a block in which this process trains nothing: it measures, or only waits."""
        if not self._holds:
            yield
            return
        self._release()
        self._paused = True
        try:
            yield
        except Exception:
            self._paused = False
            self._take()
            raise
        finally:
            self._paused = False  # and whoever was interrupted waits at the next step, if there is one
        self._take()

    def close(self) -> None:
        """Hold nothing any more."""
        if self._holds:
            self._release()
        self.forget()

    def forget(self) -> None:
        """Close the files in a process that was forked, which leaves the locks to the one that took them."""
        self._holds = False
        self._turn.close()
        self._quiet.close()

    def _take(self) -> float:
        if self._quiet.closed:
            return 0.0
        begun_s = time.monotonic()
        fcntl.flock(self._turn, fcntl.LOCK_SH)
        try:
            # At once: nobody holds it alone who does not hold the turn as well.
            fcntl.flock(self._quiet, fcntl.LOCK_SH)
            self._holds = True
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)
        self._asked_s = time.monotonic()
        waited_s = self._asked_s - begun_s
        self.waited_s += waited_s
        return waited_s

    def _release(self) -> None:
        finish_on_gpu()
        self._holds = False
        fcntl.flock(self._quiet, fcntl.LOCK_UN)


def finish_on_gpu() -> None:
    """Wait for what this process still has to compute on a GPU, which goes on after the calls that asked for it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


_current: Working | None = None


def current_gate() -> Working | None:
    """Return what this process holds while it trains; None where it does not."""
    return _current


def _forget_after_fork() -> None:
    global _current
    if _current is not None:
        _current.forget()
    _current = None


os.register_at_fork(after_in_child=_forget_after_fork)


@contextmanager
def working(folder: Path | None = None) -> Iterator[Working]:
    """Train, for the length of a block, only while nobody measures on this host.

    Inside of another such block it is that one's gate.

    Args:
        folder: Folder of the locks; the host's if not given.
    """
    global _current
    if _current is not None:
        yield _current
        return
    gate = _current = Working(folder)
    try:
        yield gate
    finally:
        _current = None
        gate.close()


@contextmanager
def training(stop: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Train for the length of a block; gives what is asked at every step, which lets measurements in between.

    Args:
        stop: Returns whether training is to end.
    """
    with working() as gate:

        def asked() -> bool:
            gate.give_way()
            return stop()

        yield asked


@contextmanager
def standing_aside() -> Iterator[None]:
    """Let this process hold nothing for a block, if it does: a measurement that it waits for could not begin."""
    with nullcontext() if _current is None else _current.paused():
        yield


@contextmanager
def quiet(timeout_s: float, folder: Path | None = None) -> Iterator[float]:
    """Measure, for the length of a block, while nothing trains on this host; gives the seconds waited for that.

    Args:
        timeout_s: Seconds after which waiting has failed. Who trains gives way at every step.
        folder: Folder of the locks; the host's if not given.

    Raises:
        TrialError: If it takes longer; tells which processes were waited for.
    """
    begun_s = time.monotonic()
    turn, hush = _open(folder)
    with standing_aside(), turn, hush:
        for file, busy in ((turn, "to measure"), (hush, "to train")):
            while not take(file, fcntl.LOCK_EX):
                if time.monotonic() - begun_s > timeout_s:
                    raise TrialError("latency", _why(timeout_s, file, busy))
                time.sleep(_POLL_S)
        try:
            yield time.monotonic() - begun_s
        finally:
            fcntl.flock(hush, fcntl.LOCK_UN)
            if take(turn, fcntl.LOCK_SH):  # which shuts out whoever measures next, not whoever trains
                time.sleep(_BREATH_S)
                fcntl.flock(turn, fcntl.LOCK_UN)
            time.sleep(2 * _POLL_S)  # so that whoever waits to measure comes before who just did


def _open(folder: Path | None) -> tuple[IO[Any], IO[Any]]:
    root = folder or locks_root()
    turn = open_lock(root / "autoprune-turn.lock")
    try:
        return turn, open_lock(root / "autoprune-quiet.lock")
    except BaseException:
        turn.close()
        raise


def _why(timeout_s: float, file: IO[Any], busy: str) -> str:
    holders = [f"{pid} ({_state(pid)})" for pid in _holders(file)]
    who = f"process {', '.join(holders)}" if holders else "a process that the system does not name"
    return f"waited {timeout_s:g} s for {who} {busy} no longer: a process that is stopped never gives way"


def _holders(file: IO[Any]) -> list[int]:
    """Return the processes that hold a lock of a file, by proc(5); none where that cannot be read."""
    inode = str(os.fstat(file.fileno()).st_ino)
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return []
    # Such as: 1: FLOCK  ADVISORY  READ 708 fe:00:1234567 0 EOF; with an arrow after the number for one that waits.
    fields = [line.split() for line in lines if " FLOCK " in line and "->" not in line]
    return sorted({int(each[4]) for each in fields if each[5].rsplit(":", 1)[-1] == inode} - {0})


def _state(pid: int) -> str:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "gone"
    state = next((line for line in text.splitlines() if line.startswith("State:")), "")
    return state.partition("(")[2].rstrip(")") or "unknown"
