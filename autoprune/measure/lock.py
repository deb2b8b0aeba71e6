"""The lock of the whole machine, which whoever measures holds."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO, Any

_NAME = "autoprune-measure.lock"


def lock_machine(path: str | None = None) -> IO[Any]:
    """Wait until no other measurement runs, of whatever user or job; held until the file returned is closed.

    Args:
        path: The lock's file; the machine's if not given.
    """
    file = _open(path)
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def is_locked(path: str | None = None) -> bool:
    """Return whether another measurement runs now."""
    with _open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _open(path: str | None) -> IO[Any]:
    # Not the TMPDIR of a job. A lock needs no right to write, so that the first user's file serves all.
    shared = Path("/tmp")  # noqa: S108
    place = Path(path) if path else (shared if shared.is_dir() else Path(tempfile.gettempdir())) / _NAME
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        os.fchmod(descriptor, 0o644)  # whatever the umask is
    except FileExistsError:
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW)
    return os.fdopen(descriptor)
