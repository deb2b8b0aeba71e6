"""How fronts look on the standard output: a table, CSV, or the one JSON object that scripts read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoprune.cli.output import print_json, print_text
from autoprune.naming import StudyPaths

if TYPE_CHECKING:
    from autoprune.api import Study
    from autoprune.study.front import FrontPoint
    from autoprune.study.records import TrialRecord


def show_front(study: Study, points: Sequence[FrontPoint] | None = None, *, json: bool = False) -> None:
    """Print the front of a study.

    Args:
        study: The study.
        points: What to show of its front; all of it if not given.
        json: Print the object that scripts read instead of a table.
    """
    from autoprune.report.table import print_front
    from autoprune.study.front import dense_record

    chosen = list(study.points() if points is None else points)
    dense = dense_record(study.records())
    if json:
        print_json(
            {**front_object(study.paths, dense, chosen), "target": study.target, "targets": study.targets}
        )
        return
    print_front(chosen, dense)
    if not chosen:
        print_text("no point is on the front yet")


def front_object(
    paths: StudyPaths, dense: TrialRecord | None, points: Sequence[FrontPoint]
) -> dict[str, Any]:
    """Return the one object that ``--json`` prints."""
    from autoprune.study.front import point_json

    return {
        "study": paths.name,
        "dense": None if dense is None else point_json(paths, dense),
        "points": [
            {**point_json(paths, p.record), "baseline": p.baseline, "tie_with": list(p.tie_with)}
            for p in points
        ],
    }


def show_csv(study: Study, points: Sequence[FrontPoint]) -> None:
    """Print points as CSV, one row each."""
    from autoprune.report.table import csv_text
    from autoprune.study.front import to_frame

    print_text(csv_text(to_frame(points, study.paths)))
