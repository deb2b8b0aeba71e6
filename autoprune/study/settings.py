"""The settings beside a study's database: written once, compared at every later run."""

from __future__ import annotations

import json
from typing import Any

from autoprune.config import OBJECTIVES, SAMPLERS
from autoprune.errors import StorageError, UsageError
from autoprune.naming import StudyPaths
from autoprune.study.database import SCHEMA, SETTINGS_KEY
from autoprune.study.integrity import digest_of, set_aside, study_attribute
from autoprune.study.place import Place
from autoprune.study.reading import parse_json, read_text
from autoprune.target import RUNTIMES

_SUM = "# sum "
_NEEDED = ("model", "study", "sampler")


def settings_text(settings: dict[str, Any]) -> str:
    """Return the settings as a YAML file that ``autoprune search -c`` takes."""
    lines = [f"# The settings of this study; `autoprune search -c settings.yaml` takes them. schema {SCHEMA}"]
    # JSON values are YAML values, and survive every reader alike.
    lines += [f"{name}: {json.dumps(value)}" for name, value in settings.items()]
    return "\n".join([*lines, f"{_SUM}{digest_of(lines)}"]) + "\n"


def read_settings(paths: StudyPaths) -> dict[str, Any]:
    """Return the settings that a study was made with.

    Raises:
        StorageError: If the file cannot be read or is damaged.
    """
    try:
        return _parsed(read_text(paths.settings))
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(
            f"{str(paths.settings)!r} cannot be read: {error}",
            "run the same search again, which restores the file, or set the study aside with --fresh",
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
    except (ValueError, KeyError) as error:
        raise StorageError(
            f"the settings of study {place.paths.name!r} in {str(place)!r} cannot be read: {error}",
            "run the same search again, which writes what is missing, or set the study aside with --fresh",
        ) from error


def _parsed(text: str) -> dict[str, Any]:
    lines = text.splitlines()
    if lines and lines[-1].startswith(_SUM) and lines[-1] != f"{_SUM}{digest_of(lines[:-1])}":
        raise ValueError("its checksum differs: it is not what was written")
    plain = (line for line in lines if line and not line.startswith("#"))
    settings = {name: parse_json(value) for name, _, value in (line.partition(": ") for line in plain)}
    _check_known(settings)
    return settings


def check_settings(now: dict[str, Any], paths: StudyPaths) -> None:
    """Refuse settings other than those that a study was made with.

    A damaged file of settings is set aside where the database has them too, so that it is written anew.

    Raises:
        UsageError: If one differs; the message holds each of them, before and now.
        StorageError: If the settings that the study was made with cannot be read.
    """
    try:
        check_same(read_settings(paths), now, paths)
    except StorageError as error:
        kept = study_attribute(paths.database, SETTINGS_KEY)
        if kept is None:
            raise
        try:
            before = _parsed(kept)
        except (ValueError, KeyError):
            raise error from None
        check_same(before, now, paths)
        set_aside(paths.settings, error.message)


def _check_known(settings: dict[str, Any]) -> None:
    """Refuse settings that no version wrote: what reads a study relies on their forms.

    They may be of a machine with other cores and other runtimes, so they are not validated as those of a search.
    """
    objectives = settings["objectives"]
    texts = {name: settings.get(name) for name in ("model", "study", "sampler", "data", "weights", "space")}
    wrong = [
        n for n, value in texts.items() if not isinstance(value, str) and (n in _NEEDED or value is not None)
    ]
    if (
        not isinstance(objectives, list)
        or not objectives
        or any(each not in OBJECTIVES for each in objectives)
    ):
        wrong.append("objectives")
    if not wrong and settings["sampler"] not in SAMPLERS:
        wrong.append("sampler")
    also = settings.get("also", [])
    targets = [settings.get("target", {}), *(also if isinstance(also, list) else [None])]
    if not all(isinstance(each, dict) and _is_target(each) for each in targets):
        wrong.append("target")
    if wrong:
        raise ValueError(f"{', '.join(wrong)} cannot be what a study was made with")


def _is_target(settings: dict[str, Any]) -> bool:
    plain = all(isinstance(value, str | int | None) for value in settings.values())
    return plain and settings.get("runtime", "onnxruntime") in RUNTIMES


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
