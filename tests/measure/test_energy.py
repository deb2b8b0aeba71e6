"""Energy counters: a powercap folder and an NVML that are made up, with known readings."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autoprune.measure import energy
from autoprune.measure.energy import Meter, block_mj, energies, find_meter
from tests.measure.test_latency import network

RANGE_UJ = 262_143_328_850


def zone(folder: Path, place: str, name: str, energy_uj: int) -> None:
    """Make one counter as Linux shows it."""
    path = folder / place
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages with cores and memory, and the board."""
    folder = tmp_path / "powercap"
    (folder / "intel-rapl").mkdir(parents=True)
    for place, name, value in (
        ("intel-rapl:0", "package-0", 1_000_000),
        ("intel-rapl:0:0", "core", 7_000_000),
        ("intel-rapl:0:1", "dram", 300_000),
        ("intel-rapl:1", "package-1", 20_000),
        ("intel-rapl:2", "psys", 90_000_000),
    ):
        zone(folder, place, name, value)
    return folder


def meter_of(powercap: Path) -> Meter:
    found = find_meter("cpu", powercap)
    assert isinstance(found, Meter), found
    return found


def test_packages_and_their_memory_count_and_no_part_counts_twice(powercap: Path) -> None:
    zone(powercap, "intel-rapl-mmio:0", "package-0", 1_000_000)  # the same package, seen another way
    meter = meter_of(powercap)
    assert meter.source == "rapl"
    before = meter.read()
    assert sum(before) == 1_000_000 + 300_000 + 20_000
    zone(powercap, "intel-rapl:0", "package-0", 1_500_000)
    zone(powercap, "intel-rapl:0:0", "core", 7_400_000)
    zone(powercap, "intel-rapl:0:1", "dram", 350_000)
    zone(powercap, "intel-rapl:2", "psys", 99_000_000)
    assert meter.spent_mj(before, meter.read()) == pytest.approx(550.0)


def test_a_counter_that_starts_from_zero_again_is_no_gain(powercap: Path) -> None:
    meter = meter_of(powercap)
    zone(powercap, "intel-rapl:0", "package-0", RANGE_UJ - 2_000)
    before = meter.read()
    zone(powercap, "intel-rapl:0", "package-0", 5_000)
    assert meter.spent_mj(before, meter.read()) == pytest.approx(7.0)


def test_where_there_is_no_counter_it_is_said(tmp_path: Path) -> None:
    assert find_meter("cpu", tmp_path / "nowhere") == "this machine has no readable energy counter"


def test_a_counter_that_may_not_be_read_is_named(powercap: Path) -> None:
    path = powercap / "intel-rapl:1" / "energy_uj"
    path.unlink()
    path.mkdir()  # as unreadable as a file of root's, for root too
    found = find_meter("cpu", powercap)
    assert isinstance(found, str)
    assert "no readable energy counter" in found and str(path) in found


def test_energy_of_one_inference_is_that_of_a_whole_block() -> None:
    now_s, used_uj, runs = 0.0, 0, 0

    def once_s() -> float:
        nonlocal now_s, used_uj, runs
        now_s, used_uj, runs = now_s + 0.01, used_uj + 40_000, runs + 1
        return 0.01

    meter = Meter("rapl", 0.5, lambda: [used_uj], (RANGE_UJ,))
    assert block_mj(once_s, meter, lambda: now_s) == pytest.approx(40.0)
    assert runs >= 51  # one that warms up, and half a second


def test_a_counter_that_stands_still_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="stands still"):
        block_mj(lambda: 0.01, Meter("rapl", 0.0, lambda: [7], (RANGE_UJ,)))


def test_energy_of_a_job_is_told_for_one_example(
    tmp_path: Path, powercap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(network(tmp_path / "a.onnx", 8))
    read = iter(range(0, 10**9, 8_000_000))
    meter = Meter("rapl", 0.0, lambda: [next(read)], (None,))  # a block is one inference, of 8 J
    monkeypatch.setattr(energy, "find_meter", lambda device: meter)
    job = {"models": [path], "dense": path, "target": {"batch": 4}, "input_shape": [8], "seed": 0, "rounds": 2,
           "limit_s": 100.0}  # fmt: skip
    found = energies(job)
    assert found == {"source": "rapl", "energies_mj": [[2000.0, 2000.0], [2000.0, 2000.0]]}
    monkeypatch.setattr(energy, "find_meter", lambda device: energy.NOTHING_READABLE)
    with pytest.raises(RuntimeError, match="no readable energy counter"):
        energies(job)


# -- NVML ------------------------------------------------------------------------------------


class NvmlError(Exception):
    """NVML's own."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An NVML of one GPU, which used 5 J so far."""
    module = SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: f"gpu {index}",
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        used_mj={"gpu 0": 5_000, "GPU-b": 70_000},
    )
    module.nvmlDeviceGetTotalEnergyConsumption = lambda gpu: module.used_mj[gpu]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return module


def test_a_gpu_s_counter_is_read(nvml: Any) -> None:
    meter = find_meter("cuda")
    assert isinstance(meter, Meter) and meter.source == "nvml"
    before = meter.read()
    nvml.used_mj["gpu 0"] += 250
    assert meter.spent_mj(before, meter.read()) == pytest.approx(250.0)


def test_of_several_gpus_the_one_that_is_named_is_read(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.nvmlDeviceGetCount = lambda: 2
    found = find_meter("cuda")
    assert isinstance(found, str) and "CUDA_VISIBLE_DEVICES" in found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,GPU-a")
    meter = find_meter("cuda")
    assert isinstance(meter, Meter) and meter.read() == [70_000_000]


def test_a_gpu_without_a_counter_and_a_machine_without_nvml(
    nvml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(gpu: str) -> int:
        raise NvmlError("Not Supported")

    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert find_meter("cuda") == "this machine has no readable energy counter: NVML says Not Supported"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = find_meter("cuda")
    assert isinstance(found, str) and "nvidia-ml-py" in found
