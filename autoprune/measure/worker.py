"""The process that measures model files: alone under a machine-wide lock, while nothing trains, interleaved.

Run as ``python -m autoprune.measure.worker`` with a job as JSON on the standard input; the result is JSON on the
standard output. It loads the target's runtime and NumPy, and torch only where that is the runtime.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.bound import end_with
from autoprune.deploy.session import node_times, open_session
from autoprune.errors import TrialError
from autoprune.measure.energy import energies
from autoprune.measure.gpu import over, read_gpu
from autoprune.measure.inference import (
    Runner,
    inputs_of,
    models_of,
    peak_bytes,
    pin,
    reset_peak,
    resident_bytes,
    target_of,
)
from autoprune.measure.lock import lock_machine
from autoprune.measure.process import last_line
from autoprune.measure.quiet import quiet
from autoprune.measure.record import GpuState
from autoprune.measure.starts import cold_starts
from autoprune.measure.stats import spread, trimmed_mean
from autoprune.measure.throughput import throughputs

_LEAST_ROUNDS = 3
_LEAST_SESSIONS = 3


def main() -> None:
    """Read a job, measure, write the result."""
    job: dict[str, Any] = json.load(sys.stdin)
    end_with(job.get("parent"))
    if job.get("in_session"):
        result = work(job)
    else:
        try:
            with lock_machine(job.get("lock")), quiet(job["quiet_timeout_s"]):
                result = session(job) if job["kind"] == "session" else work(job)
        except TrialError as error:
            sys.exit(error.reason)
    json.dump(result, sys.stdout)


def session(job: dict[str, Any]) -> dict[str, Any]:
    """Run the jobs of a session one after the other, each in a process of its own, while this one holds the lock."""
    results: list[dict[str, Any]] = []
    for part in job["jobs"]:
        done = subprocess.run(
            [sys.executable, "-m", "autoprune.measure.worker"],
            input=json.dumps({**part, "in_session": True, "parent": os.getpid()}),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            results.append(json.loads(done.stdout))
            continue
        why = last_line(done.stderr, done.returncode)
        if not part.get("optional"):
            sys.exit(why)
        results.append({"failed": why})
    return {"results": results}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job in this process."""
    pin(target_of(job).threads)
    if job["kind"] == "memory":
        return {"memory_bytes": memory_bytes(job)}
    if job["kind"] == "nodes":
        return {"nodes": [times_of_nodes(path, job) for path in job["models"]]}
    kinds = {"starts": cold_starts, "throughput": throughputs, "energy": energies, "latency": measure}
    return kinds[job["kind"]](job)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Time all models of a job against its dense model; repeat noisy passes and keep the quietest."""
    generator = np.random.default_rng(job["seed"])
    begun_s = time.monotonic()
    best = one_pass(job, generator)
    for _ in range(job["repeats"]):
        if best["spread"] <= job["noise_limit"]:
            break
        best = min(best, one_pass(job, generator), key=lambda found: float(found["spread"]))
    noisy = best["spread"] > job["noise_limit"] or is_throttled(best["gpu"])
    return {**best, "noisy": noisy, "timed_s": [begun_s, time.monotonic()]}


def is_throttled(state: dict[str, Any] | None) -> bool:
    """Return whether a GPU ran slower than it can; see :class:`~autoprune.measure.record.GpuState`."""
    return state is not None and bool(GpuState.model_validate(state).throttled)


def one_pass(job: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
    """Time every model once a round in random order, over several sessions.

    Sessions are opened anew because memory is laid out anew with them, which moves a model's time by more than
    the spread inside one session.
    """
    paths = models_of(job)
    on_gpu = target_of(job).device == "cuda"
    states = [read_gpu()] if on_gpu else []
    samples: list[list[float]] = [[] for _ in paths]
    ratios: list[list[list[float]]] = [[] for _ in job["models"]]
    dense: list[float] = []
    begun = time.perf_counter()
    for done in range(job["sessions"]):
        limit_s = job["limit_s"] * len(paths) * job["sessions"]
        if done >= _LEAST_SESSIONS and time.perf_counter() - begun > limit_s:
            break
        order = generator.permutation(len(paths))
        opened = {i: Runner(paths[i], job) for i in order}
        runners = [opened[i] for i in range(len(paths))]
        for runner in runners:
            runner.warm_up(job["warmup_s"] / len(runners), job["block_s"])
        blocks = one_session(runners, job, generator, samples)
        dense += blocks[-1]
        for index, found in enumerate(ratios):
            found.append((np.array(blocks[index]) / np.array(blocks[-1])).tolist())
    state = over([*states, read_gpu()]) if on_gpu else None
    return {
        "samples_s": samples,
        "ratios": ratios,
        "spread": spread(np.array(dense)),
        "gpu": None if state is None else state.model_dump(mode="json"),
    }


def one_session(
    runners: list[Runner], job: dict[str, Any], generator: np.random.Generator, samples: list[list[float]]
) -> list[list[float]]:
    """Run the rounds of one session and return the median seconds of each block, by model; the last is dense."""
    blocks: list[list[float]] = [[] for _ in runners]
    begun = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(job["rounds"]):
            if done >= _LEAST_ROUNDS and time.perf_counter() - begun > job["limit_s"] * len(runners):
                break
            for index in generator.permutation(len(runners)):
                taken = runners[index].block_s()
                samples[index] += taken
                blocks[index].append(float(np.median(taken)))
    finally:
        gc.enable()
    return blocks


def memory_bytes(job: dict[str, Any]) -> int | None:
    """Return the peak memory that loading and running the first model adds to this process; None if unreadable."""
    before = resident_bytes()
    if not reset_peak():
        return None
    runner = Runner(job["models"][0], job)
    for _ in range(3):
        runner.once_s()
    after = peak_bytes()
    return None if before is None or after is None else max(0, after - before)


def times_of_nodes(path: str, job: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return name, operator and seconds of the nodes in the order of execution; None where the runtime is silent."""
    target = target_of(job)
    inputs = inputs_of(job, open_session(target, Path(path)).fixed_batch or target.batch)
    found = node_times(target, Path(path), inputs, job["runs"], job["limit_s"])
    return (
        None
        if found is None
        else [
            {
                "name": node.name,
                "operator": node.operator,
                "seconds": trimmed_mean(np.array(node.durations_s)),
            }
            for node in found
        ]
    )


if __name__ == "__main__":
    main()
