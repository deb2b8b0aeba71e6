"""The database of a study: Optuna's tables in one SQLite file in WAL mode, or in PostgreSQL."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import optuna
from sqlalchemy import URL, Connection, create_engine, event, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from autoprune.disk import flush
from autoprune.errors import AutopruneError, StorageError
from autoprune.study.lease import TABLE
from autoprune.study.place import Place, check_installed
from autoprune.study.record_storage import PATIENCE_S, RecordStorage

SCHEMA = 1
SCHEMA_KEY = "autoprune_schema"
SETTINGS_KEY = "autoprune:settings"
_DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {
    "accuracy": "maximize",
    "latency": "minimize",
    "size": "minimize",
}
_FAULTS = (SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError, OSError)
METRIC_NAMES = {"accuracy": "accuracy", "latency": "latency_ratio", "size": "size_ratio"}
# Of drivers that make the tables in the same moment one does, the others wait: "autoprune" in ASCII, the first 8.
_MAKING_TABLES = int.from_bytes(b"autoprun", "big") >> 1
_AS_THEY_DIE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}


class NoStudiesError(StorageError):
    """Raised when a database has no tables yet."""


@contextmanager
def storage_faults(place: Place) -> Iterator[None]:
    """Turn faults of the database and the disk into a ``StorageError`` that says what to do."""
    try:
        yield
    except _FAULTS as error:
        fault = error.__cause__ or error
        cause = str(getattr(fault, "orig", None) or fault).strip().splitlines() or [type(fault).__name__]
        said, hint = cause[0], _hint(place, " ".join(cause))
        if place.database is not None:
            said = place.database.clean(said)
        said = f"{said:.300}"  # not before it is clean: half of a password is none that is known
        if (
            "no such table" not in said
            and "UndefinedTable" not in type(getattr(fault, "orig", None)).__name__
        ):
            said = f"cannot be used: {said}"
        elif place.database is not None:
            said, hint = "is not there: the database holds no studies", "see that it is the right one"
        else:
            said = "has no tables: the run that made it was killed before it had"
            hint = "run the same search again: it makes them; --fresh sets a damaged file aside"
        failed = StorageError(f"the record of study {place.paths.name!r} ({str(place)!r}) {said}", hint)
        # The chain of a fault of PostgreSQL is left out: what else it holds is not ours to clean.
        raise failed from (error if place.database is None else None)


def _hint(place: Place, cause: str) -> str:
    if place.database is None:
        return (
            "free space or mend the file's permissions and run the same command again; finished trials are kept. "
            "A damaged file can be set aside with --fresh"
        )
    if "password" in cause or "authentication" in cause:
        return "give the password in PGPASSWORD, in ~/.pgpass, or within the URL in AUTOPRUNE_STORAGE"
    return (
        "see that the server runs and can be reached from here, then run the same command again; "
        "finished trials are kept"
    )


@contextmanager
def read_faults(place: Place) -> Iterator[None]:
    """Turn whatever a damaged or hostile record makes Optuna raise into a ``StorageError``; for reading alone."""
    with storage_faults(place):
        try:
            yield
        except (AutopruneError, *_FAULTS):
            raise
        except Exception as error:  # Optuna decodes cells with many readers, which trust what they find
            first = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
            raise StorageError(
                f"the record of study {place.paths.name!r} ({str(place)!r}) is damaged: {first:.300}",
                "the same search again checks it and goes on from its copy; --fresh sets the study aside",
            ) from error


def open_storage(place: Place, *, create: bool, file: Path | None = None) -> RecordStorage:
    """Connect to the database of a record.

    Args:
        place: Where it is.
        create: Make the tables where they are missing.
        file: The SQLite file, where it does not have its final name yet.
    """
    storage = _postgres(place, create) if place.database is not None else _sqlite(place, create, file)
    storage.patience_s = PATIENCE_S
    return storage


def _sqlite(place: Place, create: bool, file: Path | None) -> RecordStorage:
    file = file or place.paths.database
    if create:
        # The journal mode is kept in the file; set before Optuna's first connection it holds for all of them.
        with sqlite3.connect(file) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
    elif not file.is_file():  # or opening it would make an empty one
        raise FileNotFoundError(f"{str(file)!r} is missing")
    # Written out by SQLAlchemy, which from 2.1 on reads back what it wrote, also where a folder is called "a?b".
    url = URL.create("sqlite", database=str(file)).render_as_string()
    storage = RecordStorage(url, {"connect_args": {"timeout": 30}}, create=create)
    # An acknowledged trial survives a power cut as well as a kill: every commit is flushed.
    event.listen(storage.engine, "connect", lambda link, _: link.execute("PRAGMA synchronous=FULL"))
    return storage


def _postgres(place: Place, create: bool) -> RecordStorage:
    database = place.database
    assert database is not None  # noqa: S101
    check_installed(place)
    # Secrets go past SQLAlchemy and Optuna, which keep and show URLs.
    options: dict[str, Any] = {"connect_timeout": 10, "application_name": "autoprune", **_AS_THEY_DIE}
    options["client_encoding"] = "utf8"  # a server made in the C locale would give bytes
    engine: dict[str, Any] = {"connect_args": {**options, **database.secrets}}
    # Readers come and go, and what one of them leaves open is one connection less for the others and the driver.
    engine |= {"pool_size": 3} if create else {"poolclass": NullPool}
    url = database.text.replace("postgresql:", "postgresql+psycopg:", 1)
    if not create:
        # Optuna would make some of the tables also for who only reads, against the driver that makes them all.
        with _connected(url, engine) as link:
            if not link.execute(text("SELECT to_regclass('alembic_version') IS NOT NULL")).scalar():
                raise NoStudiesError(
                    f"{str(place)!r} holds no studies of autoprune",
                    "see that it is the right database; `autoprune search --storage URL` makes a study there",
                )
        return RecordStorage(url, engine, create=False)
    with _making_tables(url, engine):
        return RecordStorage(url, engine, create=True)


@contextmanager
def _connected(url: str, options: dict[str, Any]) -> Iterator[Connection]:
    engine = create_engine(url, **options)
    try:
        with engine.connect() as link:
            yield link
    finally:
        engine.dispose()


@contextmanager
def _making_tables(url: str, options: dict[str, Any]) -> Iterator[None]:
    with _connected(url, options) as link:
        # Held until the connection closes. Readers see the tables of Optuna's schema last of all.
        link.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _MAKING_TABLES})
        link.execute(text(TABLE))
        link.commit()
        yield


def study_id_of(storage: RecordStorage, name: str) -> int | None:
    """Return the number of a study in the database; None if there is none of this name."""
    try:
        return int(storage.get_study_id_from_name(name))
    except KeyError:
        return None


def make_study(storage: RecordStorage, settings: dict[str, Any]) -> optuna.Study:
    """Return the study of these settings, made if there is none; whole only after :func:`complete_study`."""
    return optuna.create_study(
        study_name=settings["study"],
        storage=storage,
        directions=[_DIRECTIONS[name] for name in settings["objectives"]],
        load_if_exists=True,
    )


def complete_study(study: optuna.Study, settings: dict[str, Any], settings_text: str) -> None:
    """Write what a study has besides trials, as far as a run that was killed did not."""
    names = [METRIC_NAMES[name] for name in settings["objectives"]]
    if study.metric_names != names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(names)
    wanted = {SETTINGS_KEY: settings_text, SCHEMA_KEY: SCHEMA}
    kept = study.user_attrs
    for key, value in wanted.items():
        if key not in kept:
            study.set_user_attr(key, value)


def make_sqlite(place: Place, settings: dict[str, Any], settings_text: str) -> None:
    """Make the SQLite file of a study, with everything that a study has before its first trial, in one step."""
    paths = place.paths
    unfinished = paths.root / f".{paths.database.name}.unfinished"
    for leftover in paths.root.glob(f"{unfinished.name}*"):
        leftover.unlink()
    storage = open_storage(place, create=True, file=unfinished)
    try:
        complete_study(make_study(storage, settings), settings, settings_text)
        with storage.engine.connect() as link:
            link.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
    finally:
        storage.scoped_session.remove()
        storage.engine.dispose()
    flush(unfinished)
    unfinished.replace(paths.database)
    with suppress(OSError):
        flush(paths.root)


def load_study(storage: RecordStorage, place: Place) -> optuna.Study:
    """Return the study for reading, or writing where it is known to be there.

    Raises:
        StorageError: If the database does not hold it.
    """
    if place.database is None:
        names = optuna.get_all_study_names(storage)
        if len(names) != 1:
            raise StorageError(
                f"{str(place)!r} holds {len(names)} studies instead of one: {names}",
                "autoprune writes one study to a file: set this one aside with --fresh",
            )
        return optuna.load_study(study_name=names[0], storage=storage)
    study = optuna.load_study(study_name=place.paths.name, storage=storage)
    check_ours(study, place)
    return study


def check_ours(study: optuna.Study, place: Place) -> None:
    """Refuse a study that something else made under this name in the same database.

    Raises:
        StorageError: If it is one.
    """
    if SCHEMA_KEY not in study.user_attrs and study.get_trials(deepcopy=False):
        raise StorageError(
            f"study {place.paths.name!r} in {str(place)!r} was not made by autoprune",
            "use another --study NAME, or another database",
        )


def rename_study(storage: RecordStorage, study_id: int, name: str) -> None:
    """Give a study another name; its lease must be held."""

    def rename() -> None:
        with storage.scoped_session() as session, session.begin():
            session.execute(
                text("UPDATE studies SET study_name = :name WHERE study_id = :study"),
                {"name": name, "study": study_id},
            )

    storage.once(rename, lambda: None)


def study_names(place: Place) -> list[str]:
    """Return the names of autoprune's studies in the database of a place."""
    assert place.database is not None  # noqa: S101
    try:
        storage = open_storage(place, create=False)
    except NoStudiesError:
        return []
    try:
        found = storage.get_all_studies()
    finally:
        storage.engine.dispose()
    return sorted(study.study_name for study in found if SCHEMA_KEY in study.user_attrs)
