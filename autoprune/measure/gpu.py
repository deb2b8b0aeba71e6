"""Clocks, temperature and throttling of the GPU that is measured on, as NVIDIA's management library tells them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from autoprune.measure.record import GpuState

# Bits of the reasons why clocks are lower than they could be. Idleness, clocks that were set, and boosting in step with
# other GPUs are no throttling.
_THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal, by software",
    0x40: "thermal, by hardware",
    0x80: "power brake",
}
_SM, _MEMORY, _CORE_TEMPERATURE = 1, 2, 0


def read_gpu() -> GpuState | None:
    """Return the state of the first GPU that the environment leaves us; None where nothing tells it.

    ``nvidia-ml-py`` reads it. GPUs are numbered as the library has them, by bus; where several kinds are in one machine
    and ``CUDA_DEVICE_ORDER`` is not ``PCI_BUS_ID``, CUDA may count otherwise.
    """
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        handle = _handle(nvml)
        reasons = _reasons(nvml, handle)
        return GpuState(
            sm_mhz=_both(nvml.nvmlDeviceGetClockInfo(handle, _SM)),
            memory_mhz=_both(nvml.nvmlDeviceGetClockInfo(handle, _MEMORY)),
            temperature_c=nvml.nvmlDeviceGetTemperature(handle, _CORE_TEMPERATURE),
            throttled=tuple(name for bit, name in _THROTTLING.items() if reasons & bit),
        )
    except nvml.NVMLError:  # no driver, or one that does not tell: the figures stand without it
        return None


def over(states: Iterable[GpuState | None]) -> GpuState | None:
    """Return the range of several readings; None where there are none."""
    seen = [state for state in states if state is not None]
    if not seen:
        return None
    return GpuState(
        sm_mhz=(min(s.sm_mhz[0] for s in seen), max(s.sm_mhz[1] for s in seen)),
        memory_mhz=(min(s.memory_mhz[0] for s in seen), max(s.memory_mhz[1] for s in seen)),
        temperature_c=max(s.temperature_c for s in seen),
        throttled=tuple(dict.fromkeys(reason for s in seen for reason in s.throttled)),
    )


def _handle(nvml: Any) -> Any:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    return nvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0)


def _reasons(nvml: Any, handle: Any) -> int:
    try:
        return int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
    except (nvml.NVMLError, AttributeError):  # drivers and bindings before 535 have it under its old name
        return int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))


def _both(value: int) -> tuple[int, int]:
    return (value, value)
