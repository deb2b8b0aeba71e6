"""Latency: candidate and dense model interleaved in a process of their own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import autoprune
from autoprune.errors import TrialError
from autoprune.measure.gpu import over
from autoprune.measure.lock import is_locked
from autoprune.measure.record import GpuState, Latency
from autoprune.measure.stats import median_ratio_interval, percentile_or_none
from autoprune.target import Target

# Waiting for another measurement's lock counts, so this is generous.
_TIMEOUT_S = 1800.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatencyProtocol:
    """How long and how carefully latency is measured.

    Attributes:
        processes: Processes that measure one after the other; each has a memory layout of its own, which moves a
            ratio by more than what is seen inside one process.
        sessions: Times that each process opens the models anew.
        rounds: Rounds of each session, in which every model is timed once, in random order.
        block_s: Seconds of runs that make one timing.
        warmup_s: Seconds of warm-up of each session, all models together.
        limit_s: Seconds after which a session ends early, for each model; three rounds are always run.
        repeats: Passes that may follow a noisy one.
        noise_limit: Largest interquartile range of the dense model's blocks as a share of their median.
    """

    processes: int
    sessions: int
    rounds: int
    block_s: float
    warmup_s: float
    limit_s: float
    repeats: int
    noise_limit: float = 0.1


SEARCH_PROTOCOL = LatencyProtocol(
    processes=1, sessions=3, rounds=7, block_s=0.008, warmup_s=0.1, limit_s=1.0, repeats=1
)
# Many models in one session: their differences matter, not each one's interval.
PROFILE_PROTOCOL = LatencyProtocol(
    processes=2, sessions=1, rounds=5, block_s=0.006, warmup_s=0.1, limit_s=0.6, repeats=0
)
FINAL_PROTOCOL = LatencyProtocol(
    processes=9, sessions=1, rounds=9, block_s=0.012, warmup_s=0.1, limit_s=2.0, repeats=2
)


def measure_latency(
    candidate: Path,
    dense: Path,
    target: Target,
    input_shape: Sequence[int],
    *,
    protocol: LatencyProtocol,
    timeout_s: float = _TIMEOUT_S,
) -> tuple[Latency, int | None]:
    """Time one model file against the dense one, and measure its peak memory.

    Args:
        candidate: Model file.
        dense: Model file of the dense network.
        target: Threads and batch.
        input_shape: Shape of one example, without the batch.
        protocol: How long to measure.
        timeout_s: Seconds after which the measurement has failed, waiting for others included.

    Returns:
        The latency, and the peak memory in bytes or None where it cannot be read.

    Raises:
        TrialError: If the process fails; holds its last line.
    """
    return measure_front([candidate], dense, target, input_shape, protocol=protocol, timeout_s=timeout_s)[0]


def measure_front(
    candidates: Sequence[Path],
    dense: Path,
    target: Target,
    input_shape: Sequence[int],
    *,
    protocol: LatencyProtocol = FINAL_PROTOCOL,
    timeout_s: float = _TIMEOUT_S,
    memory: bool = True,
) -> list[tuple[Latency, int | None]]:
    """Time many model files and the dense one interleaved in one session; see :func:`measure_latency`.

    ``memory`` is whether each one's peak memory is measured too, in a process of its own.
    """
    job: dict[str, Any] = {
        "kind": "latency",
        "models": [str(path) for path in candidates],
        "dense": str(dense),
        "target": target.model_dump(mode="json"),
        "input_shape": list(input_shape),
        "sessions": protocol.sessions,
        "rounds": protocol.rounds,
        "block_s": protocol.block_s,
        "warmup_s": protocol.warmup_s * (len(candidates) + 1) / 2,
        "limit_s": protocol.limit_s,
        "repeats": protocol.repeats,
        "noise_limit": protocol.noise_limit,
        "seed": 0,
    }
    results = [run_worker({**job, "seed": seed}, timeout_s) for seed in range(protocol.processes)]

    def samples_ms_of(index: int) -> NDArray[np.float64]:
        return 1e3 * np.concatenate([result["samples_s"][index] for result in results])

    dense_ms = samples_ms_of(len(candidates))
    gpu = over(GpuState.model_validate(result["gpu"]) for result in results if result["gpu"] is not None)
    measured = []
    for index, path in enumerate(candidates):
        samples_ms = samples_ms_of(index)
        sessions = [np.array(ratios) for result in results for ratios in result["ratios"][index]]
        ratio, interval = median_ratio_interval(sessions)
        latency = Latency(
            latency_ms=float(np.median(samples_ms)),
            latency_p95_ms=percentile_or_none(samples_ms, 95),
            dense_ms=float(np.median(dense_ms)),
            ratio=ratio,
            ratio_ci=interval,
            samples=len(samples_ms),
            noisy=sum(bool(result["noisy"]) for result in results) > len(results) / 2,
            gpu=gpu,
        )
        peak = run_worker({**job, "kind": "memory", "models": [str(path)]}, timeout_s) if memory else {}
        measured.append((latency, peak.get("memory_bytes")))
    return measured


def run_worker(job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Run a measurement process and return its result.

    Raises:
        TrialError: If it fails, takes too long, or its output cannot be read.
    """
    if is_locked(job.get("lock")):
        _log.warning("waiting for another measurement on this machine")
    home = str(Path(autoprune.__file__).resolve().parents[1])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "autoprune.measure.worker"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            # Ctrl-C goes to the terminal's whole group; the driver decides what it means.
            start_new_session=True,
            check=False,
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise TrialError("latency", f"the measurement failed: {last}")
        result: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise TrialError("latency", f"the measurement took longer than {timeout_s:g} s") from error
    except ValueError as error:
        raise TrialError("latency", f"the measurement's result cannot be read: {error}") from error
    return result
