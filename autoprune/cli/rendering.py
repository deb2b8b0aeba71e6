"""How fronts look on the standard output: a table, CSV, or the one JSON object that scripts read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoprune.cli.output import print_json, print_table, print_text

if TYPE_CHECKING:
    from autoprune.api import Study
    from autoprune.study.front import FrontPoint

_NUMERIC = ("trial", "accuracy", "95 %", "drop", "latency ms", "ratio", "size MB", "share", "int8")


def show_front(study: Study, points: Sequence[FrontPoint] | None = None, *, json: bool = False) -> None:
    """Print the front of a study.

    Args:
        study: The study.
        points: What to show of its front; all of it if not given.
        json: Print the object that scripts read instead of a table.
    """
    from autoprune.report.table import front_object, front_rows

    chosen = study.points() if points is None else points
    if json:
        print_json(front_object(study, chosen))
        return
    columns, rows = front_rows(study, chosen)
    print_table(columns, rows, _NUMERIC)


def show_csv(points: Sequence[FrontPoint]) -> None:
    """Print points as CSV, one row each."""
    from autoprune.study.front import to_frame

    frame: Any = to_frame(list(points))
    print_text(frame.to_csv(index=False))
