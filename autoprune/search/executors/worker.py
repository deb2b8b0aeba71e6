"""A worker process: waits for requests on its connection, does them, and says all the while that it lives."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Protocol

from autoprune.bound import end_with
from autoprune.errors import AutopruneError

if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds between two signs of life.
BEAT_S = 1.0
# Signals that a worker is started with blocked, because until it ignores them they would end it with a traceback.
HELD_BACK = (signal.SIGINT, signal.SIGTERM)


class Flag(Protocol):
    """A byte that the driver and its workers share; no lock guards it, which a killed process would keep for ever."""

    value: int


@dataclass(frozen=True)
class Seat:
    """What a worker has of its machine.

    Attributes:
        number: From 0.
        cores: Processors that it may use.
        gpu: The GPU that it has; None for none.
    """

    number: int
    cores: tuple[int, ...]
    gpu: str | None = None


def main(
    connection: Connection, seat: Seat, stopping: Flag, serve: Callable[[Any], Callable[[Any, Any], Any]]
) -> None:
    """Run a worker until its connection is closed.

    Args:
        connection: Gets what ``serve`` is given first, then requests; ``("ready", pid)``, ``("beat", None)``,
            ``("reply", …)`` and ``("failed", …)`` go back.
        seat: What it has of the machine.
        stopping: Not 0 once the driver wants training to end.
        serve: Makes of the first message a function of a request, or of anything else that is sent, and of what says
            whether training is to end.
    """
    _settle(seat)
    lock = threading.Lock()

    def send(kind: str, content: object = None) -> None:
        with lock:
            connection.send((kind, content))

    threading.Thread(target=_beat, args=(send,), daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionError):
        try:
            answer = serve(connection.recv())
        except AutopruneError as error:
            send("failed", (error.message, error.hint))
            return
        except Exception as error:  # whatever a user's own model or data raises has to reach the user
            send("failed", (f"{type(error).__name__}: {error}", ""))
            return
        send("ready", os.getpid())
        while True:
            reply = answer(connection.recv(), lambda: bool(stopping.value))
            if reply is not None:
                send("reply", reply)


def _settle(seat: Seat) -> None:
    """Take the worker's share of the machine, before any library looks at it; leave signals to the driver."""
    driver = multiprocessing.parent_process()
    end_with(None if driver is None else driver.pid)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, seat.cores)
    if seat.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = seat.gpu
    # Ctrl-C goes to the terminal's whole group; the driver decides what it means.
    for number in HELD_BACK:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)


def _beat(send: Callable[[str], None]) -> None:
    """Say that this process lives; end it once nobody listens any more."""
    pause = threading.Event()
    while not pause.wait(BEAT_S):
        try:
            send("beat")
        except (OSError, ValueError):
            os._exit(1)


def serve_bench(given: Any) -> Callable[[Any, Any], Any]:
    """Return what does the requests of a study; ``given`` is a :class:`~autoprune.search.executors.work.Given`."""
    from autoprune.search.executors.work import serve

    return serve(given)
