"""A study's artifacts and small files on shared storage, so that its driver and workers may run on any node.

Layout under ``URL/STUDY/``; what is written last makes the rest count::

    artifacts/NAME.json                 the manifest: a folder without one does not exist
    artifacts/NAME/VERSION/…            its files; VERSION is the manifest's own hash, so that two nodes that push
                                        under one name never mix, and a replaced folder is old or new
    files/NAME.json                     hash of a small file's content
    content/HASH/NAME                   the content, to be looked at with any browser of the storage

The record itself is not here: with the database on PostgreSQL, :meth:`Mirror.restore` brings the rest to a new node.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from autoprune.disk import file_digest
from autoprune.errors import StorageError, UsageError
from autoprune.naming import StudyPaths, check_entry_name, check_study_name, inner_parts
from autoprune.study.artifacts import MANIFEST, commit_folder, temporary_folder, verify, write_bytes_atomic
from autoprune.study.remote import Remote, check_url

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SMALL_BYTES = 256_000_000
_RECORD = re.compile(r"study\.db.*|driver\.lock")
# Twice, because a folder that is replaced while it is read looks damaged once.
_READINGS = 2


@dataclass(frozen=True)
class Mirror:
    """What one study keeps on shared storage.

    Attributes:
        url: ``s3://…``, ``gs://…``, ``abfs://…``, ``file:///…`` or a folder that all nodes see.
        study: Name of the study.
        sleep: Waits between attempts; injected for tests.

    Raises:
        UsageError: If the URL or the name cannot be used.
    """

    url: str
    study: str
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        """Check what was given, before any work is done."""
        object.__setattr__(self, "url", check_url(self.url))
        check_study_name(self.study)

    @cached_property
    def _remote(self) -> Remote:
        return Remote(self.url, self.study, self.sleep)

    def check(self) -> None:
        """Write, read and remove a few bytes, so that a fault is named before the hours are spent.

        Raises:
            UsageError: If the driver of the storage is not installed.
            StorageError: If the storage cannot be written or does not give back what was written.
        """
        name, content = f"files/probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
        self._remote.put_bytes(content, name)
        found = self._remote.get_bytes(name)
        self._remote.remove(name)
        if found != content:
            raise StorageError(
                f"{self._remote.shown} does not give back what was written to it",
                "use another folder for --artifacts",
            )

    # -- artifacts ---------------------------------------------------------------------------

    def push(self, folder: Path, name: str) -> None:
        """Upload a committed folder; under its name it is whole or absent.

        Args:
            folder: A folder that :func:`autoprune.study.artifacts.commit_folder` committed.
            name: Its name in the mirror; one that is there already is replaced.

        Raises:
            StorageError: If the folder is damaged or the storage does not take it.
        """
        check_entry_name("artifact", name)
        try:
            text = (folder / MANIFEST).read_bytes()
        except OSError as error:
            raise StorageError(
                f"{str(folder)!r} is no committed folder: {error}", "search it again"
            ) from error
        manifest = _parsed(text, str(folder))
        verify(folder)
        before = self._remote.get_bytes(f"artifacts/{name}.json")
        if before == text and self._is_whole(f"artifacts/{name}/{_version(text)}", manifest):
            return
        for inner in manifest:
            self._remote.put_file(folder / inner, f"artifacts/{name}/{_version(text)}/{inner}")
        self._remote.put_bytes(text, f"artifacts/{name}.json")
        if before is not None and before != text:
            # Only what the manifest named: another node may be uploading a version of its own.
            self._remote.remove(f"artifacts/{name}/{_version(before)}", folder=True)

    def pull(self, name: str, place: Path) -> None:
        """Download a folder to ``place``: checked by content, and there whole or not at all.

        Raises:
            StorageError: If the mirror lacks it, a file of it is damaged, or it cannot be read or written.
        """
        check_entry_name("artifact", name)
        faults: list[str] = []
        for _ in range(_READINGS):
            text = self._remote.get_bytes(f"artifacts/{name}.json")
            if text is None:
                raise StorageError(
                    f"{self._remote.shown} has no artifact {name!r}", "search it again, or check --artifacts"
                )
            manifest = _parsed(text, f"{self._remote.shown}/artifacts/{name}.json")
            if _is_at(place, manifest):
                return
            folder = temporary_folder(place.parent)
            try:
                faults = self._download(f"artifacts/{name}/{_version(text)}", manifest, folder)
                if not faults:
                    _commit(folder, place, manifest)
                    return
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        raise StorageError(
            f"artifact {name!r} in {self._remote.shown} is damaged: {', '.join(faults)} differs from its manifest",
            f"remove artifacts/{name}.json there and run the same command again: the search goes on without it",
        )

    def has(self, name: str) -> bool:
        """Return whether there is a whole folder of this name."""
        return self._remote.size(f"artifacts/{check_entry_name('artifact', name)}.json") is not None

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of all whole folders that begin with ``prefix``, sorted."""
        return [name for name in self._listed("artifacts") if name.startswith(prefix)]

    def remove(self, name: str) -> None:
        """Remove a folder: its manifest first, so that nobody sees half of it."""
        check_entry_name("artifact", name)
        self._remote.remove(f"artifacts/{name}.json")
        self._remote.remove(f"artifacts/{name}", folder=True)

    def ensure(self, paths: StudyPaths, name: str) -> Path:
        """Return the artifact's folder in the study's folder here, downloaded if this node lacks it."""
        place = paths.artifacts / check_entry_name("artifact", name)
        if not (place / MANIFEST).is_file():
            self.pull(name, place)
        return place

    def _is_whole(self, source: str, manifest: dict[str, str]) -> bool:
        """Return whether the files there have the content that their manifest says; else a push mends them."""
        with tempfile.TemporaryDirectory(prefix="autoprune-") as folder:
            return not self._download(source, manifest, Path(folder))

    def _download(self, source: str, manifest: dict[str, str], folder: Path) -> list[str]:
        """Download into ``folder``; return the names of what is missing or differs."""
        faults = []
        for inner, digest in manifest.items():
            place = folder.joinpath(*inner_parts(inner))
            try:
                if not self._remote.get_file(f"{source}/{inner}", place) or file_digest(place) != digest:
                    faults.append(inner)
            except OSError as error:
                raise StorageError(
                    f"{str(place)!r} cannot be written: {error}", "free space, then run again"
                ) from error
        return faults

    # -- small files -------------------------------------------------------------------------

    def push_file(self, path: Path, name: str = "") -> None:
        """Store a small file of the study's folder; readers see the old one or this one, never half.

        Args:
            path: The file.
            name: Its name in the study's folder; the file's own if not given.
        """
        name = _check_small(name or path.name)
        try:
            content = path.read_bytes() if path.stat().st_size <= _SMALL_BYTES else None
        except OSError as error:
            raise StorageError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
        if content is None:
            raise UsageError(f"{str(path)!r} is above {_SMALL_BYTES:,} bytes, the most for a small file")
        digest, before = hashlib.sha256(content).hexdigest(), self._pointer(name)
        if before == digest and self._remote.get_bytes(f"content/{digest}/{name}") == content:
            return
        self._remote.put_bytes(content, f"content/{digest}/{name}")
        pointer = json.dumps({"sha256": digest, "bytes": len(content)})
        self._remote.put_bytes(pointer.encode(), f"files/{name}.json")
        if before is not None and before != digest:
            self._remote.remove(f"content/{before}/{name}")

    def push_files(self, paths: StudyPaths) -> list[str]:
        """Store every small file that the study's folder holds; return their names."""
        found = [p for p in sorted(paths.root.glob("[A-Za-z0-9]*")) if p.is_file() and not p.is_symlink()]
        small = [path for path in found if not _RECORD.fullmatch(path.name)]
        for path in small:
            self.push_file(path)
        return [path.name for path in small]

    def pull_file(self, name: str, place: Path) -> bool:
        """Bring a small file to ``place``; return whether there is one.

        Raises:
            StorageError: If its content is not what was stored; nothing is written then.
        """
        _check_small(name)
        for _ in range(_READINGS):
            digest = self._pointer(name)
            if digest is None:
                return False
            content = self._remote.get_bytes(f"content/{digest}/{name}")
            if content is not None and hashlib.sha256(content).hexdigest() == digest:
                write_bytes_atomic(place, content)
                return True
        raise StorageError(
            f"file {name!r} in {self._remote.shown} is damaged: its content is not what was stored",
            "push it again from a node that has the study's folder",
        )

    def files(self) -> list[str]:
        """Return the names of all small files, sorted."""
        return [name for name in self._listed("files") if not _RECORD.fullmatch(name)]

    def restore(self, paths: StudyPaths) -> list[str]:
        """Bring the study's small files to a node that lacks its folder; artifacts follow when they are asked for.

        Settings come last: a folder without them is none of a study, so that an interrupted restore begins anew.

        Returns:
            Names of the artifacts that :meth:`ensure` can bring.
        """
        if not paths.settings.exists():
            for name in sorted(self.files(), key=lambda name: name == paths.settings.name):
                self.pull_file(name, paths.root / name)
        return self.names("trial-")

    def _pointer(self, name: str) -> str | None:
        text = self._remote.get_bytes(f"files/{name}.json")
        if text is None:
            return None
        try:
            digest = json.loads(text)["sha256"]
        except (ValueError, KeyError, TypeError):
            digest = None
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise StorageError(
                f"file {name!r} in {self._remote.shown} is damaged: its hash cannot be read",
                "push it again from a node that has the study's folder",
            )
        return digest

    def _listed(self, folder: str) -> list[str]:
        """Return the names whose ``.json`` lies in ``folder``; foreign names are none of ours."""
        found = []
        for entry in self._remote.names(folder):
            name = entry.removesuffix(".json")
            try:
                if name != entry:
                    found.append(check_entry_name("stored", name))
            except UsageError:
                continue
        return found


def _check_small(name: str) -> str:
    if _RECORD.fullmatch(name):
        raise UsageError(
            f"{name!r} is the study's record and is not mirrored",
            "keep the record on PostgreSQL: --storage postgresql://…",
        )
    return check_entry_name("file", name)


def _version(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()[:32]


def _parsed(text: bytes, where: str) -> dict[str, str]:
    """Return a manifest's hashes by name.

    Raises:
        StorageError: If it is no manifest, or names a file outside of its folder.
    """
    try:
        manifest = json.loads(text)
        sound = isinstance(manifest, dict) and all(
            isinstance(digest, str) and _SHA256.fullmatch(digest) and inner_parts(name)
            for name, digest in manifest.items()
        )
    except (ValueError, RecursionError, UsageError) as error:
        raise StorageError(f"the manifest of {where} is damaged: {error}", "search it again") from error
    if not sound:
        raise StorageError(
            f"the manifest of {where} is damaged: it does not hold hashes by name", "search it again"
        )
    return {str(name): str(digest) for name, digest in manifest.items() if name != MANIFEST}


def _is_at(place: Path, manifest: dict[str, str]) -> bool:
    """Return whether the folder is at ``place`` already, undamaged."""
    try:
        there = _parsed((place / MANIFEST).read_bytes(), str(place))
        verify(place)
    except (OSError, StorageError):
        return False
    return there == manifest


def _commit(folder: Path, place: Path, manifest: dict[str, str]) -> None:
    try:
        commit_folder(folder, place)
    except OSError as error:
        # Another process of this node brought the same folder in the meantime.
        if not _is_at(place, manifest):
            raise StorageError(f"{str(place)!r} cannot be written: {error.strerror or error}") from error
