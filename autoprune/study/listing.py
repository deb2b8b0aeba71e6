"""Which studies there are."""

from __future__ import annotations

from typing import Any

from autoprune.errors import StorageError, UsageError
from autoprune.naming import StudyPaths, study_folders
from autoprune.storage_url import check_storage, given_storage, is_sqlite, parse_database_url
from autoprune.study.database import storage_faults, study_names
from autoprune.study.place import Place
from autoprune.study.store import StudyStore


def list_studies(storage: str | None = None) -> list[dict[str, Any]]:
    """Return one row for each study here and in a database, for people and scripts.

    Args:
        storage: URL of the database; that of ``AUTOPRUNE_STORAGE``, if there is one, if not given.

    Raises:
        UsageError: If the URL cannot be used.
        StorageError: If the database cannot be read.
    """
    here = [folder.name for folder in study_folders()]
    rows = [_row(name, None) for name in here]
    storage = check_storage(given_storage(storage))
    if storage is not None and not is_sqlite(storage):
        place = Place(StudyPaths.of("studies"), parse_database_url(storage))
        with storage_faults(place):
            there = study_names(place)
        rows += [_row(name, storage) for name in there if name not in here]
    return rows


def _row(name: str, storage: str | None) -> dict[str, Any]:
    try:
        store = StudyStore.open(name, storage)
        records = store.records()
        settings = store.settings()
        return {
            "study": name,
            "model": settings["model"],
            "data": settings["data"],
            "phase": store.phase,
            "trials": len(records),
            "failed": sum(r.state == "failed" for r in records),
            "final": sum(r.fidelity == "final" for r in records),
            "spent_s": round(store.spent_s, 1),
        }
    except (StorageError, UsageError) as error:
        row = {"study": name, "model": "", "data": "", "phase": f"unreadable: {error.message}"}
        return {**row, "trials": 0, "failed": 0, "final": 0, "spent_s": 0.0}
