"""How a study's database is opened, what it is told to hold, and what is said where it cannot be used."""

from __future__ import annotations

import sqlite3
import warnings
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from optuna.study import StudyDirection
from sqlalchemy import text
from sqlalchemy.exc import OperationalError, ProgrammingError

from autoprune.errors import StorageError, TrialError
from autoprune.naming import StudyPaths
from autoprune.study.database import (
    SCHEMA,
    SCHEMA_KEY,
    SETTINGS_KEY,
    check_ours,
    complete_study,
    load_study,
    make_study,
    open_storage,
    read_faults,
    rename_study,
    storage_faults,
    study_id_of,
    study_names,
)
from autoprune.study.place import Place
from autoprune.study.settings import settings_text
from autoprune.study.store import StudyStore
from tests.study.made import add, config, open_for_writing

URL = "postgresql://user:secret@host/base"
GO_ON = (
    "free space or mend the file's permissions and run the same command again; finished trials are kept. "
    "A damaged file can be set aside with --fresh"
)
REACH = (
    "see that the server runs and can be reached from here, then run the same command again; finished trials are "
    "kept"
)
LOG_IN = "give the password in PGPASSWORD, in ~/.pgpass, or within the URL in AUTOPRUNE_STORAGE"


@pytest.fixture
def here() -> Place:
    return Place(StudyPaths.of("kept"))


@pytest.fixture
def there() -> Place:
    return Place.of(StudyPaths.of("kept"), URL)


def told(place: Place, error: Exception) -> StorageError:
    with pytest.raises(StorageError) as caught, storage_faults(place):
        raise error
    return caught.value


class UndefinedTable(Exception):
    """As psycopg calls it."""


@pytest.mark.parametrize(
    ("error", "said", "hint"),
    [
        (
            OperationalError("INSERT", {}, Exception("disk I/O error\nmore")),
            "cannot be used: disk I/O error",
            GO_ON,
        ),
        (OSError(28, "No space left on device"), "cannot be used: [Errno 28] No space left on device", GO_ON),
        (sqlite3.OperationalError(""), "cannot be used: OperationalError", GO_ON),
        (OperationalError("", {}, Exception("x" * 999)), "cannot be used: " + "x" * 300, GO_ON),
        (
            OperationalError("SELECT", {}, Exception("no such table: studies")),
            "has no tables: the run that made it was killed before it had",
            "run the same search again: it makes them; --fresh sets a damaged file aside",
        ),
    ],
)
def test_faults_of_the_file(error: Exception, said: str, hint: str, here: Place) -> None:
    failed = told(here, error)
    assert (failed.message, failed.hint) == (
        f"the record of study 'kept' ({str(here.paths.database)!r}) {said}",
        hint,
    )
    assert failed.__cause__ is error
    wrapped = optuna.exceptions.StorageInternalError("an internal error")
    wrapped.__cause__ = error
    assert told(here, wrapped).message == failed.message


@pytest.mark.parametrize(
    ("error", "said", "hint"),
    [
        (
            OperationalError("", {}, Exception("connection refused")),
            "cannot be used: connection refused",
            REACH,
        ),
        (
            OperationalError("", {}, Exception('FATAL: password authentication failed for user "secret"')),
            'cannot be used: FATAL: password authentication failed for user "***"',
            LOG_IN,
        ),
        (
            OperationalError("", {}, Exception("no pg_hba entry\nauthentication is not possible")),
            "cannot be used: no pg_hba entry",
            LOG_IN,
        ),
        (
            ProgrammingError("", {}, UndefinedTable("relation studies does not exist")),
            "is not there: the database holds no studies",
            "see that it is the right one",
        ),
    ],
)
def test_faults_of_a_server(error: Exception, said: str, hint: str, there: Place) -> None:
    failed = told(there, error)
    assert (failed.message, failed.hint) == (
        f"the record of study 'kept' ('postgresql://user@host/base') {said}",
        hint,
    )
    assert failed.__cause__ is None


def test_whatever_reading_raises_is_told_as_damage_and_what_is_ours_as_it_is(here: Place) -> None:
    with pytest.raises(StorageError) as caught, read_faults(here):
        raise KeyError("x" * 999)
    assert caught.value.message == (
        f"the record of study 'kept' ({str(here.paths.database)!r}) is damaged: KeyError: '" + "x" * 289
    )
    assert caught.value.hint == (
        "the same search again checks it and goes on from its copy; --fresh sets the study aside"
    )
    with pytest.raises(StorageError, match=r"is damaged: ValueError\n"), read_faults(here):
        raise ValueError
    with pytest.raises(TrialError, match="own"), read_faults(here):
        raise TrialError("nan", "own")
    with pytest.raises(StorageError, match="cannot be used: locked"), read_faults(here):
        raise sqlite3.OperationalError("locked")


def test_every_commit_to_the_file_is_flushed_and_readers_do_not_wait_for_it(tmp_path: Path) -> None:
    store = open_for_writing("kept")
    with store._storage.engine.connect() as link:
        assert link.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert link.execute(text("PRAGMA synchronous")).scalar() == 2
    store.release()
    place = Place(StudyPaths.of("none"))
    with pytest.raises(FileNotFoundError, match=r"study\.db' is missing"):
        open_storage(place, create=False)
    assert not place.paths.database.exists()
    assert open_storage(Place(StudyPaths.of("kept")), create=False).patience_s == 60.0


def test_a_study_holds_what_its_settings_say() -> None:
    store = open_for_writing("kept", objectives=["accuracy", "size"])
    study = store._study
    assert study.directions == [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    assert study.metric_names == ["accuracy", "size_ratio"]
    assert study.user_attrs[SCHEMA_KEY] == SCHEMA == 1
    assert study.user_attrs[SETTINGS_KEY] == settings_text(store.settings())
    assert (SCHEMA_KEY, SETTINGS_KEY) == (
        "autoprune_schema",
        "autoprune:settings",
    )  # as earlier versions wrote them
    complete_study(study, {**store.settings(), "objectives": ["accuracy", "latency"]}, "other")
    assert study.metric_names == ["accuracy", "latency_ratio"]
    assert study.user_attrs[SETTINGS_KEY] == settings_text(store.settings())  # what is there stays
    make_study(store._storage, store.settings())
    assert study_id_of(store._storage, "kept") == study._study_id
    assert study_id_of(store._storage, "other") is None


def test_opening_a_study_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = open_for_writing("kept")
        add(store, 0.5)
        store.release()
        assert len(StudyStore.open("kept").records()) == 1


def test_a_study_of_something_else_is_refused(here: Place) -> None:
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="kept")
    check_ours(study, here)  # nothing is in it
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(StorageError) as caught:
        check_ours(study, here)
    assert (caught.value.message, caught.value.hint) == (
        f"study 'kept' in {str(here)!r} was not made by autoprune",
        "use another --study NAME, or another database",
    )
    study.set_user_attr(SCHEMA_KEY, 1)
    check_ours(study, here)


def test_a_study_gets_another_name() -> None:
    store = open_for_writing("kept")
    add(store, 0.5)
    rename_study(store._storage, store._study._study_id, "other")
    store.release()
    with closing(sqlite3.connect(store.paths.database)) as link:
        assert link.execute("SELECT study_name FROM studies").fetchall() == [("other",)]
    study = load_study(open_storage(store.place, create=False), store.place)
    assert (study.study_name, len(study.trials)) == ("other", 1)


def test_a_database_without_tables_holds_no_studies(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place.of(StudyPaths.of("kept"), database)
    assert study_names(place) == []
    with pytest.raises(StorageError) as caught:
        open_storage(place, create=False)
    assert (caught.value.message, caught.value.hint) == (
        f"{str(place)!r} holds no studies of autoprune",
        "see that it is the right database; `autoprune search --storage URL` makes a study there",
    )
    monkeypatch.setenv("AUTOPRUNE_STORAGE", database)
    for name in ("b", "a"):
        open_for_writing(name).release()
    storage = open_storage(place, create=True)
    optuna.create_study(storage=storage, study_name="foreign")
    assert storage.get_study_name_from_id(make_study(storage, config("c").identity())._study_id) == "c"
    storage.engine.dispose()
    assert study_names(place) == ["a", "b"]
