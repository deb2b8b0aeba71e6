"""One driver at a time: the lock of a study's folder, and setting a study aside."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection
from contextlib import suppress

from autoprune.errors import StorageError
from autoprune.naming import StudyPaths


def take_lock(paths: StudyPaths) -> int:
    """Make the study's folder if need be and lock it; return the descriptor that holds the lock until it is closed.

    Raises:
        StorageError: If the folder cannot be written or another process runs the study.
    """
    while True:
        descriptor = _locked(paths)
        # The folder may have been moved aside after the file in it was opened: that lock is of another study by now.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), paths.lock.stat()):
                return descriptor
        os.close(descriptor)


def _locked(paths: StudyPaths) -> int:
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(paths.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(
            f"folder {str(paths.root)!r} cannot be written: {error.strerror or error}",
            "free space or choose a writable folder with AUTOPRUNE_STUDIES",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StorageError(
            f"study {paths.name!r} is being run by another process",
            "wait for it, stop it, or use another --study NAME",
        ) from error
    return descriptor


def free_name(paths: StudyPaths, taken: Collection[str] = ()) -> str:
    """Return ``<name>.1``, or with the next number under which there is no folder and which is not ``taken``."""
    number = 1
    while paths.root.with_name(name := f"{paths.name}.{number}").exists() or name in taken:
        number += 1
    return name


def move_aside(paths: StudyPaths, name: str) -> None:
    """Rename the study's folder."""
    try:
        paths.root.rename(paths.root.with_name(name))
    except OSError as error:
        raise StorageError(
            f"{str(paths.root)!r} cannot be moved aside: {error.strerror or error}",
            "see who may write its folder, or use another --study NAME",
        ) from error
