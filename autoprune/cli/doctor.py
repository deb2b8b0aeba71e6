"""Verb ``doctor``: what runs on this machine, found by trying it."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from autoprune.cli import options
from autoprune.cli.output import print_json, print_pairs, print_table, print_text

_REQUIRED = (
    "torch", "torchvision", "optuna", "ray", "pandas", "matplotlib", "onnx", "onnxscript",
    "onnxruntime", "scikit-learn", "scipy", "safetensors", "pydantic", "typer", "rich", "ruamel.yaml", "plotly",
)  # fmt: skip
_OPTIONAL = ("openvino", "timm", "huggingface-hub", "psycopg", "optuna-dashboard")
_KERNEL_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def doctor(json: options.Json = False) -> None:
    """Show packages, kernels and what each runtime really executes here at each bit-width."""
    found: dict[str, Any] = {
        "machine": _machine(),
        "packages": {name: _version(name) for name in _REQUIRED},
        "extras": {name: _version(name) for name in _OPTIONAL},
        "folders": _folders(),
        "targets": _probe_targets(),
    }
    if json:
        print_json(found)
        return
    print_pairs(found["machine"])
    print_text("")
    versions = {**found["packages"], **found["extras"]}
    print_table(["package", "version"], [(name, version or "missing") for name, version in versions.items()])
    print_pairs(found["folders"])
    print_text("")
    columns = ["target", "usable", "bits", "executes"]
    rows = [
        (t["name"], "yes" if t["usable"] else "no", ", ".join(map(str, t["bits"])), t["note"])
        for t in found["targets"]
    ]
    print_table(columns, rows)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    from autoprune.target import usable_cores

    flags: set[str] = set()
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                flags |= set(value.split())
            if name.strip() == "model name":
                model = value.strip()
    except OSError:
        flags = set()  # no such file outside of Linux: the kernels are told by the probe alone
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": model,
        "cores": usable_cores(),
        "kernels": [flag for flag in _KERNEL_FLAGS if flag in flags],
    }


def _folders() -> dict[str, str]:
    from autoprune.naming import cache_root, data_root, studies_root

    return {
        "studies": str(studies_root().resolve()),
        "cache": str(cache_root().resolve()),
        "data": str(data_root().resolve()),
    }


def _probe_targets() -> list[dict[str, Any]]:
    """Try every runtime that this version knows."""
    from autoprune.target import RUNTIMES, Target

    found: list[dict[str, Any]] = []
    for runtime in RUNTIMES:
        if _version(runtime) is None:
            found.append({"name": runtime, "usable": False, "bits": [], "note": f"pip install {runtime}"})
            continue
        from autoprune.deploy.probe import probe

        result = probe(Target(runtime=runtime))
        found.append(
            {"name": runtime, "usable": result.usable, "bits": list(result.bits), "note": result.note}
        )
    return found
