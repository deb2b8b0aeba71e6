"""From a settings file, flags and ``key=value`` words to one validated StudyConfig."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from autoprune.config import StudyConfig, make_config, read_targets
from autoprune.errors import UsageError
from autoprune.execution import ENGINES
from autoprune.naming import StudyPaths, unknown_name
from autoprune.yaml_io import parse_yaml, read_yaml


def gather(
    file: Path | None,
    flags: Mapping[str, Any],
    overrides: Iterable[str] = (),
    *,
    limits: Mapping[str, float | None] | None = None,
    execution: Mapping[str, Any] | None = None,
) -> StudyConfig:
    """Validate settings from all three places; overrides win over flags, and flags over the file.

    Args:
        file: YAML file of settings; None for none.
        flags: Values of the options; those that are None were not given.
        overrides: Words such as ``target.threads=2``; the value is read as YAML.
        limits: Flags that are settings of ``limits``.
        execution: Flags that are settings of ``execution``.

    Raises:
        UsageError: If a word, the file or a setting cannot be used.
    """
    values = _from_file(file) if file is not None else {}
    given = {name: value for name, value in flags.items() if value is not None}
    if "target" in given:
        read_targets(given)
        if isinstance(values.get("target"), dict):
            given["target"] = {**values["target"], **given["target"]}
    values |= given
    for part, options in (("limits", limits), ("execution", execution)):
        own = {name: value for name, value in (options or {}).items() if value is not None}
        if own:
            before = values.get(part)
            values[part] = {**(before if isinstance(before, dict) else {}), **own}
    for word in overrides:
        _override(values, word)
    try:
        config = make_config(values)
        config.check_installed()
        return config
    except UsageError as error:
        where = f" (settings of {file})" if file is not None else ""
        raise UsageError(error.message + where, error.hint) from None


def _from_file(file: Path) -> dict[str, Any]:
    document = read_yaml(file)
    if not isinstance(document.values, dict):
        raise UsageError(f"{file}:1: settings are a mapping of names to values, not {document.values!r:.60}")
    for name in document.values:
        if name not in StudyConfig.model_fields:
            error = unknown_name("setting", name, StudyConfig.model_fields)
            raise UsageError(f"{file}:{document.line((name,))}: {error.message}")
    return document.values


def _override(values: dict[str, Any], word: str) -> None:
    name, equals, text = word.partition("=")
    if not equals or not name:
        raise UsageError(
            f"{word!r} is neither an option nor key=value",
            "settings are given as words such as target.threads=2",
        )
    read_targets(values)
    *parents, last = name.split(".")
    if name.split(".")[0] not in StudyConfig.model_fields:
        raise unknown_name("setting", name, StudyConfig.model_fields)
    inner = values
    for parent in parents:
        inner = inner.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UsageError(f"{word!r} cannot be used: {parent!r} holds no settings of its own")
    inner[last] = parse_yaml(text, f"the value of {name}").values


def check_engine(engine: str | None) -> str | None:
    """Return an engine's name, or refuse it with near matches.

    Raises:
        UsageError: If there is none of this name.
    """
    if engine is not None and engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    return engine


def check_place(settings: StudyConfig, *, fresh: bool) -> None:
    """Refuse a storage that the study cannot have, before anything is loaded.

    Raises:
        UsageError: If it cannot be used, psycopg is missing, or the study has its record somewhere else.
    """
    from autoprune.study.place import Place, check_installed

    paths = StudyPaths.of(settings.study_name)
    read = Place.of if fresh else Place.for_writing
    check_installed(read(paths, settings.storage))
