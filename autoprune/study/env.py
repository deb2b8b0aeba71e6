"""env.json: versions, host, seed and data behind a study's figures."""

from __future__ import annotations

import json
from typing import Any

from autoprune.config import StudyConfig
from autoprune.naming import StudyPaths
from autoprune.study.artifacts import write_text_atomic
from autoprune.study.integrity import opened, sealed, set_aside
from autoprune.study.reading import read_json


def write_environment(
    paths: StudyPaths, config: StudyConfig, host: dict[str, Any], data_fingerprint: str
) -> None:
    """Write what is needed to judge or repeat the study's figures, after the entries of earlier runs.

    A file of which any entry is damaged is set aside whole.

    Args:
        paths: The study's paths.
        config: Its settings.
        host: Machine and versions.
        data_fingerprint: Content hash of the data and its splits.
    """
    runs = read_environment(paths)
    if not runs and paths.environment.exists():
        set_aside(paths.environment, "it cannot be read")
    entry: dict[str, Any] = {
        "host": host,
        "settings": config.model_dump(mode="json"),
        "data_fingerprint": data_fingerprint,
        "seed": config.seed,
    }
    # In the order that the file gives, by which their checksums go.
    entries = json.loads(json.dumps([*runs, entry], sort_keys=True))
    write_text_atomic(
        paths.environment, json.dumps([sealed(each) for each in entries], indent=1, sort_keys=True)
    )


def read_environment(paths: StudyPaths) -> list[dict[str, Any]]:
    """Return one entry for each run of the study; none if the file is missing or damaged."""
    try:
        runs = read_json(paths.environment)
        return [opened(run) for run in runs] if isinstance(runs, list) else []
    except (OSError, ValueError):
        return []
