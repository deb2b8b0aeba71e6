"""Workers on this machine: spawned processes, each on its share of the processors or on its GPU."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import resource_tracker
from typing import Any

from autoprune.errors import TrialError, WorkerError
from autoprune.search.events import WorkerState
from autoprune.search.executors.contract import HUNG, INTERRUPTED, WORKER_LOST, Reference, Reply, Request
from autoprune.search.executors.limits import RequestLimits
from autoprune.search.executors.seating import Occupation
from autoprune.search.executors.worker import HELD_BACK, Seat, main, serve_bench

# Seconds without a sign of life after which a worker counts as lost: it is stopped, or its machine is swamped.
LEASE_S = 60.0
# Starts of one worker in a row that may fail.
_MAX_STARTS = 3
_LOOK_S = 0.2
# The first sign of life comes once Python and the libraries are loaded, which a busy disk makes slow.
_START_S = 300.0


def seats(count: int, gpus: Sequence[str] = ()) -> list[Seat]:
    """Share out the processors and GPUs of this machine.

    Args:
        count: Workers.
        gpus: Names of the GPUs; workers beyond their number share them.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    found = []
    for number in range(count):
        own = cores[len(cores) * number // count : len(cores) * (number + 1) // count]
        gpu = gpus[number % len(gpus)] if gpus else None
        found.append(Seat(number, tuple(own or [cores[number % len(cores)]]), gpu))
    return found


class LocalExecutor:
    """Runs requests in processes of this machine.

    A worker that dies or gives no sign of life costs the request that it had; another one takes its place.

    Args:
        given: What workers are made of: the setup and the workload, which have to be picklable.
        seats: What each worker has of the machine.
        limits: How long requests may take.
        serve: Makes what answers requests in the worker.
        lease_s: Seconds without a sign of life after which a worker is given up.
    """

    def __init__(
        self,
        given: Any,
        seats: Sequence[Seat],
        limits: RequestLimits,
        serve: Callable[[Any], Callable[[Any, Any], Any]] = serve_bench,
        lease_s: float = LEASE_S,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        _quiet_tracker()
        self._starter = ThreadPoolExecutor(1, "starter", _hold_signals_back)
        self._stopping = context.RawValue("b", 0)
        self._ended = threading.Event()
        self._tokens = itertools.count()
        self._workers = [
            _Worker(context, self._starter, seat, given, serve, self._stopping, self._ended, limits, lease_s)
            for seat in seats
        ]
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)

    @property
    def size(self) -> int:
        """Requests that run side by side."""
        return len(self._workers)

    def start(self) -> None:
        """Start all workers; :meth:`run` waits until one is ready."""
        for worker in self._workers:
            worker.start()

    def adopt_dense(self, reference: Reference) -> None:
        """Tell every worker, also those that take a dead one's place, what candidates are measured against."""
        for worker in self._workers:
            worker.reference = reference

    def next_token(self) -> int:
        """Return a number that no other request has."""
        return next(self._tokens)

    def run(self, request: Request) -> Reply:
        """Wait for a worker, let it do the work, and return what came of it; see :class:`Executor`."""
        worker = self._free.get()
        try:
            return worker.run(request).check()
        finally:
            self._free.put(worker)

    def ask_to_end(self) -> None:
        """Let trainings end in order, with the steps that they have taken."""
        self._stopping.value = 1

    def states(self) -> tuple[WorkerState, ...]:
        """Return what each worker does now."""
        return tuple(worker.state() for worker in self._workers)

    def stop(self) -> None:
        """End all that runs at once."""
        self._ended.set()

    def close(self) -> None:
        """Let all workers go; nothing of them is left running."""
        self._ended.set()
        for worker in self._workers:
            worker.kill()
        self._starter.shutdown()


def _hold_signals_back() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)


def _quiet_tracker() -> None:
    """Start Python's tracker of semaphores without its warning.

    Workers are ended by SIGKILL, so that they leave semaphores of libraries behind. The tracker removes them, as it
    should, and would then tell the user of a leak.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [before, "ignore:resource_tracker:UserWarning"]))
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


class _Worker:
    """One seat, and the process that has it."""

    def __init__(
        self,
        context: Any,
        starter: ThreadPoolExecutor,
        seat: Seat,
        given: Any,
        serve: Callable[[Any], Callable[[Any, Any], Any]],
        stopping: Any,
        ended: threading.Event,
        limits: RequestLimits,
        lease_s: float,
    ) -> None:
        self.seat = seat
        self.reference: Reference | None = None
        self._told: Reference | None = None
        self._context, self._starter, self._given, self._serve = context, starter, given, serve
        self._stopping, self._ended = stopping, ended
        self._limits, self._lease_s = limits, lease_s
        # Guards the two below, which one thread may end while another begins.
        self._lock = threading.Lock()
        self._process: Any = None
        self._connection: Any = None
        self._is_ready = self._is_heard = False
        self._occupation = Occupation("idle")

    def start(self) -> None:
        """Start a process in this seat, unless there is one.

        Raises:
            TrialError: If all is to end.
        """
        with self._lock:
            if self._ended.is_set():
                raise TrialError(INTERRUPTED, "stopped at once")
            if self._process is not None:
                return
            self._connection, theirs = self._context.Pipe()
            process = self._context.Process(
                target=main, args=(theirs, self.seat, self._stopping, self._serve)
            )
            self._occupation.set("starting")
            # By a thread that lives as long as the executor: see end_with.
            try:
                self._starter.submit(process.start).result()
            except OSError as error:
                raise WorkerError(
                    f"worker {self.seat.number} cannot be started: {error}",
                    "this machine has no room for another process: give fewer --workers",
                ) from error
            self._process = process
            theirs.close()
            self._is_ready, self._is_heard, self._told = False, False, None
            # Beside, because it is more than a pipe holds, and a process that is stopped reads nothing.
            threading.Thread(target=self._hand, args=(self._connection,), daemon=True).start()

    def _hand(self, connection: Any) -> None:
        """Send what the worker is made of; one that died meanwhile is found when it is waited for."""
        with suppress(OSError, TypeError):  # TypeError: the connection was closed meanwhile
            connection.send(self._given)

    def run(self, request: Request) -> Reply:
        """Do one request in the process."""
        self._make_ready()
        begun_s = time.monotonic()
        limit_s = self._limits.of(request)
        self._occupation.set(request.name, busy=True)
        try:
            if self.reference is not self._told:
                self._connection.send(self.reference)
                self._told = self.reference
            self._connection.send(request)
            while True:
                kind, content = self._next(begun_s, limit_s)
                if kind == "reply" and content.token == request.token:
                    self._limits.took(request, time.monotonic() - begun_s)
                    reply: Reply = content
                    return reply
        except (EOFError, OSError):
            raise self._gone() from None
        finally:
            if self._process is not None:
                self._occupation.set("idle")

    def _make_ready(self) -> None:
        """Wait for the process to be ready; one that dies on the way is started again, a few times."""
        for _ in range(_MAX_STARTS):
            self.start()
            try:
                while not self._is_ready:
                    kind, content = self._next(0.0, None)
                    if kind == "failed":
                        raise WorkerError(f"worker {self.seat.number} cannot start: {content[0]}", content[1])
                    self._is_ready = kind == "ready"
                return
            except (EOFError, OSError):
                error = self._gone()
                if error.kind != WORKER_LOST:
                    raise error from None
        raise WorkerError(
            f"worker {self.seat.number} died {_MAX_STARTS} times while it started: {error.reason}",
            "see what it wrote above; a script that searches needs `if __name__ == '__main__':` around its calls",
        )

    def _next(self, begun_s: float, limit_s: float | None) -> tuple[str, Any]:
        """Return the next message; what begun at ``begun_s`` may take ``limit_s`` seconds.

        Raises:
            TrialError: If there is none in time, or all is to end.
            EOFError: If the process is gone.
        """
        heard_s = time.monotonic()
        lease_s = self._lease_s if self._is_heard else max(self._lease_s, _START_S)
        # Until its first word a process loads Python's libraries, which may come from far away.
        while not self._connection.poll(_LOOK_S):
            now_s = time.monotonic()
            if self._ended.is_set():
                self.kill()
                raise TrialError(INTERRUPTED, "stopped at once")
            if now_s - heard_s > lease_s:
                how = f"gave no sign of life for {lease_s:g} s"
                self._occupation.lost += 1
                self.kill(how)
                raise TrialError(WORKER_LOST, f"worker {self.seat.number} {how}")
            if limit_s is not None and now_s > begun_s + limit_s:
                raise self._hung(limit_s)
        if self._ended.is_set():  # whatever it says now: all that runs ends
            self.kill()
            raise TrialError(INTERRUPTED, "stopped at once")
        if limit_s is not None and time.monotonic() > begun_s + limit_s:
            raise self._hung(limit_s)
        message: tuple[str, Any] = self._connection.recv()
        self._is_heard = True
        return message

    def _hung(self, limit_s: float) -> TrialError:
        self._occupation.lost += 1
        self.kill("hung")
        return TrialError(HUNG, f"ran longer than {limit_s:.0f} s; its worker was ended")

    def _gone(self) -> TrialError:
        """Return why the process is gone, and clear the seat."""
        process = self._process
        if process is None:  # ended by who closed the executor
            return TrialError(INTERRUPTED, "stopped at once")
        process.join(5.0)
        code = process.exitcode
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {_name(-code)}"
            if code == -signal.SIGKILL:
                how += " (by hand, or the system was out of memory)"
        self._occupation.lost += 1
        self.kill(how)
        return TrialError(WORKER_LOST, f"worker {self.seat.number} {how}")

    def kill(self, why: str = "ended") -> None:
        """End the process, and what it measures with, if there is one."""
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            self._is_ready = False
            self._occupation.set(why)
            process.kill()
            process.join()
            self._connection.close()

    def state(self) -> WorkerState:
        """Return what it does now."""
        return self._occupation.state(f"worker {self.seat.number}", socket.gethostname())


def _name(number: int) -> str:
    """Return the name of a signal; some real-time ones have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
