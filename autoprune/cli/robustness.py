"""How robustness is asked for and printed: of a front, of one artifact, and as files of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.cli.live import live_view
from autoprune.cli.output import print_json, print_table, print_text
from autoprune.cli.rendering import front_object

if TYPE_CHECKING:
    from autoprune.api import Study
    from autoprune.measure.record import Robustness
    from autoprune.study.front import FrontPoint
    from autoprune.study.records import TrialRecord


def measured(
    study: Study, points: Sequence[FrontPoint], trust_code: bool
) -> tuple[list[TrialRecord], dict[int, Robustness], int | None]:
    """Return the dense network's trial and the points', what they are worth, and the dense trial's number."""
    from autoprune.study.front import dense_record

    dense = dense_record(study.records())
    records = [p.record for p in points if dense is None or p.record.number != dense.number]
    records = records if dense is None else [dense, *records]
    with live_view(f"robustness of {study.name}") as listener:
        results = study.robustness(records, trust_code=trust_code, progress=listener)
    return records, results, None if dense is None else dense.number


def show_robustness(study: Study, points: Sequence[FrontPoint], *, json: bool, trust_code: bool) -> None:
    """Print what the points of a front are worth on corrupted images and on their worst class."""
    from autoprune.report.robustness_view import robustness_json, robustness_table
    from autoprune.study.front import dense_record

    records, results, number = measured(study, points, trust_code)
    base = None if number is None else results.get(number)
    if json:
        found = front_object(study.paths, dense_record(study.records()), points)
        shown = [*found["points"], *([found["dense"]] if found["dense"] else [])]
        for point in shown:
            result = results.get(point["trial"])
            point["robustness"] = None if result is None else robustness_json(result, base)
        print_json(found)
        return
    print_text(
        "report split; top-1, over corruptions the mean of severities 1, 3, 5 (against the dense network)"
    )
    columns, rows = robustness_table(records, results, base)
    print_table(columns, rows, numeric=columns[2:])


def write_robustness(study: Study, trust_code: bool) -> list[Path]:
    """Write ``robustness.csv`` and ``robustness.png`` into the study's folder and return their paths."""
    from autoprune.report.robustness_view import write_robustness_csv, write_robustness_png

    _, results, number = measured(study, study.points(), trust_code)
    paths = [study.path / "robustness.csv", study.path / "robustness.png"]
    write_robustness_csv(results, None if number is None else results.get(number), paths[0])
    write_robustness_png(results, number, paths[1])
    return paths
