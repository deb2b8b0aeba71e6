"""Throughput: examples per second at ever larger batches, until larger ones gain nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.deploy.session import open_session
from autoprune.measure.inference import (
    available_bytes,
    inputs_of,
    models_of,
    peak_bytes,
    reset_peak,
    target_of,
)

# A dip at one batch, where a runtime takes another kernel, is not yet the end.
_IN_VAIN = 2
_LEAST_RUNS = 3
# A batch twice as large takes about as much memory again as the last one added; the rest is for others.
_MOST_OF_MEMORY = 0.25


def throughputs(job: dict[str, Any]) -> dict[str, Any]:
    """Sweep every model of a job, the dense one last, in random order.

    Returns:
        Under ``runs_s`` for each model the seconds of its runs as ``[batch, seconds]``; under ``ended_early`` whether
        its time ended before larger batches gained nothing.
    """
    paths = models_of(job)
    found: list[list[Any]] = [[] for _ in paths]
    early = [False for _ in paths]
    for index in np.random.default_rng(job["seed"]).permutation(len(paths)):
        found[index], early[index] = sweep(paths[index], job)
    return {"runs_s": found, "ended_early": early}


def sweep(path: str, job: dict[str, Any]) -> tuple[list[tuple[int, list[float]]], bool]:
    """Time batches of 1, 2, 4 … examples, one inference after another.

    It ends at ``most_batch``; where a run of the next batch would take longer than ``most_run_s``, or more than a
    quarter of the free memory; where two doublings in a row gained less than ``least_gain`` of the examples per second;
    after ``limit_s`` seconds; or where the runtime fails, unless that is the first batch. A file with a fixed batch is
    run with that batch alone.

    Returns:
        Batches with the seconds of their runs; and whether it was the limit of seconds that ended it.
    """
    session = open_session(target_of(job, path), Path(path))
    batch, most = (session.fixed_batch,) * 2 if session.fixed_batch else (1, job["most_batch"])
    found: list[tuple[int, list[float]]] = []
    best_per_s, in_vain, begun = 0.0, 0, time.perf_counter()
    while batch <= most:
        before = peak_bytes() if reset_peak() else None
        try:
            runs_s = _runs_s(session.timer(inputs_of(job, batch)), job["block_s"])
        except Exception:
            if not found:
                raise
            break  # out of memory, in whatever words
        found.append((batch, runs_s))
        run_s, after = float(np.median(runs_s)), peak_bytes()
        gained = batch / run_s > (1.0 + job["least_gain"]) * best_per_s
        best_per_s, in_vain = max(best_per_s, batch / run_s), 0 if gained else in_vain + 1
        grown = 0 if before is None or after is None else after - before
        full = grown * 2 > _MOST_OF_MEMORY * (available_bytes() or np.inf)
        if in_vain == _IN_VAIN or full or 2 * run_s > job["most_run_s"]:
            break
        if 2 * batch <= most and time.perf_counter() - begun > job["limit_s"]:
            return found, True
        batch *= 2
    return found, False


def _runs_s(once_s: Any, seconds: float) -> list[float]:
    """Return the seconds of runs that fill a block, after one that warms up."""
    once_s()
    found = [once_s() for _ in range(_LEAST_RUNS)]
    while sum(found) < seconds:
        found.append(once_s())
    return found
