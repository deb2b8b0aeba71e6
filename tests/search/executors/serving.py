"""What test workers do in place of a bench: everything that can go wrong with one, by the name of the request."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from autoprune.search.executors.contract import Reference, Reply, Request


def serve(given: Any) -> Callable[[Any, Callable[[], bool]], Any]:
    """Return what answers requests; ``given`` may say how starting fails."""
    if given == "raise":
        raise RuntimeError("the data is not there")
    if given == "exit":
        os._exit(3)
    reference: list[Reference] = []

    def answer(request: Any, stopped: Callable[[], bool]) -> Any:
        if isinstance(request, Reference):
            reference[:] = [request]
            return None
        return _answer(request, stopped, reference)

    return answer


def _answer(request: Request, stopped: Callable[[], bool], reference: list[Reference]) -> Reply:
    what, _, number = request.name.partition(" ")
    _misbehave(what, number)
    if what == "train":
        while not stopped():
            time.sleep(0.02)
        return Reply(request.token, steps=7)
    if what == "fail":
        return Reply(request.token, failure=("nan", "the loss became NaN"))
    if what == "full":
        return Reply(request.token, fault="No space left on device")
    if what == "sleep":
        time.sleep(float(number))
    if what == "where":
        return Reply(request.token, score=float(os.getpid()), timings={"cores": [float(c) for c in _cores()]})
    if what == "reference":
        return Reply(request.token, score=float(len(reference)))
    return Reply(request.token, score=float(request.token))


def _misbehave(what: str, number: str) -> None:
    if what == "exit":
        os._exit(int(number))
    if what in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    hog = []
    while what == "memory":
        hog.append(bytearray(64_000_000))
    while what == "hang":
        time.sleep(0.05)


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))
