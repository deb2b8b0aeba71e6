"""How a study's record is opened: made or resumed by its one driver, read by others, set aside."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna

from autoprune.errors import UsageError
from autoprune.faults import reached
from autoprune.naming import StudyPaths, study_folders, unknown_name
from autoprune.study.artifacts import write_text_atomic
from autoprune.study.database import (
    SETTINGS_KEY,
    check_ours,
    complete_study,
    load_study,
    make_sqlite,
    make_study,
    open_storage,
    read_faults,
    rename_study,
    storage_faults,
    study_id_of,
    study_names,
)
from autoprune.study.integrity import check_database, heal_database, keep_copy, set_aside_orphans
from autoprune.study.lease import Lease
from autoprune.study.locking import free_name, move_aside, take_lock
from autoprune.study.place import Place
from autoprune.study.record_storage import RecordStorage
from autoprune.study.rows import count_trials
from autoprune.study.settings import (
    check_same,
    check_settings,
    read_settings,
    settings_in_database,
    settings_text,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """An open record.

    Attributes:
        place: Where it is.
        study: Optuna's view of it.
        storage: Its database.
        settings: The study's settings.
        release: Lets another driver have it.
    """

    place: Place
    study: optuna.Study
    storage: RecordStorage
    settings: dict[str, Any]
    release: Callable[[], object] = lambda: None


def open_for_writing(place: Place, settings: dict[str, Any], lease_s: float) -> Opened:
    """Open a record for its one driver; make it if there is none.

    Raises:
        UsageError: If a setting differs from the study's; shows which.
        StorageError: If another driver has the study, or it cannot be read or written.
    """
    return _own_file(place, settings) if place.database is None else _leased(place, settings, lease_s)


def _own_file(place: Place, settings: dict[str, Any]) -> Opened:
    paths = place.paths
    lock = take_lock(paths)
    try:
        _same_settings(paths, settings)
        with storage_faults(place):
            heal_database(paths)
            if not paths.database.exists():
                make_sqlite(place, settings, settings_text(settings))
            # The file of an earlier version may have been left without its tables.
            storage = open_storage(place, create=True)
            study = make_study(storage, settings)
            complete_study(study, settings, settings_text(settings))
            reached("study:database")
            with storage.engine.connect() as link:
                set_aside_orphans(paths, count_trials(link, study._study_id))
    except BaseException:
        os.close(lock)
        raise
    return Opened(place, study, storage, settings, partial(_leave, paths, lock))


def _leave(paths: StudyPaths, lock: int) -> None:
    """Keep a copy of the record and let another driver have the study."""
    try:
        keep_copy(paths)
    except (OSError, sqlite3.Error) as error:
        _log.warning("no copy of %s was kept: %s", paths.database, error)
    os.close(lock)


def _leased(place: Place, settings: dict[str, Any], lease_s: float) -> Opened:
    paths = place.paths
    if paths.settings.exists():
        check_same(read_settings(paths), settings, paths)
    with storage_faults(place):
        storage = open_storage(place, create=True)
        study = make_study(storage, settings)
        check_ours(study, place)
        lease = Lease(storage.engine, study._study_id, paths.name, lease_s)
        lease.take()
    try:
        storage.lease = lease
        with storage_faults(place):
            kept = study.user_attrs.get(SETTINGS_KEY)
            if kept is not None:
                check_same(settings_in_database(kept, place), settings, paths)
            place.remember()
            _same_settings(paths, settings)
            complete_study(study, settings, settings_text(settings))
    except BaseException:
        lease.release()
        raise
    return Opened(place, study, storage, settings, lease.release)


def _same_settings(paths: StudyPaths, settings: dict[str, Any]) -> None:
    if paths.settings.exists():
        check_settings(settings, paths)
    if not paths.settings.exists():  # or it was damaged, and set aside
        write_text_atomic(paths.settings, settings_text(settings))
        reached("study:settings")


def open_for_reading(place: Place) -> Opened:
    """Open an existing record.

    Raises:
        UsageError: If there is none of this name; the message holds near matches.
        StorageError: If it cannot be read.
    """
    paths = place.paths
    if place.database is None and not (paths.database.is_file() and paths.settings.is_file()):
        raise _unknown(place)
    with read_faults(place):
        if place.database is None:
            check_database(paths)
        storage = open_storage(place, create=False)
        if place.database is not None and study_id_of(storage, paths.name) is None:
            storage.engine.dispose()
            raise _unknown(place)
        study = load_study(storage, place)
        kept = study.user_attrs.get(SETTINGS_KEY)
    if place.database is None:
        return Opened(place, study, storage, read_settings(paths))
    settings = settings_in_database(kept, place)
    if paths.settings.is_file():
        check_same(read_settings(paths), settings, paths)
    return Opened(place, study, storage, settings)


def _unknown(place: Place) -> UsageError:
    known = {entry.name for entry in study_folders()}
    where = "here"
    if place.database is not None:
        known |= set(study_names(place))
        where = f"here and in {place}"
    return unknown_name("study", place.paths.name, known, f"`autoprune studies` lists the studies {where}")


def has_record(paths: StudyPaths, storage: str | None) -> bool:
    """Return whether a study was begun, here or in the database that was given."""
    place = Place.of(paths, storage)
    if place.database is None:
        return paths.database.exists()
    with storage_faults(place):
        opened = open_storage(place, create=True)
        try:
            return study_id_of(opened, paths.name) is not None
        finally:
            opened.engine.dispose()


def set_study_aside(place: Place, lease_s: float) -> None:
    """Rename a study and its folder to ``<name>.1``, or the next number that is free in both.

    Raises:
        StorageError: If another driver has it.
    """
    paths = place.paths
    if place.database is None:
        if paths.root.exists():
            # Whoever runs the study now must not have its folder moved away under it.
            lock = take_lock(paths)
            try:
                move_aside(paths, free_name(paths))
            finally:
                os.close(lock)
        return
    with storage_faults(place):
        storage = open_storage(place, create=True)
        study_id = study_id_of(storage, paths.name)
        name = free_name(paths)
        if study_id is not None:
            check_ours(load_study(storage, place), place)
            name = free_name(paths, [each.study_name for each in storage.get_all_studies()])
            lease = storage.lease = Lease(storage.engine, study_id, paths.name, lease_s)
            lease.take()
            try:
                rename_study(storage, study_id, name)
            finally:
                lease.release()
        storage.engine.dispose()
    if paths.root.exists():
        move_aside(paths, name)
