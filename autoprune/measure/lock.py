"""The lock of the whole machine, which whoever measures holds."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, Any

from autoprune.errors import UsageError
from autoprune.naming import locks_root

_NAME = "autoprune-measure.lock"


def lock_machine(path: str | None = None) -> IO[Any]:
    """Wait until no other measurement runs, of whatever user or job; held until the file returned is closed.

    Args:
        path: The lock's file; the machine's if not given.
    """
    file = open_lock(Path(path) if path else locks_root() / _NAME)
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def is_locked(path: str | None = None) -> bool:
    """Return whether another measurement runs now."""
    with open_lock(Path(path) if path else locks_root() / _NAME) as file:
        return not take(file, fcntl.LOCK_EX)


def take(file: IO[Any], how: int) -> bool:
    """Take a lock, ``LOCK_SH`` or ``LOCK_EX``, if that can be had at once, and return whether it was."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_lock(path: Path) -> IO[Any]:
    """Open a file to lock, which all users can.

    A lock needs no right to write, so that the first user's file serves all. A link is never followed.

    Raises:
        UsageError: If it cannot be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
            os.fchmod(descriptor, 0o644)  # whatever the umask is
        except FileExistsError:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise UsageError(
            f"the lock {path} cannot be opened: {error.strerror}",
            "remove it, or name a folder for locks that all jobs of this machine can write to with AUTOPRUNE_LOCKS",
        ) from error
    return os.fdopen(descriptor)
