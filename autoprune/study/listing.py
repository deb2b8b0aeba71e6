"""Which studies there are."""

from __future__ import annotations

from typing import Any

from autoprune.errors import StorageError, UsageError
from autoprune.naming import study_folders
from autoprune.study.store import StudyStore


def list_studies() -> list[dict[str, Any]]:
    """Return one row for each study here, for people and scripts."""
    rows = []
    for folder in study_folders():
        try:
            store = StudyStore.open(folder.name)
            records = store.records()
            settings = store.settings()
            rows.append(
                {
                    "study": folder.name,
                    "model": settings["model"],
                    "data": settings["data"],
                    "phase": store.phase,
                    "trials": len(records),
                    "failed": sum(r.state == "failed" for r in records),
                    "final": sum(r.fidelity == "final" for r in records),
                    "spent_s": round(store.spent_s, 1),
                }
            )
        except (StorageError, UsageError) as error:
            row = {"study": folder.name, "model": "", "data": "", "phase": f"unreadable: {error.message}"}
            rows.append({**row, "trials": 0, "failed": 0, "final": 0, "spent_s": 0.0})
    return rows
