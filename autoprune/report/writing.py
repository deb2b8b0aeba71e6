"""Writes the report of a study: the page, the picture and the table, each file in one step."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from autoprune.errors import StorageError
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
    write_atomic(paths.report, report_page(store).encode("utf-8"))
    return {path.name: path for path in (paths.report, paths.front_png, paths.front_csv)}


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Raises:
        StorageError: If it cannot be written; an earlier file is then as it was.
    """
    temporary: Path | None = None
    try:
        # A temporary file is private by default; the report is as readable as the study's other files.
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"{str(path)!r} cannot be written: {error.strerror or error}",
            "free space or mend the folder's permissions and run the same command again",
        ) from error
