"""Reading of the small files beside a study or in an artifact, whoever wrote them: bounded, regular files alone."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

LARGEST = 64 * 2**20


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file of at most 64 MiB.

    Raises:
        OSError: If there is none, or it is a device, a pipe or larger: reading those may never end.
    """
    # Without O_NONBLOCK a pipe that nobody writes to would be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{str(path)!r} is not a regular file")
        if status.st_size > LARGEST:
            raise OSError(f"{str(path)!r} has {status.st_size:,} bytes; allowed: up to {LARGEST:,}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(LARGEST)
    finally:  # os.fdopen itself leaves a folder's open
        os.close(descriptor)


def read_text(path: Path) -> str:
    """Return such a file as text.

    Raises:
        OSError: As :func:`read_bytes`.
        UnicodeDecodeError: If it is not UTF-8.
    """
    return read_bytes(path).decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """Return what a text of JSON holds.

    Raises:
        ValueError: If it is none, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path: Path) -> Any:
    """Return what a file of JSON holds.

    Raises:
        OSError: As :func:`read_bytes`.
        ValueError: If it is no JSON.
    """
    return parse_json(read_text(path))
