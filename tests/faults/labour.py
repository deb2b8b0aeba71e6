"""What the workers of a crew do in place of trials: figures that follow from the recipe, a file written in two halves.

Torch-free, so that a worker starts in a second.
"""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune.search.baselines import effective_key
from autoprune.search.executors.contract import Reference, Reply, Request
from autoprune.search.outcome import Outcome
from autoprune.space.recipe import Recipe
from tests.faults import records
from tests.faults.setups import memory_group
from tests.study.made import make_groups, make_measurement

MODEL = "model.onnx"
GROUPS = make_groups((64, 64, 128, 128))
# What workers report as a real one does.
FAILURES = {
    "raise": ("raised", "RuntimeError: the kernel has no such shape"),
    "nan": ("nan", "latency ratio is nan"),
    "inf": ("inf", "latency ratio is inf"),
}


@dataclass(frozen=True)
class Labour:
    """What workers are told.

    Attributes:
        log: Where each evaluation is written down.
        trial_s: Seconds of a trial.
        plan: What goes wrong, ``nan@3,hang@5*,exit@7+``: in the third evaluation of the study, in that of the fifth
            recipe whenever it is tried, in all from the seventh.
    """

    log: Path
    trial_s: float = 0.05
    plan: str = ""


def content(recipe: Recipe) -> bytes:
    """Return the model file of a recipe: whoever finds another content finds another's, or half a file."""
    digest = hashlib.sha256(recipe.model_dump_json().encode()).digest()
    return digest * 2048


def serve(given: Labour) -> Callable[[Any, Callable[[], bool]], Reply | None]:
    """Return what does the requests of a study."""
    os.environ[records.LOG] = str(given.log)
    records.write(worker=os.getpid())
    if given.plan.startswith("start"):
        os._exit(3)

    def answer(request: Any, stopped: Callable[[], bool]) -> Reply | None:
        return None if isinstance(request, Reference) else do(given, request, stopped)

    return answer


def do(given: Labour, request: Request, stopped: Callable[[], bool]) -> Reply:
    """Do one request."""
    assert request.folder is not None
    what = _asked(given, request.recipe)
    records.write(began=effective_key(request.recipe, GROUPS), pid=os.getpid(), token=request.token)
    whole = content(request.recipe)
    try:
        with (request.folder / MODEL).open("wb") as file:
            file.write(whole[: len(whole) // 2])
            file.flush()
            _misbehave(what)
            _pass(given.trial_s, stopped)
            file.write(whole[len(whole) // 2 :])
    except MemoryError:
        return Reply(request.token, failure=("out-of-memory", "MemoryError"))
    if what in FAILURES:
        return Reply(request.token, failure=FAILURES[what])
    measured = make_measurement(request.recipe, GROUPS)
    return Reply(request.token, outcome=Outcome(measured, 0, request.recipe.recovery.finetune_steps))


def _asked(given: Labour, recipe: Recipe) -> str:
    keys = [line["began"] for line in records.read(given.log) if "began" in line]
    keys.append(effective_key(recipe, GROUPS))
    for part in filter(None, given.plan.split(",")):
        what, _, number = part.partition("@")
        index = int(number.rstrip("+*"))
        if number.endswith("+") and len(keys) >= index:
            return what
        if len(keys) == index or (number.endswith("*") and len(keys) > index and keys[-1] == keys[index - 1]):
            return what
    return ""


def _pass(seconds: float, stopped: Callable[[], bool]) -> None:
    """Take time, as a training that can be asked to end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stopped():
        time.sleep(0.005)


def _memory() -> int:
    """Return the bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _misbehave(what: str) -> None:
    if what == "exit":
        os._exit(7)
    if what in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    if what == "group":
        memory_group(_memory() + (1 << 28))
        hoard = [bytearray(b"x" * (32 << 20)) for _ in range(64)]
        raise AssertionError(f"{len(hoard)} times 32 MiB were allowed")
    if what in ("memory", "data"):
        # What the process has, and a quarter of a gigabyte.
        limit = resource.RLIMIT_AS if what == "memory" else resource.RLIMIT_DATA
        pages = int(Path("/proc/self/statm").read_text().split()[0 if what == "memory" else 5])
        most = pages * resource.getpagesize() + (1 << 28)
        resource.setrlimit(limit, (most, resource.RLIM_INFINITY))
        hoard = []
        try:
            while True:
                hoard.append(bytearray(b"x" * (32 << 20)))
        finally:
            hoard.clear()
            resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    while what == "hang":
        time.sleep(0.05)
