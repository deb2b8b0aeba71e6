"""Artifact folders: whole or absent, never half, and checked by content."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from autoprune.disk import file_digest, flush
from autoprune.errors import StorageError
from autoprune.naming import StudyPaths
from autoprune.study.integrity import set_aside
from autoprune.study.reading import read_json
from autoprune.study.records import TrialRecord

MANIFEST = "manifest.json"
_TEMPORARY = ".unfinished-"


def temporary_folder(parent: Path) -> Path:
    """Make an empty folder beside the final place, so that moving it there is one step.

    Raises:
        StorageError: If ``parent`` cannot be written.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=parent))
    except OSError as error:
        raise StorageError(
            f"folder {str(parent)!r} cannot be written: {error.strerror or error}",
            "free space or choose a writable folder (AUTOPRUNE_STUDIES), then run the same command again: it resumes",
        ) from error


def commit_folder(folder: Path, place: Path) -> None:
    """Move ``folder`` to ``place`` in one step, with a manifest of its files' hashes.

    Files and folders are flushed to disk first. A folder that is already at ``place`` is replaced.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    manifest = {str(path.relative_to(folder)): file_digest(path) for path in files if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    for path in [*files, folder / MANIFEST, folder]:
        flush(path)
    folder.chmod(0o755)
    if place.exists():
        aside = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=place.parent))
        place.replace(aside / place.name)
        folder.replace(place)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        folder.replace(place)
    flush(place.parent)


def artifact_folder(paths: StudyPaths, record: TrialRecord) -> Path:
    """Return the folder that holds a trial's artifact for the target that the paths name, if it was kept."""
    whole = paths.artifact(record.number)
    if record.fidelity == "final" and record.parent is not None:
        whole = paths.final_artifact(record.parent, record.round, record.variant)
    return paths.in_artifact(whole)


def verify(folder: Path) -> None:
    """Compare a committed folder with its manifest.

    Raises:
        StorageError: If a file is missing or differs; names it.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        damaged = [name for name, digest in manifest.items() if file_digest(_inside(folder, name)) != digest]
    except (OSError, ValueError, AttributeError) as error:
        raise StorageError(
            f"artifact {str(folder)!r} is damaged: {error}", "export or search it again"
        ) from error
    if damaged:
        raise StorageError(
            f"artifact {str(folder)!r} is damaged: {', '.join(damaged)} differs from its manifest",
            "export or search it again",
        )


def usable(folder: Path) -> bool:
    """Return whether a committed folder is there and sound; a damaged one is set aside, the log says why."""
    if not folder.is_dir():
        return False
    try:
        verify(folder)
    except StorageError as error:
        set_aside(folder, error.message)
        return False
    return True


def kept_numbers(paths: StudyPaths) -> set[int]:
    """Return the search trials whose artifacts are there."""
    names = (
        folder.name.removeprefix("trial-") for folder in paths.artifacts.glob("trial-*") if folder.is_dir()
    )
    return {int(name) for name in names if name.isascii() and name.isdigit()}


def discard_unlisted(paths: StudyPaths, keep: Collection[int]) -> None:
    """Remove the artifacts of trials that are not in ``keep``; final artifacts stay."""
    for number in kept_numbers(paths) - set(keep):
        shutil.rmtree(paths.artifact(number), ignore_errors=True)


def discard_unfinished(paths: StudyPaths) -> None:
    """Remove what killed runs left half written."""
    for folder in paths.artifacts.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text as UTF-8; see :func:`write_bytes_atomic`."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half.

    Raises:
        StorageError: If the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        flush(temporary)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise StorageError(
            f"{str(path)!r} cannot be written: {error.strerror or error}",
            "free space or choose a writable folder (AUTOPRUNE_STUDIES)",
        ) from error


def _inside(folder: Path, name: str) -> Path:
    """Return the file that a manifest names, which has to be a regular one in the very folder."""
    place = folder / name
    if "\0" in name or not place.resolve().is_relative_to(folder.resolve()) or not place.is_file():
        raise ValueError(f"its manifest names {name[:100]!r}, which is no file in it")
    return place
