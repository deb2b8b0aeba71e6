"""A folder on shared storage by its URL: files put whole, read, listed and removed, with retries.

Object stores have no rename, but a single object is replaced in one step; on a mounted folder a file is written beside
its place and renamed. So every file is there whole or not at all, whatever the storage.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from autoprune.disk import flush
from autoprune.errors import StorageError, UsageError
from autoprune.naming import inner_parts, unknown_name
from autoprune.storage_url import without_passwords

T = TypeVar("T")

ALLOWED = "s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, abfs://CONTAINER/FOLDER, file:///FOLDER or a folder"
# The line that installs what a protocol needs; protocols without one are part of fsspec.
_DRIVERS = {
    "s3": "pip install 'autoprune[s3]'",
    "gs": "pip install 'autoprune[gcs]'",
    "gcs": "pip install 'autoprune[gcs]'",
    "abfs": "pip install adlfs",
}
PROTOCOLS = ("file", "memory", *_DRIVERS)
_LOCAL = "file"
_ATTEMPTS = 4
_FIRST_WAIT_S = 0.5
# What no waiting mends.
_FINAL = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError, ImportError)
_FINAL_NUMBERS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG)
_FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "NoAuthError")
_QUERY = re.compile(r"\?[^\s'\"]+")
_HINT = (
    "check the network, the bucket or folder, its free space and the credentials; "
    "what was stored before is kept, and the same command goes on"
)
_log = logging.getLogger(__name__)


def redacted(text: str) -> str:
    """Return a text without the passwords and query strings of the URLs in it."""
    return _QUERY.sub("?***", without_passwords(text))


def check_url(url: str) -> str:
    """Return the URL of a folder on shared storage; a plain path becomes absolute, so that it means one place.

    Raises:
        UsageError: If the form is unknown, or it holds ``..``, a password, a query or nothing but a protocol.
    """
    shown = redacted(url)[:200]

    def fault(why: str, hint: str = "") -> UsageError:
        return UsageError(f"artifacts URL {shown!r} cannot be used: {why}; allowed: {ALLOWED}", hint)

    if not url.strip() or not url.isprintable() or url != url.strip():
        raise fault("it is empty or holds blanks at its ends or control characters")
    protocol, separator, rest = url.partition("://")
    if not separator:
        protocol, rest = _LOCAL, str(Path(url).expanduser().absolute())
    if "::" in url:
        raise fault("chained URLs are not taken")
    if protocol not in PROTOCOLS:
        raise unknown_name("kind of artifacts URL", protocol, PROTOCOLS, f"allowed: {ALLOWED}")
    if separator and re.search(r":.*@", rest):
        raise fault(
            "it holds a password",
            "give credentials by the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or by the role of the machine",
        )
    if separator and ("?" in rest or "#" in rest):
        raise fault("it holds a query or a fragment")
    if ".." in (url if not separator else rest).split("/") or "\\" in rest:
        raise fault("it holds '..' or a backslash")
    if protocol == _LOCAL and not rest.startswith("/"):
        raise fault("file:// takes an absolute folder", f"did you mean file:///{rest}?")
    path = re.sub(r"/+", "/", rest).rstrip("/")
    if not path.strip("/"):
        raise fault("it names no bucket or folder")
    return f"{protocol}://{path}"


@dataclass(frozen=True)
class Remote:
    """One folder on shared storage; nothing outside of it is read, written or removed.

    Attributes:
        base: URL as :func:`check_url` gives it.
        folder: Name of the folder in it.
        sleep: Waits between attempts; injected for tests.
    """

    base: str
    folder: str
    sleep: Callable[[float], None] = time.sleep

    @property
    def shown(self) -> str:
        """The folder's URL for messages."""
        return f"{redacted(self.base)}/{self.folder}"

    # -- files -------------------------------------------------------------------------------

    def put_file(self, source: Path, name: str) -> None:
        """Store a file under ``name``, a path with ``/`` inside of the folder; it is there whole or not at all."""

        def put(files: Any, path: str) -> None:
            if self._is_local:
                _put_local(source, Path(path))
            else:
                files.put_file(str(source), path)

        try:
            size = source.stat().st_size
            for _ in range(2):
                self._tried("write", name, put)
                stored = self.size(name)
                if stored == size:
                    return
        except FileNotFoundError as error:
            raise StorageError(f"{str(source)!r} cannot be stored in {self.shown}: {error}") from error
        raise StorageError(f"{stored} of {size} bytes of {name!r} were stored in {self.shown}", _HINT)

    def put_bytes(self, content: bytes, name: str) -> None:
        """Store bytes under ``name``; a reader gets the old ones or these."""

        def put(files: Any, path: str) -> None:
            if self._is_local:
                _put_local(content, Path(path))
            else:
                files.pipe_file(path, content)

        self._tried("write", name, put)

    def get_bytes(self, name: str) -> bytes | None:
        """Return the bytes under ``name``; None where there are none."""
        with suppress(FileNotFoundError):
            return self._tried("read", name, lambda files, path: bytes(files.cat_file(path)))
        return None

    def get_file(self, name: str, place: Path) -> bool:
        """Copy the file under ``name`` to ``place``; return whether there was one."""
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            self._tried("read", name, lambda files, path: files.get_file(path, str(place)))
            return True
        return False

    def size(self, name: str) -> int | None:
        """Return the bytes of the file under ``name``; None where there is none."""
        with suppress(FileNotFoundError):
            return self._tried("read", name, lambda files, path: int(files.info(path)["size"]))
        return None

    def names(self, name: str) -> list[str]:
        """Return the names of the files directly in the folder ``name``, sorted; none where it does not exist."""
        with suppress(FileNotFoundError):
            entries = self._tried("list", name, lambda files, path: files.ls(path, detail=True))
            found = (str(e["name"]).rpartition("/")[2] for e in entries if e["type"] == "file")
            return sorted(each for each in found if each)
        return []

    def remove(self, name: str, *, folder: bool = False) -> None:
        """Remove a file, or a folder with all that is in it; one that is not there is none to remove."""
        with suppress(FileNotFoundError):
            self._tried("remove", name, lambda files, path: files.rm(path, recursive=folder))

    # -- how ---------------------------------------------------------------------------------

    @property
    def _is_local(self) -> bool:
        return self.base.startswith(f"{_LOCAL}://")

    def _path(self, name: str) -> str:
        path = "/".join((self.base.partition("://")[2], self.folder, *inner_parts(name)))
        if self._is_local:
            # A link inside of the folder could lead anywhere.
            root = Path(self.base.partition("://")[2]).resolve() / self.folder
            if not Path(path).resolve().is_relative_to(root):
                raise StorageError(
                    f"{path!r} is refused: it leads out of {str(root)!r}",
                    "remove the link that is in its way",
                )
        return path

    def _files(self) -> Any:
        # Imported here: few studies have a mirror. fsspec keeps its objects, for each process.
        import fsspec

        protocol = self.base.partition("://")[0]
        try:
            # What other nodes write has to be seen, so listings are not kept.
            files = fsspec.filesystem(protocol, use_listings_cache=False)
        except ImportError as error:
            raise UsageError(
                f"artifacts URL {redacted(self.base)!r} needs a driver for {protocol}://: {error}",
                _DRIVERS.get(protocol, ""),
            ) from error
        files.invalidate_cache()
        return files

    def _tried(self, verb: str, name: str, action: Callable[[Any, str], T]) -> T:
        """Do something, again after a while where that may help.

        Raises:
            FileNotFoundError: If there is no such file; what that means the caller knows.
            StorageError: If it does not succeed.
        """
        path = self._path(name)
        for attempt in range(_ATTEMPTS):
            try:
                return action(self._files(), path)
            except (FileNotFoundError, UsageError):
                raise
            except Exception as error:  # drivers raise what their own libraries raise
                cause = redacted((str(error).strip().splitlines() or [""])[0][:300])
                if _is_final(error) or attempt == _ATTEMPTS - 1:
                    tries = f" after {attempt + 1} attempts" if attempt else ""
                    raise StorageError(
                        f"cannot {verb} {name!r} in {self.shown}{tries}: {type(error).__name__}: {cause}",
                        _HINT,
                    ) from error
                wait_s = _FIRST_WAIT_S * 2**attempt * (0.5 + random.random())  # noqa: S311 - not for secrets
                _log.warning("cannot %s %r in %s, trying again: %s", verb, name, self.shown, cause)
                self.sleep(wait_s)
        raise AssertionError


def _is_final(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in _FINAL_NUMBERS:
        return True
    return isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES


def _put_local(source: Path | bytes, place: Path) -> None:
    """Write a file beside its place, flush it, and rename it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    # Several nodes may write one name on a shared file system, where process numbers repeat.
    temporary = place.with_name(f".{uuid.uuid4().hex}.unfinished")
    try:
        with temporary.open("wb") as file:
            if isinstance(source, bytes):
                file.write(source)
            else:
                with source.open("rb") as content:
                    shutil.copyfileobj(content, file, 1 << 20)
        flush(temporary)
        temporary.replace(place)
        flush(place.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
