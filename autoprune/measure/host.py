"""The machine that figures were measured on."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from autoprune.target import usable_cores

# Instructions that decide which kernels a runtime picks.
_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
)
_PACKAGES = (
    "autoprune",
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "openvino",
    "executorch",
    "tensorrt",
    "torchao",
    "onnxscript",
    "optuna",
)


def describe_host() -> dict[str, Any]:
    """Return processor, memory, load and versions, ready for JSON; what cannot be read is None."""
    cpuinfo = _read("/proc/cpuinfo") or ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", _read("/proc/meminfo") or "", re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    return {
        "processor": model.group(1) if model else platform.processor() or platform.machine(),
        "flags": [flag for flag in _FLAGS if flag in present],
        "usable_cores": usable_cores(),
        "memory_bytes": int(memory.group(1)) * 1024 if memory else None,
        "governor": (_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "").strip() or None,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
