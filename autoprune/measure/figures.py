"""Run figures of a session: memory, cold start, throughput and energy, what they take, and why one is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autoprune.measure.energy import find_meter
from autoprune.measure.record import RUN_FIGURES, RunFigures


@dataclass(frozen=True)
class RunProtocol:
    """What is measured besides latency, how often and how long.

    Attributes:
        memory: Whether each model's peak memory is measured, in a process of its own.
        starts: Cold starts of each model; 0 for none.
        passes: Processes that measure throughput one after the other; 0 for none.
        energy_rounds: Blocks of each model over which energy is counted; 0 for none.
        limit_s: Seconds for each model, after which cold starts, throughput and energy end at their least: three
            starts, the batch of one, one block of energy.
        block_s: Seconds of runs of each batch.
        most_batch: Largest batch.
        most_run_s: Longest run of a batch, seconds.
        least_gain: Share by which a doubling of the batch has to raise the examples per second to count as a gain.
        bounded: Whether the limit holds for those least as well, so that what does not fit is left out.
        why_not: Why what it leaves out is left out.
    """

    memory: bool = True
    starts: int = 5
    passes: int = 2
    energy_rounds: int = 3
    limit_s: float = 6.0
    block_s: float = 0.05
    most_batch: int = 256
    most_run_s: float = 0.25
    least_gain: float = 0.02
    bounded: bool = False
    why_not: str = ""


NO_TIME = "the budget left no time for it"
FULL_RUN = RunProtocol()
MEMORY_RUN = RunProtocol(
    starts=0, passes=0, energy_rounds=0, limit_s=0.0, why_not="trials measure latency and memory alone"
)
NO_RUN = replace(MEMORY_RUN, memory=False, why_not="latency alone was measured")
# Of the seconds for a model; the rest is for starting processes.
_SHARES = {"starts": 0.3, "throughput": 0.35, "energy": 0.3}
_LEAST_STARTS = 3


def within(seconds: float) -> RunProtocol:
    """Return the protocol that takes about so many seconds for each model, the full one if that takes less.

    Args:
        seconds: For each model; below half a second memory alone is measured.
    """
    if seconds < 0.5:
        return replace(MEMORY_RUN, why_not=NO_TIME)
    # Two short sweeps of throughput would end before either has found the best batch.
    passes = FULL_RUN.passes if seconds >= FULL_RUN.limit_s else 1
    return replace(FULL_RUN, limit_s=min(seconds, FULL_RUN.limit_s), passes=passes, bounded=True)


def figure_jobs(protocol: RunProtocol, base: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the jobs of a session that measure what a protocol asks for; see :func:`gather`.

    Args:
        protocol: What to measure.
        base: Models, dense model, target and shape of one example.
    """
    jobs: list[dict[str, Any]] = []
    if protocol.memory:
        paths = [*base["models"], *([base["dense"]] if protocol.starts else [])]
        jobs += [{**base, "kind": "memory", "models": [path]} for path in paths]

    def limit_s(part: str) -> float:
        return protocol.limit_s * _SHARES[part]

    if protocol.starts:
        job = {"kind": "starts", "starts": protocol.starts, "least_starts": _LEAST_STARTS, "seed": 0}
        job |= {"limit_s": limit_s("starts"), "too_long": NO_TIME if protocol.bounded else ""}
        jobs.append({**base, **job, "optional": True})
    for seed in range(protocol.passes):
        job = {"kind": "throughput", "limit_s": limit_s("throughput") / protocol.passes, "seed": seed}
        job |= {
            name: getattr(protocol, name) for name in ("block_s", "most_batch", "most_run_s", "least_gain")
        }
        jobs.append({**base, **job, "optional": True})
    if protocol.energy_rounds and not isinstance(find_meter(base["target"]["device"]), str):
        job = {"kind": "energy", "rounds": protocol.energy_rounds, "limit_s": limit_s("energy"), "seed": 0}
        jobs.append({**base, **job, "optional": True})
    return jobs


def gather(
    protocol: RunProtocol, jobs: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]
) -> list[RunFigures]:
    """Return the figures of every candidate, each with the dense network's beside it where that was measured.

    Args:
        protocol: As in :func:`figure_jobs`.
        jobs: All jobs of the session; those of other kinds are left alone.
        results: What came of them, in their order.
    """
    of: dict[str, list[dict[str, Any]]] = {}
    for job, result in zip(jobs, results, strict=True):
        of.setdefault(job["kind"], []).append(result)
    count = 1 + next(len(job["models"]) for job in jobs if job["kind"] != "memory")
    parts = [
        _memory(of.get("memory", []), count),
        _starts(of.get("starts", []), count),
        _throughput(of.get("throughput", []), count),
        _energy(of.get("energy", []), count, jobs[0]["target"]["device"]),
    ]
    asked = (protocol.memory, protocol.starts, protocol.passes, protocol.energy_rounds)
    left_out = {name: protocol.why_not for name, wanted in zip(RUN_FIGURES, asked, strict=True) if not wanted}
    each = []
    for index in range(count):
        values = {name: value for found, _ in parts for name, value in found[index].items()}
        missing = {name: why for _, reasons in parts for name, why in reasons.items()} | left_out
        each.append(
            RunFigures(**values, missing={n: why for n, why in missing.items() if values.get(n) is None})
        )
    dense = each[-1] if protocol.starts else None
    return [figures.model_copy(update={"dense": dense}) for figures in each[:-1]]


# For each model the figures that it has; and why it lacks those that it lacks.
_Part = tuple[list[dict[str, Any]], dict[str, str]]


def _memory(results: Sequence[dict[str, Any]], count: int) -> _Part:
    found = [{"memory_bytes": result["memory_bytes"]} for result in results]
    return found + [{}] * (count - len(found)), {"memory_bytes": "this system does not tell it"}


def _starts(results: Sequence[dict[str, Any]], count: int) -> _Part:
    for result in results:
        if "starts_s" in result:
            return [{"cold_start_ms": 1e3 * float(np.median(each))} for each in result["starts_s"]], {}
    return [{}] * count, {"cold_start_ms": _failure(results)}


def _throughput(results: Sequence[dict[str, Any]], count: int) -> _Part:
    passes = [result["runs_s"] for result in results if "runs_s" in result]
    if not passes:
        return [{}] * count, {"throughput_per_s": _failure(results)}
    if any(any(result.get("ended_early", ())) for result in results):
        # Of candidate and dense network alike: their best batches have to be found in the same way.
        return [{}] * count, {"throughput_per_s": f"{NO_TIME}: larger batches were still gaining"}
    found = []
    for index in range(count):
        runs: dict[int, list[float]] = {}
        for each in passes:
            for batch, seconds in each[index]:
                runs.setdefault(batch, []).extend(seconds)
        per_s, batch = max((batch / float(np.median(seconds)), batch) for batch, seconds in runs.items())
        found.append({"throughput_per_s": per_s, "throughput_batch": batch})
    return found, {}


def _energy(results: Sequence[dict[str, Any]], count: int, device: str) -> _Part:
    for result in results:
        if "energies_mj" in result:
            source = result["source"]
            return [
                {"energy_mj": float(np.median(each)), "energy_source": source}
                for each in result["energies_mj"]
            ], {}
    meter = find_meter(device)
    return [{}] * count, {"energy_mj": meter if isinstance(meter, str) else _failure(results)}


def _failure(results: Sequence[dict[str, Any]]) -> str:
    return next((str(result["failed"]) for result in results if "failed" in result), "it was not measured")
