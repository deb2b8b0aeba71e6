"""Verb ``doctor``: what runs on this machine, found by trying it."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoprune.cli import options
from autoprune.cli.output import print_json, print_pairs, print_table, print_text
from autoprune.cli.truth import measure_tables, show_tables, table_json, tables_here, write_tables
from autoprune.errors import UsageError
from autoprune.target import Target

if TYPE_CHECKING:
    from autoprune.measure.truth_table import TruthTable

_REQUIRED = (
    "torch", "torchvision", "optuna", "ray", "pandas", "matplotlib", "onnx", "onnxscript",
    "onnxruntime", "scikit-learn", "scipy", "safetensors", "pydantic", "typer", "rich", "ruamel.yaml", "plotly",
)  # fmt: skip
_OPTIONAL = (
    "openvino", "executorch", "tensorrt-cu13", "nvidia-ml-py", "timm", "huggingface-hub", "psycopg", "optuna-dashboard",
)  # fmt: skip
_KERNEL_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def doctor(
    measure: Annotated[
        bool,
        typer.Option("--measure", help="time every operator in every format; about two minutes a target"),
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="with --measure: longer, narrower intervals")] = False,
    target: Annotated[
        str | None, typer.Option("--target", metavar="T", help="only this target, such as openvino:threads=2")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="folder that gets tables and pictures")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show packages, kernels, what each runtime really executes here, and what of it was measured to be faster."""
    if full and not measure:
        raise UsageError("--full goes with --measure", "autoprune doctor --measure --full")
    if to is not None and to.exists() and not to.is_dir():
        raise UsageError(f"--to {str(to)!r} is no folder", "name a folder; it is made if it is not there")
    asked = None if target is None else _target(target)
    if to is not None and not measure and not _tables(asked):
        raise UsageError(
            "nothing was measured here that --to could write",
            "autoprune doctor --measure" + (f" --target {target}" if target else ""),
        )
    found: dict[str, Any] = {
        "machine": _machine(),
        "packages": {name: _version(name) for name in _REQUIRED},
        "extras": {name: _version(name) for name in _OPTIONAL},
        "folders": _folders(),
        "targets": _probe_targets(),
    }
    is_done = True
    if measure:
        # Precisions of float are formats of a runtime's table, so that one table each is enough.
        usable = [
            t
            for t in (_target(t["name"]) for t in found["targets"] if t["usable"])
            if t.precision == "float32"
        ]
        is_done = measure_tables(usable if asked is None else [asked], full=full, quiet=quiet or json)
    tables = _tables(asked)
    files = [] if to is None else write_tables(tables, to)
    if json:
        truth = [table_json(table) for table in tables]
        print_json({**found, "truth": truth, "files": [str(path) for path in files]})
    else:
        _print(found)
        show_tables(tables)
        print_text("\n".join(str(path) for path in files)) if files else None
    if not is_done:
        raise KeyboardInterrupt


def _tables(asked: Target | None) -> list[TruthTable]:
    """Return what was measured of this machine, of one target if that is asked for."""
    return [table for table in tables_here() if asked is None or table.target == asked.spec]


def _target(text: str) -> Target:
    """Return the target that a word names.

    Raises:
        UsageError: If the word is not understood, or the target is not here.
    """
    from pydantic import ValidationError

    from autoprune.config import describe_faults
    from autoprune.target import parse_target

    try:
        found = Target.model_validate(parse_target(text))
    except ValidationError as error:
        raise UsageError(describe_faults("--target", error)) from None
    found.check_installed()
    return found


def _print(found: dict[str, Any]) -> None:
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
    from autoprune.measure.energy import find_meter
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
        "energy": meter if isinstance(meter := find_meter("cpu"), str) else meter.source,
    }


def _folders() -> dict[str, str]:
    from autoprune.naming import cache_root, data_root, studies_root

    return {
        "studies": str(studies_root().resolve()),
        "cache": str(cache_root().resolve()),
        "data": str(data_root().resolve()),
    }


def _probe_targets() -> list[dict[str, Any]]:
    """Try every target that this version knows: each runtime on its devices, in its precisions."""
    from autoprune.target import RUNTIMES, Target

    found: list[dict[str, Any]] = []
    for runtime, facts in RUNTIMES.items():
        if not facts.installed:
            found.append({"name": runtime, "usable": False, "bits": [], "note": facts.install})
            continue
        from autoprune.deploy.probe import probe

        for device in facts.devices:
            for precision in facts.precisions_on(device):
                target = Target(runtime=runtime, device=device, precision=precision)
                result = probe(target)
                found.append(
                    {
                        "name": target.spec,
                        "usable": result.usable,
                        "bits": list(result.bits),
                        "note": result.note,
                    }
                )
                if not result.usable:  # the others fail alike
                    break
    return found
