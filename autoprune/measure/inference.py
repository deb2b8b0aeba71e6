"""Inferences of the measuring process: a job's target, inputs and processors, and model files ready to be timed."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoprune.deploy.session import open_session
from autoprune.target import Target


class Runner:
    """One model file ready to be timed.

    Args:
        path: Model file.
        job: Target and shape of one example.
        batch: Examples of one inference, where the file leaves them free; the target's if not given.
    """

    def __init__(self, path: str, job: dict[str, Any], batch: int | None = None) -> None:
        target = target_of(job, path)
        self.session = open_session(target, Path(path))
        self.batch = self.session.fixed_batch or batch or target.batch
        self.once_s = self.session.timer(inputs_of(job, self.batch))
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


def target_of(job: dict[str, Any], path: str = "") -> Target:
    """Return the target of a job, or that of one of its files where it has one of its own."""
    return Target.model_validate(job.get("targets", {}).get(path, job["target"]))


def inputs_of(job: dict[str, Any], batch: int) -> NDArray[np.float32]:
    """Return inputs of one inference."""
    generator = np.random.default_rng(0)
    return generator.standard_normal((batch, *job["input_shape"]), dtype=np.float32)


def models_of(job: dict[str, Any]) -> list[str]:
    """Return the files of a job, the dense network's last."""
    return [*job["models"], job["dense"]]


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


def reset_peak() -> bool:
    """Let :func:`peak_bytes` count from now on; return whether the system does that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """Return the most memory that this process has had since its start or the last reset; None if unreadable."""
    return _kib("/proc/self/status", "VmHWM")


def resident_bytes() -> int | None:
    """Return the memory that this process has; None if unreadable."""
    return _kib("/proc/self/status", "VmRSS")


def available_bytes() -> int | None:
    """Return the memory of this machine, or of its container, that can still be had; None if unreadable."""
    group = Path("/sys/fs/cgroup")
    try:
        most, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        left = [int(most) - int(used)] if most != "max" else []
    except (OSError, ValueError):
        left = []
    free = _kib("/proc/meminfo", "MemAvailable")
    return min(left + ([] if free is None else [free]), default=None)


def _kib(path: str, field: str) -> int | None:
    try:
        text = Path(path).read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None
