"""Damage of a study's files: found by checksums, named, set aside under another name, never deleted."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from autoprune.disk import flush
from autoprune.errors import StorageError
from autoprune.naming import StudyPaths
from autoprune.study.reading import parse_json

_log = logging.getLogger(__name__)

_SUM = "sum"
# What a text of seal_value has, of which one bit that flips leaves a part, and what earlier versions kept has not.
_SEALED = re.compile(r'^["\[]| #|[0-9a-f]{16}$')
# Optuna's states; anything else in their column is damage.
_STATES = {"RUNNING", "WAITING", "COMPLETE", "PRUNED", "FAIL"}
_ATTRIBUTES = "autoprune:"
_NOTES = "note:"
# What Optuna reads besides our own texts, and what refuses a value that it never wrote. Of numbers, of which there are
# hundreds of thousands, SQLite itself picks those that are none.
_READ: dict[str, dict[str, Callable[[Any], object]]] = {
    "trials": {"datetime_start": datetime.fromisoformat, "datetime_complete": datetime.fromisoformat},
    "study_directions": {"direction": {"MINIMIZE": 1, "MAXIMIZE": 1}.__getitem__, "objective": int},
    "trial_values": {"objective": int, "value": float, "value_type": {"FINITE": 1}.__getitem__},
    "trial_params": {"param_value": float, "distribution_json": json.loads},
    "trial_system_attributes": {"value_json": json.loads},
    "study_system_attributes": {"value_json": json.loads},
    "study_user_attributes": {"value_json": json.loads},
}
# Own numbers of the study, as opposed to its notes; see StudyStore.
OWN = ("spent_s", "ended_rounds_s", "ended_budget", "phase")
_BESIDE = ("", "-wal", "-shm")
# What says nothing of the file's content: busy, locked, no memory, read-only, interrupted, reading failed, full,
# cannot be opened (https://sqlite.org/rescode.html).
_PASSING = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_PROTOCOL,
)  # fmt: skip
# Some of these messages hold the whole text that is damaged.
_MOST_SHOWN = 300


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with a checksum of it among its names."""
    return {**content, _SUM: digest_of(content)}


def seal(content: dict[str, Any]) -> str:
    """Return a mapping as JSON with a checksum of it among its names."""
    return json.dumps(sealed(content))


def unseal(text: str) -> dict[str, Any]:
    """Return the mapping that :func:`seal` wrote; what earlier versions wrote has no checksum.

    Raises:
        ValueError: If it is no JSON mapping, or not what was written.
    """
    return opened(parse_json(text))


def opened(content: object) -> dict[str, Any]:
    """Return the mapping that :func:`sealed` was given; see :func:`unseal`."""
    if not isinstance(content, dict):
        raise ValueError("it is no mapping")
    rest = {name: value for name, value in content.items() if name != _SUM}
    wanted = content.get(_SUM)
    if wanted is not None and wanted != digest_of(rest):
        raise ValueError("its checksum differs: it is not what was written")
    return rest


def seal_line(text: str) -> str:
    """Return a text with its checksum at the end."""
    return f"{text} #{digest_of(text)}"


def unseal_line(text: str) -> str:
    """Return the text that :func:`seal_line` wrote; what earlier versions wrote has no checksum.

    Raises:
        ValueError: If it is not what was written.
    """
    content, mark, digest = text.rpartition(" #")
    if not mark or len(digest) != 16:
        return text
    if digest != digest_of(content):
        raise ValueError("its checksum differs: it is not what was written")
    return content


def seal_value(value: object) -> str:
    """Return a JSON value as text with its checksum at the end."""
    return seal_line(json.dumps(value))


def unseal_value(kept: object) -> object:
    """Return the value that :func:`seal_value` wrote; earlier versions kept the value itself.

    Raises:
        ValueError: If it is not what was written.
    """
    return parse_json(unseal_line(kept)) if isinstance(kept, str) and _SEALED.search(kept) else kept


def digest_of(content: object) -> str:
    """Return the checksum of JSON values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def set_aside(path: Path, why: str) -> Path:
    """Rename a damaged file or folder to ``<name>.damaged-1``, or the next number that is free, and say so.

    Args:
        path: The file or folder.
        why: What is wrong with it, for the log.
    """
    number = 1
    while (place := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(place)
    _log.warning("%s is damaged (%s): it was set aside as %s", path, why, place.name)
    return place


# -- the database ----------------------------------------------------------------------------


def fault_of(database: Path, *, trials: bool = True) -> str:
    """Return what is wrong with a study's SQLite file; empty if nothing is.

    Its pages are checked by SQLite, every text of the study by its own checksum, which no check of pages replaces: a
    bit that flips inside of a text leaves the pages sound. One that is busy or cannot be read now is not damaged.

    Args:
        database: The file.
        trials: Whether what trials hold is checked too. Who only reads finds that out on the way: their parameters are
            for samplers, and each record is checked as it is read.
    """
    if database.stat().st_size == 0:  # a run was killed as it made the file
        return ""
    try:
        with closing(sqlite3.connect(database, timeout=30)) as link:
            (found,) = link.execute("PRAGMA integrity_check(1)").fetchone()
            return str(found) if found != "ok" else next(_faults(link, trials), "")
    except (sqlite3.Error, UnicodeDecodeError) as error:
        # The low byte of SQLite's code is its kind. A text that is no UTF-8 comes without a code.
        passing = getattr(error, "sqlite_errorcode", 0) & 0xFF in _PASSING
        return "" if passing else f"{str(error):.{_MOST_SHOWN}}"


def _faults(link: sqlite3.Connection, trials: bool) -> Iterator[str]:
    """Yield what is wrong with the content of a sound file."""
    tables = {name for (name,) in link.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not {"studies", "trials", "trial_user_attributes", "study_user_attributes"} <= tables:
        return  # a run was killed as it made them
    found = link.execute("SELECT number, state FROM trials ORDER BY number").fetchall()
    if [number for number, _ in found] != list(range(len(found))):
        yield "numbers of trials are missing"
    yield from (f"trial {number} is {state!r}" for number, state in found if state not in _STATES)
    for table, columns in _READ.items():
        if table in tables and (trials or not table.startswith("trial_")):
            yield from _faults_of_values(link, table, columns)
    if trials:
        yield from _faults_of_texts(link)
    for key, value in link.execute("SELECT key, value_json FROM study_user_attributes"):
        if key.startswith(_NOTES) and (fault := _fault(value, lambda text: unseal_line(json.loads(text)))):
            yield f"{key}: {fault}"
        if key in OWN and (fault := _fault(value, lambda text: unseal_value(json.loads(text)))):
            yield f"{key}: {fault}"


def _faults_of_values(
    link: sqlite3.Connection, table: str, columns: dict[str, Callable[[Any], object]]
) -> Iterator[str]:
    for name, sound in columns.items():
        few = f"typeof({name}) NOT IN ('integer', 'real')" if sound in (int, float) else "true"
        query = f"SELECT DISTINCT {name} FROM {table} WHERE {name} IS NOT NULL AND {few}"  # noqa: S608
        for (value,) in link.execute(query):
            if fault := _fault(value, sound):
                yield f"{name} in {table}: {fault}"


def _faults_of_texts(link: sqlite3.Connection) -> Iterator[str]:
    texts = link.execute(
        "SELECT t.number, a.key, a.value_json FROM trial_user_attributes a JOIN trials t USING (trial_id)"
    )
    for number, key, value in texts:
        if key.startswith(_ATTRIBUTES) and (fault := _fault(value, _read_text)):
            yield f"{key.removeprefix(_ATTRIBUTES)} of trial {number}: {fault}"


def _read_text(text: str) -> object:
    return parse_json(unseal_line(json.loads(text)))


def _fault(value: str, read: Any) -> str:
    try:
        read(value)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        return f"{str(error):.{_MOST_SHOWN}}"
    return ""


def study_attribute(database: Path, key: str) -> str | None:
    """Return a text of the study in a SQLite file; None if it cannot be read."""
    if not database.exists():
        return None
    try:
        with closing(sqlite3.connect(database, timeout=30)) as link:
            found = link.execute(
                "SELECT value_json FROM study_user_attributes WHERE key = ?", (key,)
            ).fetchone()
            return None if found is None else str(json.loads(found[0]))
    except (sqlite3.Error, ValueError):
        return None


def keep_copy(paths: StudyPaths) -> None:
    """Keep a copy of a sound database beside it, whole or not at all; the next damage is healed from it."""
    place = paths.database_copy
    unfinished = place.with_name(f".{place.name}.unfinished")
    try:
        with closing(sqlite3.connect(paths.database)) as source, closing(sqlite3.connect(unfinished)) as copy:
            # What is still in the log goes into the file, which then stands by itself.
            source.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            source.backup(copy)
        flush(unfinished)
        unfinished.replace(place)
        with suppress(OSError):
            flush(place.parent)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def check_database(paths: StudyPaths) -> None:
    """Refuse to show a study whose database is damaged; what its trials hold is checked as it is read.

    Raises:
        StorageError: Names file and fault.
    """
    if fault := fault_of(paths.database, trials=False):
        raise StorageError(
            f"the record of study {paths.name!r} ({str(paths.database)!r}) is damaged: {fault}",
            "the same search again sets it aside and goes on from its copy; --fresh sets the study aside",
        )


def heal_database(paths: StudyPaths) -> None:
    """Check the database before it is written to; a damaged one is set aside, and the copy takes its place.

    Raises:
        StorageError: If it is damaged and there is no sound copy; names file and fault.
    """
    copy = paths.database_copy
    is_there = paths.database.exists() and paths.database.stat().st_size > 0
    if not is_there and not copy.exists():
        return
    fault = fault_of(paths.database) if is_there else "it is empty or missing"
    if not fault:
        return
    if not copy.exists() or fault_of(copy):
        raise StorageError(
            f"the record of study {paths.name!r} ({str(paths.database)!r}) is damaged: {fault}",
            "there is no sound copy of it here: restore it from a backup, or set the study aside with --fresh",
        )
    if not paths.database.exists():
        paths.database.touch()
    aside = set_aside(paths.database, fault)
    for ending in _BESIDE[1:]:
        beside = paths.database.with_name(paths.database.name + ending)
        if beside.exists():
            beside.rename(aside.with_name(aside.name + ending))
    unfinished = paths.database.with_name(f".{paths.database.name}.unfinished")
    unfinished.write_bytes(copy.read_bytes())
    flush(unfinished)
    unfinished.replace(paths.database)
    with suppress(OSError):
        flush(paths.root)
    _log.warning(
        "the study goes on from the copy %s: trials that were recorded after it was made are lost from the record",
        copy.name,
    )


def set_aside_orphans(paths: StudyPaths, trials: int) -> None:
    """Set aside artifacts that no trial of the record belongs to, before other trials get their numbers.

    The record then ends before the artifacts do: its last part was lost, such as a log that was cut off.
    """
    for folder in sorted(paths.artifacts.glob("trial-*")):
        number = folder.name.removeprefix("trial-").partition("-")[0]
        if number.isascii() and number.isdigit() and int(number) >= trials:
            set_aside(folder, f"the record has {trials} trials: its end was lost")
