"""What the record says where it cannot be used, to the letter: what was wrong, and what to do next."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import fsspec
import pytest

from autoprune.errors import AutopruneError
from autoprune.naming import StudyPaths
from autoprune.study.integrity import check_database, heal_database
from autoprune.study.locking import move_aside, take_lock
from autoprune.study.mirror import Mirror
from autoprune.study.opening import open_for_reading
from autoprune.study.place import Place, check_installed
from autoprune.study.remote import Remote, check_url
from autoprune.study.settings import check_same, read_settings, settings_in_database
from autoprune.study.store import StudyStore
from tests.study.made import add, open_for_writing

DATABASE = "postgresql://user@host/base"


def said(action: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(AutopruneError) as caught:
        action()
    return caught.value.message, caught.value.hint


@pytest.fixture
def paths() -> StudyPaths:
    """A study of one trial, and of one that is still to come."""
    store = open_for_writing("kept")
    add(store, 0.5)
    store.release()
    return store.paths


def execute(paths: StudyPaths, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(paths.database)) as link, link:
        link.execute(statement, values)


def test_studies_that_are_not_there(paths: StudyPaths) -> None:
    assert said(lambda: StudyStore.open("cept")) == (
        "unknown study 'cept'; did you mean 'kept'?\nknown: kept",
        "`autoprune studies` lists the studies here",
    )
    assert said(lambda: StudyStore.open("kept").record(7)) == (
        "study 'kept' has no trial 7; it has 0 to 0",
        "`autoprune front kept` lists the front",
    )


def test_folders_that_cannot_be_made_or_moved(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    inside = StudyPaths(tmp_path / "file" / "study")
    assert said(lambda: take_lock(inside)) == (
        f"folder {str(inside.root)!r} cannot be written: Not a directory",
        "free space or choose a writable folder with AUTOPRUNE_STUDIES",
    )
    absent = StudyPaths(tmp_path / "absent")
    assert said(lambda: move_aside(absent, "absent.1")) == (
        f"{str(absent.root)!r} cannot be moved aside: No such file or directory",
        "see who may write its folder, or use another --study NAME",
    )


def test_settings_that_differ_or_are_damaged(paths: StudyPaths) -> None:
    assert said(lambda: check_same({"a": 1, "b": 2}, {"a": 3, "c": None}, paths)) == (
        "study 'kept' was made with other settings:\n  a: 1 -> 3\n  b: 2 -> None",
        "use the settings it was made with, another --study NAME, or --fresh to start over (the old study is kept)",
    )
    place = Place(paths)
    assert said(lambda: settings_in_database(None, place)) == (
        f"the settings of study 'kept' in {str(place)!r} cannot be read: they are missing",
        "run the same search again, which writes what is missing, or set the study aside with --fresh",
    )
    text = paths.settings.read_text(encoding="utf-8")
    paths.settings.write_text(text.replace('"m"', '"n"'), encoding="utf-8")
    assert said(lambda: read_settings(paths)) == (
        f"{str(paths.settings)!r} cannot be read: its checksum differs: it is not what was written",
        "run the same search again, which restores the file, or set the study aside with --fresh",
    )


def test_a_record_elsewhere(paths: StudyPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(lambda: Place.for_writing(paths, DATABASE)) == (
        f"study 'kept' has its record in {paths.database}, not in {DATABASE}",
        "leave --storage out, use another --study NAME, or --fresh to start over; AUTOPRUNE_STORAGE gives the "
        "database of a study another address",
    )
    place = Place.of(paths, DATABASE)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert said(lambda: check_installed(place)) == (
        "studies in PostgreSQL need psycopg, which is not installed",
        "pip install 'autoprune[postgres]'",
    )
    paths.storage.write_text("{}", encoding="utf-8")
    assert said(lambda: Place.of(paths, None)) == (
        f"{str(paths.storage)!r} is damaged: it does not say where the record is",
        "give --storage URL",
    )


def test_damaged_records(paths: StudyPaths) -> None:
    name = f"the record of study 'kept' ({str(paths.database)!r})"
    execute(paths, "INSERT INTO studies (study_id, study_name) VALUES (7, 'other')")
    assert said(lambda: open_for_reading(Place(paths))) == (
        f"{str(paths.database)!r} holds 2 studies instead of one: ['kept', 'other']",
        "autoprune writes one study to a file: set this one aside with --fresh",
    )
    execute(paths, "DELETE FROM studies WHERE study_id = 7")
    execute(paths, "UPDATE trial_user_attributes SET value_json = '7'")
    read = said(lambda: StudyStore.open("kept").records())
    assert read[0].startswith("trial 0 cannot be read: ")
    assert read[1] == (
        "the study's database is damaged, or another version of autoprune wrote it: the same search again checks it "
        "and goes on from its copy; --fresh sets the study aside"
    )
    store = StudyStore.open("kept")
    note = "INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (1, 'note:timings', ?)"
    execute(paths, note, '"other #0123456789abcdef"')
    why = "its checksum differs: it is not what was written"
    go_on = "run the same search again, which goes on from a copy, or set the study aside with --fresh"
    assert said(store.notes) == (f"{name} is damaged: a note: {why}", go_on)
    assert said(lambda: StudyStore.open("kept"))[0] == f"{name} is damaged: note:timings: {why}"
    paths.database.write_bytes(b"nothing")
    assert said(lambda: check_database(paths)) == (
        f"{name} is damaged: file is not a database",
        "the same search again sets it aside and goes on from its copy; --fresh sets the study aside",
    )
    paths.database_copy.unlink(missing_ok=True)
    assert said(lambda: heal_database(paths)) == (
        f"{name} is damaged: file is not a database",
        "there is no sound copy of it here: restore it from a backup, or set the study aside with --fresh",
    )


@pytest.mark.parametrize(
    ("url", "why", "hint"),
    [
        (" s3://b/x", "it is empty or holds blanks at its ends or control characters", ""),
        ("s3://b::file://x", "chained URLs are not taken", ""),
        (
            "s3://k:secret@b/x",
            "it holds a password",
            "give credentials by the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or by the role "
            "of the machine",
        ),
        ("s3://b/x#y", "it holds a query or a fragment", ""),
        ("s3://b/../x", "it holds '..' or a backslash", ""),
        ("file://x/y", "file:// takes an absolute folder", "did you mean file:///x/y?"),
        ("s3://", "it names no bucket or folder", ""),
    ],
)
def test_urls_of_artifacts(url: str, why: str, hint: str) -> None:
    shown = url.replace("secret", "***")
    assert said(lambda: check_url(url)) == (
        f"artifacts URL {shown!r} cannot be used: {why}; allowed: s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, "
        "abfs://CONTAINER/FOLDER, file:///FOLDER or a folder",
        hint,
    )


@pytest.mark.parametrize(
    ("protocol", "line"),
    [
        ("s3", "pip install 'autoprune[s3]'"), ("gs", "pip install 'autoprune[gcs]'"),
        ("gcs", "pip install 'autoprune[gcs]'"), ("abfs", "pip install adlfs"),
    ],
)  # fmt: skip
def test_drivers_that_are_missing(protocol: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object, **__: object) -> None:
        raise ImportError("No module named 'it'")

    monkeypatch.setattr(fsspec, "filesystem", lacking)
    assert said(lambda: Remote(f"{protocol}://b", "s").size("x")) == (
        f"artifacts URL '{protocol}://b' needs a driver for {protocol}://: No module named 'it'",
        line,
    )


def test_artifacts_that_are_missing_or_damaged(tmp_path: Path) -> None:
    mirror = Mirror(str(tmp_path / "shared"), "s")
    shown = f"file://{tmp_path}/shared/s"
    assert said(lambda: mirror.pull("trial-0", tmp_path / "here")) == (
        f"{shown} has no artifact 'trial-0'",
        "search it again, or check --artifacts",
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    message, hint = said(lambda: mirror.push(empty, "trial-0"))
    assert message.startswith(f"{str(empty)!r} is no committed folder: ")
    assert hint == "search it again"
    (tmp_path / "shared" / "s" / "artifacts").mkdir(parents=True)
    manifest = tmp_path / "shared" / "s" / "artifacts" / "trial-1.json"
    manifest.write_text(json.dumps({"model.onnx": 3}), encoding="utf-8")
    assert said(lambda: mirror.pull("trial-1", tmp_path / "here")) == (
        f"the manifest of {shown}/artifacts/trial-1.json is damaged: it does not hold hashes by name",
        "search it again",
    )
