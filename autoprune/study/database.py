"""The database of a study: Optuna's tables in one SQLite file in WAL mode."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import optuna
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from autoprune.errors import AutopruneError, StorageError
from autoprune.naming import StudyPaths

SCHEMA = 1
_DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {
    "accuracy": "maximize",
    "latency": "minimize",
    "size": "minimize",
}
_FAULTS = (SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError, OSError)
METRIC_NAMES = {"accuracy": "accuracy", "latency": "latency_ratio", "size": "size_ratio"}


@contextmanager
def storage_faults(paths: StudyPaths) -> Iterator[None]:
    """Turn faults of the database and the disk into a ``StorageError`` that says what to do."""
    try:
        yield
    except _FAULTS as error:
        cause = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise StorageError(
            f"the record of study {paths.name!r} ({str(paths.database)!r}) cannot be used: {cause}",
            "free space or mend the file's permissions and run the same command again; finished trials are kept. "
            "A damaged file can be set aside with --fresh",
        ) from error


@contextmanager
def read_faults(paths: StudyPaths) -> Iterator[None]:
    """Turn whatever a damaged or hostile record makes Optuna raise into a ``StorageError``; for reading alone."""
    with storage_faults(paths):
        try:
            yield
        except (AutopruneError, *_FAULTS):
            raise
        except Exception as error:  # Optuna decodes cells with many readers, which trust what they find
            first = (str(error).strip().splitlines() or [""])[0]
            raise StorageError(
                f"the record of study {paths.name!r} ({str(paths.database)!r}) is damaged: "
                f"{type(error).__name__}: {first:.300}",
                "restore the file, or set the study aside with --fresh",
            ) from error


def open_database(paths: StudyPaths, settings: dict[str, Any], *, create: bool) -> optuna.Study:
    """Open the study's database.

    Args:
        paths: The study's paths.
        settings: The study's settings; its name and objectives are taken from them.
        create: Make the tables and the study where they are missing.
    """
    if create:
        # The journal mode is kept in the file; set before Optuna's first connection it holds for all of them.
        with sqlite3.connect(paths.database) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{paths.database}",
            engine_kwargs={"connect_args": {"timeout": 30}},
            skip_table_creation=not create,
        )
        # An acknowledged trial survives a power cut as well as a kill: every commit is flushed.
        event.listen(storage.engine, "connect", lambda link, _: link.execute("PRAGMA synchronous=FULL"))
        if not create:
            return optuna.load_study(study_name=_only_study(storage, paths), storage=storage)
        study = optuna.create_study(
            study_name=settings["study"],
            storage=storage,
            directions=[_DIRECTIONS[name] for name in settings["objectives"]],
            load_if_exists=True,
        )
        study.set_metric_names([METRIC_NAMES[name] for name in settings["objectives"]])
        study.set_user_attr("autoprune_schema", SCHEMA)
        return study


def _only_study(storage: optuna.storages.RDBStorage, paths: StudyPaths) -> str:
    names = optuna.get_all_study_names(storage)
    if len(names) != 1:
        raise StorageError(f"{str(paths.database)!r} holds {len(names)} studies instead of one: {names}")
    return names[0]
