"""Writes the report of a study: the page, the picture and the table, each file in one step."""

from __future__ import annotations

from pathlib import Path

from autoprune.study.artifacts import write_bytes_atomic
from autoprune.study.store import StudyStore


def write_report(store: StudyStore) -> dict[str, Path]:
    """Write ``report.html``, ``front.png`` and ``front.csv`` into the study's folder.

    Args:
        store: The study's record.

    Returns:
        The files' paths by their names.

    Raises:
        StorageError: If a file cannot be written.
    """
    from autoprune.report.html import report_page
    from autoprune.report.plot import write_png
    from autoprune.report.table import write_csv
    from autoprune.study.front import front_points, to_frame

    paths = store.paths
    write_csv(to_frame(front_points(store), paths), paths.front_csv)
    write_png(store, paths.front_png)
    write_bytes_atomic(paths.report, report_page(store).encode("utf-8"))
    return {path.name: path for path in (paths.report, paths.front_png, paths.front_csv)}
