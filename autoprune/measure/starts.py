"""Cold starts: from opening a model file to its first result, in processes that have opened nothing before."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.bound import end_with
from autoprune.deploy.session import load_runtime, open_session
from autoprune.measure.inference import inputs_of, models_of, target_of

_TIMEOUT_S = 300.0


def cold_starts(job: dict[str, Any]) -> dict[str, Any]:
    """Start every model of a job, the dense one last, once a round in random order.

    A start is a process forked from this one, which has loaded Python and NumPy but no runtime. It loads the runtime's
    library and makes its inputs; then the clock runs from opening the file to the first result. What compilers kept of
    an earlier run (torch.compile's cache) is there.

    Returns:
        Under ``starts_s`` the seconds of each start by model, equally many of each.

    Raises:
        RuntimeError: If a start fails, or the least of them take longer than they may; ``too_long`` is its text.
    """
    generator = np.random.default_rng(job["seed"])
    paths = models_of(job)
    for path in paths:
        _into_cache(Path(path))
    begun = time.perf_counter()
    start_s(job["dense"], job)  # brings the runtime's library into the system's cache
    if job["too_long"] and job["least_starts"] * (time.perf_counter() - begun) > job["limit_s"]:
        raise RuntimeError(job["too_long"])
    found: list[list[float]] = [[] for _ in paths]
    begun = time.perf_counter()
    for done in range(job["starts"]):
        if done >= job["least_starts"] and time.perf_counter() - begun > job["limit_s"] * len(paths):
            break
        for index in generator.permutation(len(paths)):
            found[index].append(start_s(paths[index], job))
    return {"starts_s": found}


def start_s(path: str, job: dict[str, Any]) -> float:
    """Return the seconds of one start in a process of its own.

    Raises:
        RuntimeError: If it fails or takes longer than five minutes.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_start, args=(path, job, there, os.getpid()), daemon=True)
    child.start()
    there.close()
    try:
        told = here.recv() if here.poll(_TIMEOUT_S) else f"a start took longer than {_TIMEOUT_S:g} s"
    except EOFError:
        told = "a process that was to start it ended without a word"
    finally:
        child.kill()
        child.join()
    if isinstance(told, str):
        raise RuntimeError(told)
    return float(told)


def _start(path: str, job: dict[str, Any], answer: Connection, parent: int) -> None:
    """Open a model and send the seconds to its first result, or what went wrong."""
    end_with(parent)  # it has the parent's lock of the machine too
    try:
        target = target_of(job, path)
        load_runtime(target)
        inputs = inputs_of(job, target.batch)
        begun = time.perf_counter()
        session = open_session(target, Path(path))
        opened_s = time.perf_counter() - begun
        if session.fixed_batch and session.fixed_batch != target.batch:
            inputs = inputs_of(job, session.fixed_batch)
        begun = time.perf_counter()
        session.timer(inputs)()
        answer.send(opened_s + time.perf_counter() - begun)
    except Exception as error:  # told to who asked, whatever it is
        answer.send(f"{type(error).__name__}: {error}")


def _into_cache(path: Path) -> None:
    """Read a file, and what lies beside it under its name, so that the disk is in no figure."""
    for each in path.parent.glob(f"{path.name}*"):
        if each.is_file():
            each.read_bytes()
