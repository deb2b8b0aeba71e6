"""The settings beside a study's database: written once, compared at every later run."""

from __future__ import annotations

import json
from typing import Any

from autoprune.errors import StorageError, UsageError
from autoprune.naming import StudyPaths
from autoprune.study.database import SCHEMA
from autoprune.study.place import Place


def settings_text(settings: dict[str, Any]) -> str:
    """Return the settings as a YAML file that ``autoprune search -c`` takes."""
    lines = [f"# The settings of this study; `autoprune search -c settings.yaml` takes them. schema {SCHEMA}"]
    # JSON values are YAML values, and survive every reader alike.
    lines += [f"{name}: {json.dumps(value)}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def read_settings(paths: StudyPaths) -> dict[str, Any]:
    """Return the settings that a study was made with.

    Raises:
        StorageError: If the file cannot be read or is damaged.
    """
    try:
        return _parsed(paths.settings.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise StorageError(
            f"{str(paths.settings)!r} cannot be read: {error}",
            "restore the file, or set the study aside with --fresh",
        ) from error


def settings_in_database(text: object, place: Place) -> dict[str, Any]:
    """Return the settings that a study's database holds, which are those of its folder.

    Raises:
        StorageError: If they are missing or damaged.
    """
    try:
        if not isinstance(text, str):
            raise ValueError("they are missing")
        return _parsed(text)
    except (ValueError, KeyError, RecursionError) as error:
        raise StorageError(
            f"the settings of study {place.paths.name!r} in {str(place)!r} cannot be read: {error}",
            "run the same search again, which writes what is missing, or set the study aside with --fresh",
        ) from error


def _parsed(text: str) -> dict[str, Any]:
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    settings = {name: json.loads(value) for name, _, value in (line.partition(": ") for line in lines)}
    if not isinstance(settings["objectives"], list) or not isinstance(settings["sampler"], str):
        raise ValueError("objectives or sampler are of another type")
    settings["study"]
    return settings


def check_same(before: dict[str, Any], now: dict[str, Any], paths: StudyPaths) -> None:
    """Refuse settings other than those that a study was made with.

    Raises:
        UsageError: If one differs; the message holds each of them, before and now.
    """
    names = sorted(set(before) | set(now))
    changed = [f"  {n}: {before.get(n)!r} -> {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]
    if changed:
        raise UsageError(
            "\n".join([f"study {paths.name!r} was made with other settings:", *changed]),
            "use the settings it was made with, another --study NAME, or --fresh to start over (the old study is kept)",
        )
