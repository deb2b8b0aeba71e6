"""The process that times model files: alone under a machine-wide lock, everything interleaved.

Run as ``python -m autoprune.measure.worker`` with a job as JSON on the standard input; the result is JSON on the
standard output. It loads the target's runtime and NumPy, and torch only where that is the runtime.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoprune.deploy.session import node_times, open_session
from autoprune.measure.gpu import over, read_gpu
from autoprune.measure.lock import lock_machine
from autoprune.measure.record import GpuState
from autoprune.measure.stats import spread, trimmed_mean
from autoprune.target import Target

_LEAST_ROUNDS = 3


class Runner:
    """One model file ready to be timed.

    Args:
        path: Model file.
        job: Target and shape of one example.
    """

    def __init__(self, path: str, job: dict[str, Any]) -> None:
        target = target_of(job)
        session = open_session(target, Path(path))
        self.once_s = session.timer(inputs_of(job, session.fixed_batch or target.batch))
        self.runs = 1

    def warm_up(self, seconds: float, block_s: float) -> None:
        """Run for ``seconds`` and choose how many runs make a block of ``block_s``."""
        begun = time.perf_counter()
        samples = [self.once_s() for _ in range(3)]
        while time.perf_counter() - begun < seconds:
            samples.append(self.once_s())
        self.runs = max(1, round(block_s / float(np.median(samples[len(samples) // 2 :]))))

    def block_s(self) -> list[float]:
        """Run one block and return the seconds of each run, after as many that warm the caches again."""
        for _ in range(self.runs):
            self.once_s()
        return [self.once_s() for _ in range(self.runs)]


def main() -> None:
    """Read a job, measure, write the result."""
    job: dict[str, Any] = json.load(sys.stdin)
    with lock_machine(job.get("lock")):
        pin(target_of(job).threads)
        if job["kind"] == "memory":
            result: dict[str, Any] = {"memory_bytes": memory_bytes(job)}
        elif job["kind"] == "nodes":
            result = {"nodes": [times_of_nodes(path, job) for path in job["models"]]}
        else:
            result = measure(job)
    json.dump(result, sys.stdout)


def pin(threads: int) -> None:
    """Keep this process on ``threads`` of its processors, on as many cores as there are, where the system allows it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, apart(sorted(os.sched_getaffinity(0), reverse=True))[:threads])


def apart(processors: list[int]) -> list[int]:
    """Order processors so that one of each core comes before the second ones of any."""
    seen: dict[str, int] = {}
    turns: list[tuple[int, int]] = []
    for place, number in enumerate(processors):
        path = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        core = path.read_text() if path.is_file() else str(number)
        seen[core] = seen.get(core, 0) + 1
        turns.append((seen[core], place))
    return [processors[place] for _, place in sorted(turns)]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Time all models of a job against its dense model; repeat noisy passes and keep the quietest."""
    generator = np.random.default_rng(job["seed"])
    best = one_pass(job, generator)
    for _ in range(job["repeats"]):
        if best["spread"] <= job["noise_limit"]:
            break
        best = min(best, one_pass(job, generator), key=lambda found: float(found["spread"]))
    return {**best, "noisy": best["spread"] > job["noise_limit"] or is_throttled(best["gpu"])}


def is_throttled(state: dict[str, Any] | None) -> bool:
    """Return whether a GPU ran slower than it can; see :class:`~autoprune.measure.record.GpuState`."""
    return state is not None and bool(GpuState.model_validate(state).throttled)


def one_pass(job: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
    """Time every model once a round in random order, over several sessions.

    Sessions are opened anew because memory is laid out anew with them, which moves a model's time by more than
    the spread inside one session.
    """
    paths = [*job["models"], job["dense"]]
    on_gpu = target_of(job).device == "cuda"
    states = [read_gpu()] if on_gpu else []
    samples: list[list[float]] = [[] for _ in paths]
    ratios: list[list[list[float]]] = [[] for _ in job["models"]]
    dense: list[float] = []
    for _ in range(job["sessions"]):
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
    before = _status_kib("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5 resets the peak, see proc(5)
    except OSError:
        return None
    runner = Runner(job["models"][0], job)
    for _ in range(3):
        runner.once_s()
    after = _status_kib("VmHWM")
    return None if before is None or after is None else max(0, after - before) * 1024


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


def target_of(job: dict[str, Any]) -> Target:
    """Return the target of a job."""
    return Target.model_validate(job["target"])


def inputs_of(job: dict[str, Any], batch: int) -> NDArray[np.float32]:
    """Return inputs of one inference."""
    generator = np.random.default_rng(0)
    return generator.standard_normal((batch, *job["input_shape"]), dtype=np.float32)


def _status_kib(field: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) if match else None


if __name__ == "__main__":
    main()
