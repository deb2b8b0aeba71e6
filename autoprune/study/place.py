"""Where the record of a study is: in its folder, or in a database that a small file in the folder names."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass

from autoprune.errors import StorageError, UsageError
from autoprune.naming import StudyPaths
from autoprune.storage_url import (
    VARIABLE,
    DatabaseUrl,
    check_storage,
    given_storage,
    is_sqlite,
    parse_database_url,
)
from autoprune.study.artifacts import write_text_atomic


@dataclass(frozen=True)
class Place:
    """Where a record is.

    Attributes:
        paths: The study's paths.
        database: Its PostgreSQL database; None for the SQLite file in the study's folder.
    """

    paths: StudyPaths
    database: DatabaseUrl | None = None

    def __str__(self) -> str:
        return str(self.paths.database) if self.database is None else self.database.text

    @classmethod
    def of(cls, paths: StudyPaths, storage: str | None = None) -> Place:
        """Return where the record of a study is read.

        What the folder holds or names counts, unless ``storage`` says otherwise. ``AUTOPRUNE_STORAGE`` is for studies
        without a folder here, and moves a study that has its record in a database to another address of it.

        Args:
            paths: The study's paths.
            storage: What was given for this study alone; None for nothing.

        Raises:
            UsageError: If the storage cannot be used.
            StorageError: If the file that names the database is damaged.
        """
        named = _named(paths)
        if storage is None and named is None and paths.database.is_file():
            return cls(paths)
        storage = check_storage(given_storage(storage), str(paths.database))
        if storage is None or (is_sqlite(storage) and named is not None):
            return cls(paths, named)
        return cls(paths, None if is_sqlite(storage) else parse_database_url(storage))

    @classmethod
    def for_writing(cls, paths: StudyPaths, storage: str | None = None) -> Place:
        """Return where a study is recorded that is run now; the same as before where it was run before.

        Raises:
            UsageError: If its record is somewhere else already, or the storage cannot be used.
        """
        place, named = cls.of(paths, storage), _named(paths)
        before = (
            named.text if named is not None else str(paths.database) if paths.database.is_file() else None
        )
        # The environment is for all studies of a user, and may name another way to the database of this one.
        if storage is not None and before not in (None, str(place)):
            raise UsageError(
                f"study {paths.name!r} has its record in {before}, not in {place}",
                f"leave --storage out, use another --study NAME, or --fresh to start over; {VARIABLE} gives the "
                "database of a study another address",
            )
        return place

    def remember(self) -> None:
        """Write into the folder where the record is, without passwords."""
        if self.database is not None:
            write_text_atomic(self.paths.storage, json.dumps({"storage": self.database.text}) + "\n")


def _named(paths: StudyPaths) -> DatabaseUrl | None:
    """Return the database that the folder names; None if it names none."""
    try:
        text = paths.storage.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise StorageError(f"{str(paths.storage)!r} cannot be read: {error}", "give --storage URL") from error
    try:
        return parse_database_url(str(json.loads(text)["storage"]))
    except (ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
        raise StorageError(
            f"{str(paths.storage)!r} is damaged: it does not say where the record is", "give --storage URL"
        ) from error


def check_installed(place: Place) -> None:
    """Refuse a database whose client is missing.

    Raises:
        UsageError: With the line that installs it.
    """
    if place.database is not None and importlib.util.find_spec("psycopg") is None:
        raise UsageError(
            "studies in PostgreSQL need psycopg, which is not installed", "pip install 'autoprune[postgres]'"
        )
