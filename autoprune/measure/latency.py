"""Latency: candidate and dense model interleaved in processes of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoprune.measure.figures import MEMORY_RUN, RunProtocol, figure_jobs, gather
from autoprune.measure.gpu import over
from autoprune.measure.process import TIMEOUT_S, run_session
from autoprune.measure.record import GpuState, Latency, RunFigures
from autoprune.measure.stats import median_ratio_interval, percentile_or_none
from autoprune.target import Target


@dataclass(frozen=True)
class LatencyProtocol:
    """How long and how carefully latency is measured.

    Attributes:
        processes: Processes that measure one after the other; each has a memory layout of its own, which moves a
            ratio by more than what is seen inside one process.
        sessions: Times that each process opens the models anew; three at least, more while there is time.
        rounds: Rounds of each session, in which every model is timed once, in random order.
        block_s: Seconds of runs that make one timing.
        warmup_s: Seconds of warm-up of each session, all models together.
        limit_s: Seconds after which a session ends early, for each model; three rounds are always run. After so
            many for each session and model, a process opens them no more.
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


# Short sessions, and many: with three of seven rounds each, 5 % were found in fewer than half of the runs.
SEARCH_PROTOCOL = LatencyProtocol(
    processes=1, sessions=9, rounds=3, block_s=0.008, warmup_s=0.05, limit_s=0.4, repeats=1
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
    run: RunProtocol = MEMORY_RUN,
    timeout_s: float = TIMEOUT_S,
) -> tuple[Latency, RunFigures]:
    """Time one model file against the dense one, and measure what else running it takes.

    Args:
        candidate: Model file.
        dense: Model file of the dense network.
        target: Threads and batch.
        input_shape: Shape of one example, without the batch.
        protocol: How long latency is measured.
        run: What is measured besides; its peak memory if not given.
        timeout_s: Seconds after which the measurement has failed, waiting for others included.

    Raises:
        TrialError: If the process fails; holds its last line.
    """
    return measure_front(
        [candidate], dense, target, input_shape, protocol=protocol, run=run, timeout_s=timeout_s
    )[0]


def measure_front(
    candidates: Sequence[Path],
    dense: Path,
    target: Target,
    input_shape: Sequence[int],
    *,
    protocol: LatencyProtocol = FINAL_PROTOCOL,
    run: RunProtocol = MEMORY_RUN,
    targets: Mapping[Path, Target] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[tuple[Latency, RunFigures]]:
    """Measure many model files and the dense one in one session, interleaved; see :func:`measure_latency`.

    Nobody else measures on this machine meanwhile.

    Args:
        candidates: Model files.
        dense: Model file of the dense network.
        target: Threads and batch.
        input_shape: Shape of one example, without the batch.
        protocol: How long latency is measured.
        run: What is measured besides.
        targets: Other targets of some files, of the same runtime, such as one that computes in another precision.
        timeout_s: Seconds after which the measurement has failed, waiting for others included.
    """
    base: dict[str, Any] = {
        "models": [str(path) for path in candidates],
        "dense": str(dense),
        "target": target.model_dump(mode="json"),
        "targets": {str(path): own.model_dump(mode="json") for path, own in (targets or {}).items()},
        "input_shape": list(input_shape),
    }
    timing: dict[str, Any] = {
        **base,
        "kind": "latency",
        "sessions": protocol.sessions,
        "rounds": protocol.rounds,
        "block_s": protocol.block_s,
        "warmup_s": protocol.warmup_s * (len(candidates) + 1) / 2,
        "limit_s": protocol.limit_s,
        "repeats": protocol.repeats,
        "noise_limit": protocol.noise_limit,
    }
    jobs = [{**timing, "seed": seed} for seed in range(protocol.processes)]
    jobs += figure_jobs(run, base)
    results = run_session(jobs, timeout_s)
    latencies = _latencies(results[: protocol.processes], len(candidates))
    return list(zip(latencies, gather(run, jobs, results), strict=True))


def _latencies(results: Sequence[dict[str, Any]], count: int) -> list[Latency]:
    """Return the latency of each candidate from what the timing processes found."""

    def samples_ms_of(index: int) -> NDArray[np.float64]:
        return 1e3 * np.concatenate([result["samples_s"][index] for result in results])

    dense_ms = samples_ms_of(count)
    noisy = sum(bool(result["noisy"]) for result in results) > len(results) / 2
    gpu = over(GpuState.model_validate(result["gpu"]) for result in results if result["gpu"] is not None)
    found = []
    for index in range(count):
        samples_ms = samples_ms_of(index)
        sessions = [np.array(ratios) for result in results for ratios in result["ratios"][index]]
        ratio, interval = median_ratio_interval(sessions)
        found.append(
            Latency(
                latency_ms=float(np.median(samples_ms)),
                latency_p95_ms=percentile_or_none(samples_ms, 95),
                dense_ms=float(np.median(dense_ms)),
                ratio=ratio,
                ratio_ci=interval,
                samples=len(samples_ms),
                noisy=noisy,
                gpu=gpu,
            )
        )
    return found
