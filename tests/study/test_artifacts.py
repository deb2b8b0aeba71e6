"""Artifact folders: whole or absent, and damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoprune.errors import StorageError
from autoprune.naming import StudyPaths
from autoprune.study.artifacts import (
    commit_folder,
    discard_unfinished,
    discard_unlisted,
    temporary_folder,
    verify,
    write_text_atomic,
)


def make(parent: Path, name: str, content: bytes = b"weights") -> Path:
    folder = temporary_folder(parent)
    (folder / "model.onnx").write_bytes(content)
    commit_folder(folder, parent / name)
    return parent / name


def test_a_committed_folder_is_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    place = make(tmp_path, "trial-00001", b"old")
    make(tmp_path, "trial-00001", b"new")
    verify(place)
    assert (place / "model.onnx").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trial-00001"]


@pytest.mark.parametrize("damage", [b"weightz", b"wei", b""])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes) -> None:
    place = make(tmp_path, "trial-00001")
    (place / "model.onnx").write_bytes(damage)
    with pytest.raises(StorageError, match=r"model\.onnx"):
        verify(place)


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    place = make(tmp_path, "trial-00001")
    (place / "model.onnx").unlink()
    with pytest.raises(StorageError, match="damaged"):
        verify(place)


def test_only_listed_trials_and_final_folders_stay(tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path / "study")
    for name in ("trial-00001", "trial-00002", "trial-00002-final1", "trial-00001-recovered1"):
        make(paths.artifacts, name)
    unfinished = temporary_folder(paths.artifacts)
    discard_unlisted(paths, {2})
    discard_unfinished(paths)
    left = sorted(p.name for p in paths.artifacts.iterdir())
    assert left == ["trial-00001-recovered1", "trial-00002", "trial-00002-final1"]
    assert not unfinished.exists()


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "a" / "file", "content")
    assert (tmp_path / "a" / "file").read_text() == "content"
    (tmp_path / "wall").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_text_atomic(tmp_path / "wall" / "file", "content")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["file"]
