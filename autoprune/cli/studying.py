"""Verbs that work on what a search left: front, report, export, measure, studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli import options
from autoprune.cli.output import print_json, print_pairs, print_table, print_text
from autoprune.cli.rendering import show_csv, show_front
from autoprune.cli.robustness import show_robustness, write_robustness
from autoprune.errors import UsageError


def front(
    study: options.Study,
    max_latency_ms: Annotated[float | None, typer.Option(metavar="X", help="of one batch")] = None,
    max_latency_ratio: Annotated[
        float | None, typer.Option(metavar="X", help="share of the dense latency")
    ] = None,
    max_size_mb: Annotated[
        float | None, typer.Option(metavar="X", help="of the model file, 1e6 bytes")
    ] = None,
    min_accuracy: Annotated[float | None, typer.Option(metavar="X", help="on the report split")] = None,
    max_drop: Annotated[
        float | None, typer.Option(metavar="X", help="lost against the dense network")
    ] = None,
    knee: Annotated[bool, typer.Option("--knee", help="only the point where the trade turns")] = False,
    json: options.Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="print CSV")] = False,
    target: Annotated[
        str | None, typer.Option(metavar="T", help="on this of the study's targets (the first)")
    ] = None,
    measurements: Annotated[
        Path | None, typer.Option(metavar="FILE", help="by what `measure --json` printed elsewhere")
    ] = None,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="on corrupted images, and of the worst class")
    ] = False,
    trust_code: options.TrustCode = None,
    storage: options.Storage = None,
) -> None:
    """Show the points of a front that keep the given limits."""
    _exclude("--max-latency-ms", max_latency_ms, "--max-latency-ratio", max_latency_ratio)
    _exclude("--min-accuracy", min_accuracy, "--max-drop", max_drop)
    _exclude("--json", json or None, "--csv", csv or None)
    _exclude("--robustness", robustness or None, "--csv", csv or None)
    _exclude("--robustness", robustness or None, "--measurements", measurements)
    from autoprune.api import open_study
    from autoprune.study.front import dense_record, pick_points

    found = open_study(study, storage)
    if target is not None:
        found = found.on(target)
    if measurements is not None:
        found = found.measured_by(measurements)
    limits = {
        "max_latency_ms": max_latency_ms, "max_latency_ratio": max_latency_ratio, "max_size_mb": max_size_mb,
        "min_accuracy": min_accuracy, "max_drop": max_drop,
    }  # fmt: skip
    for name, value in limits.items():
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(
                f"--{name.replace('_', '-')} {value:g} cannot be used; allowed: a number from 0 on"
            )
    points = found.points()
    if knee or any(value is not None for value in limits.values()):
        points = pick_points(
            points, knee=knee, dense=dense_record(found.records()), objectives=found.objectives, **limits
        )
    if robustness:
        show_robustness(found, points, json=json, trust_code=bool(trust_code))
    elif csv:
        show_csv(found, points)
    else:
        show_front(found, points, json=json)


def _exclude(one: str, value: object, other: str, other_value: object) -> None:
    if value is not None and other_value is not None:
        raise UsageError(f"{one} and {other} exclude each other", "give one of them")


def report(
    study: options.Study,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="robustness.csv and robustness.png too")
    ] = False,
    trust_code: options.TrustCode = None,
    storage: options.Storage = None,
    json: options.Json = False,
) -> None:
    """Write report.html, front.png and front.csv of a study."""
    from autoprune.api import open_study

    found = open_study(study, storage)
    paths = found.report()
    if robustness:
        paths += write_robustness(found, bool(trust_code))
    if json:
        print_json({"study": study, "files": [str(path) for path in paths]})
    else:
        print_text("\n".join(str(path) for path in paths))


def export(
    study: options.Study,
    trial: Annotated[
        int, typer.Option("--trial", metavar="N", help="number of a point; see `autoprune front`")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="empty folder")],
    target: Annotated[
        str | None, typer.Option(metavar="T", help="for this of the study's targets (the first)")
    ] = None,
    storage: options.Storage = None,
    json: options.Json = False,
) -> None:
    """Write one point's model file, weights, recipe and card."""
    from autoprune.exporting import export_point

    folder = export_point(study, trial, to, target, storage)
    if json:
        print_json({"study": study, "trial": trial, "target": target, "artifact": str(folder)})
    else:
        print_text(str(folder))


def measure(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="folder that export or compress wrote")
    ],
    data: options.Data = None,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="on corrupted images too, against the dense network")
    ] = False,
    trust_code: options.TrustCode = None,
    json: options.Json = False,
) -> None:
    """Measure an exported artifact afresh."""
    if not artifact.exists():
        raise UsageError(f"artifact {str(artifact)!r} does not exist", "`autoprune export` writes one")
    from autoprune.exporting import measure_artifact

    result = measure_artifact(artifact, data, trust_code=bool(trust_code), robustness=robustness)
    print_json(result) if json else print_pairs(result)


def studies(storage: options.Storage = None, json: options.Json = False) -> None:
    """List the studies that exist here, and in a database."""
    from autoprune.naming import studies_root
    from autoprune.study.listing import list_studies

    found = list_studies(storage)
    if json:
        print_json(found)
        return
    if not found:
        print_text(f"no studies in {str(studies_root())!r}")
        return
    columns = list(found[0])
    print_table(columns, [[entry[column] for column in columns] for entry in found])
