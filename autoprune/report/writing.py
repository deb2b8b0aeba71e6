"""Writes the report of a study: the page, the picture and the table, each file in one step."""

from __future__ import annotations

from pathlib import Path

from autoprune.study.artifacts import write_bytes_atomic
from autoprune.study.elsewhere import seen_on, targets_of
from autoprune.study.store import StudyStore


def write_report(store: StudyStore) -> dict[str, Path]:
    """Write ``report.html``, ``front.png`` and ``front.csv`` into the study's folder.

    Args:
        store: The study's record.

    For each further target of the study the same files with the target's name in theirs.

    Returns:
        The files' paths by their names.

    Raises:
        StorageError: If a file cannot be written.
    """
    from autoprune.report.html import report_page
    from autoprune.report.plot import write_png
    from autoprune.report.table import write_csv
    from autoprune.report.view import view_of
    from autoprune.study.front import front_points, to_frame

    written: dict[str, Path] = {}
    for target in targets_of(store.settings()):
        seen = seen_on(store, target)
        paths = seen.paths
        points = front_points(seen)
        if seen is not store and not points:  # nothing was measured there yet
            continue
        view = view_of(seen)
        write_csv(to_frame(points, paths), paths.front_csv)
        write_png(seen, paths.front_png, view)
        write_bytes_atomic(paths.report, report_page(seen, view).encode("utf-8"))
        written |= {path.name: path for path in (paths.report, paths.front_png, paths.front_csv)}
    return written
