"""Artifact folders: whole or absent, and damage is named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from autoprune.errors import StorageError
from autoprune.naming import StudyPaths
from autoprune.study.artifacts import (
    artifact_folder,
    commit_folder,
    discard_unfinished,
    discard_unlisted,
    temporary_folder,
    usable,
    verify,
    write_bytes_atomic,
    write_text_atomic,
)
from autoprune.study.records import TrialRecord


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


def test_the_manifest_holds_the_hash_of_every_file_but_its_own(tmp_path: Path) -> None:
    folder = temporary_folder(tmp_path / "new" / "parent")
    assert folder.parent == tmp_path / "new" / "parent"
    (folder / "targets" / "torch").mkdir(parents=True)
    (folder / "targets" / "torch" / "model.pt2").write_bytes(b"graph")
    (folder / "model.onnx").write_bytes(b"weights")
    for name in "fbdeca":
        (folder / name).write_bytes(name.encode())
    (folder / "manifest.json").write_text("of before")
    place = folder.with_name("trial-00001")
    commit_folder(folder, place)
    text = (place / "manifest.json").read_text(encoding="utf-8")
    assert json.loads(text) == {
        "model.onnx": hashlib.sha256(b"weights").hexdigest(),
        "targets/torch/model.pt2": hashlib.sha256(b"graph").hexdigest(),
        **{name: hashlib.sha256(name.encode()).hexdigest() for name in "abcdef"},
    }
    # One line for each, by name: two manifests can be compared by eye.
    assert len(text.splitlines()) == 1 + 8 + 1
    assert list(json.loads(text)) == sorted(json.loads(text))
    # Made as a temporary folder, which its owner alone may read, and read by others once it is whole.
    assert place.stat().st_mode & 0o777 == 0o755
    verify(place)


def test_all_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []
    place = tmp_path / "trial-00001"
    really = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, place.exists()))
        really(descriptor)

    monkeypatch.setattr("autoprune.study.artifacts.os.fsync", fsync)
    folder = temporary_folder(tmp_path)
    (folder / "model.onnx").write_bytes(b"weights")
    commit_folder(folder, place)
    assert flushed == [
        ("model.onnx", False),
        ("manifest.json", False),
        (folder.name, False),
        (tmp_path.name, True),
    ]
    flushed.clear()
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    write_text_atomic(place / "file", "content")
    assert len(flushed) == 1 and flushed[0][0].startswith(".file.")
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_a_run_that_is_killed_while_it_replaces_a_folder_leaves_what_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = StudyPaths(tmp_path)
    place = make(paths.artifacts, "trial-00001", b"old")
    with monkeypatch.context() as patch:
        patch.setattr("autoprune.study.artifacts.shutil.rmtree", lambda *_, **__: None)
        make(paths.artifacts, "trial-00001", b"new")
    assert len(list(paths.artifacts.iterdir())) == 2
    discard_unfinished(paths)
    assert [folder.name for folder in paths.artifacts.iterdir()] == ["trial-00001"]
    assert (place / "model.onnx").read_bytes() == b"new"


def test_what_cannot_be_removed_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = StudyPaths(tmp_path)
    place = make(paths.artifacts, "trial-00001", b"old")
    (temporary_folder(paths.artifacts) / "file").write_text("")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "unlink", refuse)
    discard_unfinished(paths)
    discard_unlisted(paths, ())
    make(paths.artifacts, "trial-00001", b"new")
    assert (place / "model.onnx").read_bytes() == b"new"


def test_folders_that_cannot_be_made_or_read_are_told(tmp_path: Path) -> None:
    (tmp_path / "wall").write_text("")
    with pytest.raises(StorageError, match=r"wall/in' cannot be written: Not a directory"):
        temporary_folder(tmp_path / "wall" / "in")
    for content in ("", "[]", "\xff"):
        (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
        with pytest.raises(StorageError, match="is damaged: ") as caught:
            verify(tmp_path)
        assert "search it again" in caught.value.hint
    with pytest.raises(StorageError, match="is damaged: .*manifest"):
        verify(tmp_path / "gone")


def test_all_damaged_files_are_named_and_no_other(tmp_path: Path) -> None:
    folder = temporary_folder(tmp_path)
    for name in ("a", "b", "c"):
        (folder / name).write_text(name)
    commit_folder(folder, tmp_path / "whole")
    for name in ("a", "c"):
        (tmp_path / "whole" / name).write_text("other")
    with pytest.raises(StorageError, match="damaged: a, c differs from its manifest") as caught:
        verify(tmp_path / "whole")
    assert "search it again" in caught.value.hint


@pytest.mark.parametrize(
    ("values", "folder"),
    [
        ({"fidelity": "search"}, "trial-00007"),
        ({"fidelity": "search", "parent": 2, "round": 1}, "trial-00007"),
        ({"fidelity": "final", "parent": 2, "round": 1}, "trial-00002-final1"),
        ({"fidelity": "final", "parent": 2, "round": 2, "variant": "bits4"}, "trial-00002-final2-bits4"),
        ({"fidelity": "final"}, "trial-00007"),
    ],
)
def test_a_final_trial_s_artifact_is_named_after_its_parent(
    tmp_path: Path, values: dict[str, object], folder: str
) -> None:
    record = TrialRecord.model_validate({"number": 7, "state": "complete", **values})
    paths = StudyPaths(tmp_path)
    assert artifact_folder(paths, record) == paths.artifacts / folder
    there = paths.on_target("torch:cuda")
    assert artifact_folder(there, record) == paths.artifacts / folder / "targets" / "torch-cuda"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes_atomic(tmp_path / "file", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("autoprune.study.artifacts.os.fsync", full)
    with pytest.raises(StorageError, match="file' cannot be written: No space left on device") as caught:
        write_bytes_atomic(tmp_path / "file", b"new")
    assert "AUTOPRUNE_STUDIES" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_only_a_whole_folder_is_usable_and_a_damaged_one_is_kept_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert usable(tmp_path / "gone") is False
    place = make(tmp_path, "trial-00001")
    assert usable(place) is True
    assert place.is_dir() and not caplog.records
    (place / "model.onnx").write_bytes(b"weightz")
    assert usable(place) is False
    assert [path.name for path in tmp_path.iterdir()] == ["trial-00001.damaged-1"]
    assert "damaged: model.onnx differs from its manifest" in caplog.text


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "folder", "gone", "a\0b", "link", "n" * 120])
def test_a_manifest_names_files_in_its_own_folder_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_text("secret")
    place = make(tmp_path, "trial-00001")
    (place / "folder").mkdir()
    (place / "link").symlink_to(tmp_path / "outside")
    manifest = place / "manifest.json"
    manifest.write_text(json.dumps({name: hashlib.sha256(b"secret").hexdigest()}), encoding="utf-8")
    with pytest.raises(StorageError) as caught:
        verify(place)
    assert f"its manifest names {name[:100]!r}, which is no file in it" in caught.value.message
