"""The state of a GPU, told by a stand-in for NVIDIA's library: no GPU is needed, and none was at hand."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from autoprune.measure import worker
from autoprune.measure.gpu import over, read_gpu
from autoprune.measure.record import GpuState


class NVMLError(Exception):
    pass


class Nvml(SimpleNamespace):
    """What is read of ``pynvml``."""

    NVMLError = NVMLError

    def __init__(self, reasons: int = 0, old: bool = False) -> None:
        super().__init__()
        self.asked: list[Any] = []
        name = "ThrottleReasons" if old else "EventReasons"
        setattr(self, f"nvmlDeviceGetCurrentClocks{name}", lambda handle: reasons)

    def nvmlInit(self) -> None:  # noqa: N802
        self.asked.append("init")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        self.asked.append(index)
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        assert sensor == 0
        return 61


@pytest.mark.parametrize(
    ("reasons", "said"),
    [
        (0x0, ()),
        (0x1 | 0x2 | 0x10, ()),  # idle, clocks that were set, boosting in step
        (0x4, ("power cap",)),
        (0x8 | 0x40, ("hardware slowdown", "thermal, by hardware")),
        (0x20 | 0x80, ("thermal, by software", "power brake")),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_the_state_says_clocks_and_why_they_are_low(
    monkeypatch: pytest.MonkeyPatch, reasons: int, said: tuple[str, ...], old: bool
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(reasons, old))
    state = read_gpu()
    assert state == GpuState(sm_mhz=(1980, 1980), memory_mhz=(2619, 2619), temperature_c=61, throttled=said)
    assert worker.is_throttled(state.model_dump(mode="json")) == bool(said)


@pytest.mark.parametrize(
    ("visible", "asked"), [(None, 0), ("", 0), ("3,1", 3), ("GPU-12ab,GPU-34cd", "GPU-12ab")]
)
def test_the_gpu_is_the_first_that_the_environment_leaves(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, asked: object
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    read_gpu()
    assert nvml.asked == ["init", asked]


def test_a_machine_that_tells_nothing_has_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_gpu() is None
    silent = Nvml()

    def fail() -> None:
        raise NVMLError("no driver")

    silent.nvmlInit = fail  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "pynvml", silent)
    assert read_gpu() is None
    assert not worker.is_throttled(None)


def test_several_readings_give_their_range() -> None:
    cool = GpuState(sm_mhz=(1980, 1980), memory_mhz=(2619, 2619), temperature_c=40)
    hot = GpuState(sm_mhz=(1410, 1410), memory_mhz=(2619, 2619), temperature_c=83, throttled=("power cap",))
    assert over([cool, None, hot, hot]) == GpuState(
        sm_mhz=(1410, 1980), memory_mhz=(2619, 2619), temperature_c=83, throttled=("power cap",)
    )
    assert over([None]) is None


@pytest.mark.parametrize("reasons", [0x0, 0x4])
def test_a_throttled_gpu_makes_a_measurement_noisy(monkeypatch: pytest.MonkeyPatch, reasons: int) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(reasons))
    monkeypatch.setattr(worker, "Runner", _Still)
    job = {
        "models": ["one"], "dense": "dense", "target": {"runtime": "torch", "device": "cuda"}, "input_shape": [1],
        "sessions": 1, "rounds": 4, "block_s": 0.001, "warmup_s": 0.0, "limit_s": 1.0, "repeats": 0,
        "noise_limit": 1.0, "seed": 0,
    }  # fmt: skip
    found = worker.measure(job)
    assert found["noisy"] == bool(reasons)
    assert found["gpu"]["sm_mhz"] == [1980, 1980]
    assert worker.measure({**job, "target": {"runtime": "torch"}})["gpu"] is None


class _Still:
    """A model that always takes as long."""

    def __init__(self, path: str, job: dict[str, Any]) -> None:
        self.path = path

    def warm_up(self, seconds: float, block_s: float) -> None:
        pass

    def block_s(self) -> list[float]:
        return [0.001, 0.001]
