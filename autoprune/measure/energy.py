"""Energy counters: the processor's through Linux' powercap interface, a GPU's through NVML. Torch-free."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.measure.inference import Runner, models_of, target_of
from autoprune.measure.record import EnergySource

POWERCAP = Path("/sys/class/powercap")
# RAPL's counters move about every millisecond; NVML's were seen to stand still for up to a tenth of a second. A block
# is long enough for that to be a few per mille, or per cent.
_RAPL_BLOCK_S = 0.5
_NVML_BLOCK_S = 2.0
NOTHING_READABLE = "this machine has no readable energy counter"


@dataclass(frozen=True)
class Meter:
    """Energy counters that are read together.

    Attributes:
        source: What they are.
        block_s: Seconds of work between two readings for which they are fine enough.
        read: Returns all counters, microjoules since whenever.
        ranges_uj: For each counter the value at which it starts from zero again; None where it never does.
    """

    source: EnergySource
    block_s: float
    read: Callable[[], list[int]]
    ranges_uj: tuple[int | None, ...]

    def spent_mj(self, before: list[int], after: list[int]) -> float:
        """Return the millijoules between two readings, during which each counter started from zero once at most."""
        total_uj = 0
        for one, other, span in zip(before, after, self.ranges_uj, strict=True):
            total_uj += other - one + (span if other < one and span else 0)
        return total_uj / 1e3


def find_meter(device: str, powercap: Path = POWERCAP) -> Meter | str:
    """Return the counters of what a target runs on, or why there are none.

    Args:
        device: ``cpu`` or ``cuda``.
        powercap: Folder of the processor's counters.
    """
    return _nvml() if device == "cuda" else _rapl(powercap)


def _rapl(powercap: Path) -> Meter | str:
    """Return the counters of all packages, and of memory where it has some of its own.

    Cores and graphics are parts of their package; ``psys`` is the whole board, of which the packages are a part.
    """
    chosen: list[Path] = []
    # AMD's processors have them under this name too. `intel-rapl-mmio` tells the same packages a second time.
    zones = sorted(powercap.glob("intel-rapl:*")) or sorted(powercap.glob("intel-rapl-mmio:*"))
    for zone in zones:
        name = _text(zone / "name") or ""
        if (zone / "energy_uj").exists() and (name.startswith("package") or name == "dram"):
            chosen.append(zone / "energy_uj")
    if not chosen:
        return NOTHING_READABLE
    for path in chosen:
        if _text(path) is None:
            return f"{NOTHING_READABLE}: {path} is there, but this user may not read it"
    ranges = tuple(int(_text(path.with_name("max_energy_range_uj")) or 0) or None for path in chosen)
    return Meter("rapl", _RAPL_BLOCK_S, lambda: [int(path.read_text()) for path in chosen], ranges)


def _nvml() -> Meter | str:
    """Return the counter of the GPU that this process sees."""
    try:
        nvml: Any = import_module("pynvml")
    except ImportError:
        return f"{NOTHING_READABLE}: pip install nvidia-ml-py"
    try:
        nvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
        if visible.startswith("GPU-"):
            gpu = nvml.nvmlDeviceGetHandleByUUID(visible)
        elif (count := nvml.nvmlDeviceGetCount()) == 1:
            gpu = nvml.nvmlDeviceGetHandleByIndex(0)
        else:
            # CUDA and NVML number GPUs in different orders.
            return f"which of {count} GPUs is used is not known: set CUDA_VISIBLE_DEVICES to its UUID"
        nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
    except nvml.NVMLError as error:
        return f"{NOTHING_READABLE}: NVML says {error}"

    def read() -> list[int]:
        return [1000 * int(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu))]  # since the driver was loaded

    return Meter("nvml", _NVML_BLOCK_S, read, (None,))


def energies(job: dict[str, Any]) -> dict[str, Any]:
    """Run whole blocks of every model of a job, the dense one last, in random order in each of several rounds.

    Returns:
        Under ``energies_mj`` for each model the millijoules of one example, by block; and the ``source``.

    Raises:
        RuntimeError: If there is no counter; says why.
    """
    paths = models_of(job)
    meter = find_meter(target_of(job).device)
    if isinstance(meter, str):
        raise RuntimeError(meter)
    generator = np.random.default_rng(job["seed"])
    runners = [Runner(path, job) for path in paths]
    found: list[list[float]] = [[] for _ in paths]
    begun = time.perf_counter()
    for done in range(job["rounds"]):
        if done and time.perf_counter() - begun > job["limit_s"] * len(paths):
            break
        for index in generator.permutation(len(paths)):
            found[index].append(block_mj(runners[index].once_s, meter) / runners[index].batch)
    return {"energies_mj": found, "source": meter.source}


def block_mj(
    once_s: Callable[[], float], meter: Meter, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the millijoules of one inference, over a block that the counters are fine enough for.

    Args:
        once_s: Runs one inference.
        meter: The counters.
        clock: Source of time, seconds.

    Raises:
        RuntimeError: If the counters stand still.
    """
    once_s()
    before, begun, runs = meter.read(), clock(), 0
    while not runs or clock() - begun < meter.block_s:
        once_s()
        runs += 1
    spent_mj = meter.spent_mj(before, meter.read())
    if spent_mj <= 0:  # as in virtual machines that show a counter and feed it nothing
        raise RuntimeError(f"{NOTHING_READABLE}: {meter.source} is there and stands still")
    return spent_mj / runs


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
