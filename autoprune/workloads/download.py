"""Downloads that fail at once, in one message, where there is no network."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
import threading
import urllib.request
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

from autoprune.errors import UsageError

Say = Callable[[str], None]

_TIMEOUT_S = 5.0
_READ_BYTES = 1 << 18


def fetch(
    url: str, destination: Path, *, purpose: str, offline: str, digest: tuple[str, str] = ("", ""), say: Say
) -> Path:
    """Download a file unless it is there; a half file never has the final name.

    Args:
        url: Where the file is.
        destination: Where it goes.
        purpose: What needs it, for messages.
        offline: What the user can do where there is no network.
        digest: Name of a hash and the beginning of its hex digest; empty for no check.
        say: Gets a line for every tenth of the file.

    Returns:
        The destination.

    Raises:
        UsageError: If the file cannot be downloaded or written, or is not the right one.
    """
    if destination.is_file():
        return destination
    say(f"downloading {destination.name} for {purpose}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".download-") as folder:
            part = Path(folder) / destination.name
            found = _stream(url, part, digest[0], say)
            if not found.startswith(digest[1]):
                raise OSError(f"{digest[0]} is {found[:16]}…, not {digest[1][:16]}…")
            part.replace(destination)
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UsageError(
            f"{purpose} needs the file {destination.name}, which is not at {str(destination)!r} "
            f"and cannot be downloaded from {url}: {reason}",
            offline,
        ) from error
    return destination


def _stream(url: str, part: Path, algorithm: str, say: Say) -> str:
    hasher = hashlib.new(algorithm, usedforsecurity=False) if algorithm else None
    with _open(url) as response, part.open("wb") as file:
        total = int(response.headers.get("Content-Length") or 0)
        done = tenth = 0
        while block := response.read(_READ_BYTES):
            file.write(block)
            if hasher is not None:
                hasher.update(block)
            done += len(block)
            if total and done * 10 // total > tenth:
                tenth = done * 10 // total
                say(f"downloading {part.name}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")
    if total and done != total:
        raise OSError(f"the connection ended after {done} of {total} bytes")
    return hasher.hexdigest() if hasher is not None else ""


def _open(url: str) -> Any:
    """Open a URL within the time limit; a name look-up that hangs counts, which a socket timeout leaves out."""
    result: list[Any] = []

    def attempt() -> None:
        try:
            # Addresses are constants of this package and of torchvision.
            request = urllib.request.Request(url, headers={"User-Agent": "autoprune"})  # noqa: S310
            result.append(urllib.request.urlopen(request, timeout=_TIMEOUT_S))  # noqa: S310
        except (OSError, HTTPException, ValueError) as error:
            result.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_TIMEOUT_S + 1.0)
    if not result:
        raise TimeoutError(f"no answer within {_TIMEOUT_S:.0f} s")
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the one folder of a tar archive to ``folder``, all or nothing.

    Raises:
        UsageError: If the archive is damaged, or the disk does not take it; names the file.
    """
    if folder.is_dir():
        return folder
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as temporary:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
            inner = Path(temporary) / folder.name
            if not inner.is_dir():
                raise OSError(f"it holds no folder {folder.name!r}")
            inner.replace(folder)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UsageError(
            f"archive {str(archive)!r} cannot be unpacked: {error}", "delete it and try again"
        ) from error
    return folder
