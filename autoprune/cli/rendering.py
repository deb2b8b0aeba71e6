"""How fronts look on the standard output: a table, CSV, or the one JSON object that scripts read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoprune.cli.output import print_json, print_table, print_text
from autoprune.naming import StudyPaths

if TYPE_CHECKING:
    from autoprune.api import Study
    from autoprune.study.front import FrontPoint
    from autoprune.study.records import TrialRecord

_COLUMNS = ("trial", "what", "accuracy", "95 %", "drop", "latency ms", "x dense", "95 % of it", "MB", "x size", "int8")


def show_front(study: Study, points: Sequence[FrontPoint] | None = None, *, json: bool = False) -> None:
    """Print the front of a study.

    Args:
        study: The study.
        points: What to show of its front; all of it if not given.
        json: Print the object that scripts read instead of a table.
    """
    from autoprune.study.front import dense_record

    chosen = list(study.points() if points is None else points)
    dense = dense_record(study.records())
    if json:
        print_json(front_object(study.name, dense, chosen))
        return
    rows = [_row(point.record, dense, baseline=point.baseline, ties=point.tie_with) for point in chosen]
    if dense is not None and dense.number not in {point.record.number for point in chosen}:
        rows.insert(0, _row(dense, dense, baseline=True))
    print_table(_COLUMNS, rows, [column for column in _COLUMNS if column != "what"])
    if not chosen:
        print_text("no point is on the front yet")


def front_object(name: str, dense: TrialRecord | None, points: Sequence[FrontPoint]) -> dict[str, Any]:
    """Return the one object that ``--json`` prints."""
    from autoprune.study.front import point_json

    paths = StudyPaths.of(name)
    return {
        "study": name,
        "dense": None if dense is None else point_json(paths, dense),
        "points": [
            {**point_json(paths, p.record), "baseline": p.baseline, "tie_with": list(p.tie_with)} for p in points
        ],
    }


def show_csv(study: Study, points: Sequence[FrontPoint]) -> None:
    """Print points as CSV, one row each."""
    from autoprune.study.front import to_frame

    print_text(to_frame(points, StudyPaths.of(study.name)).to_csv(index=False))


def _row(
    record: TrialRecord, dense: TrialRecord | None, *, baseline: bool, ties: Sequence[int] = ()
) -> list[str]:
    measured = record.measurement
    what = _what(record, baseline, ties)
    if measured is None:
        return [str(record.number), what, *[""] * (len(_COLUMNS) - 2)]
    score, latency = measured.report or measured.search, measured.latency
    before = dense.measurement if dense is not None else None
    same = None if before is None else before.report if measured.report else before.search
    return [
        str(record.number),
        what,
        f"{score.value:.4f}",
        f"{score.ci[0]:.3f} to {score.ci[1]:.3f}",
        "" if same is None else f"{same.value - score.value:+.4f}",
        f"{latency.latency_ms:.3f}",
        f"{latency.ratio:.3f}",
        f"{latency.ratio_ci[0]:.3f} to {latency.ratio_ci[1]:.3f}" + (" noisy" if latency.noisy else ""),
        f"{measured.size_bytes / 1e6:.3f}",
        f"{measured.size_ratio:.3f}",
        f"{measured.executed.int8_layers}/{measured.executed.layers}",
    ]


def _what(record: TrialRecord, baseline: bool, ties: Sequence[int]) -> str:
    notes = []
    if baseline:
        notes.append("baseline")
    if record.measurement is not None and record.measurement.report is None:
        notes.append("search split")
    if ties:
        notes.append("tie with " + ", ".join(map(str, ties)))
    name = record.label or record.origin
    return name + (f" ({'; '.join(notes)})" if notes else "")
