"""Damage of small texts, files and a database: what is damage, what it is called, and what is kept."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from itertools import product
from pathlib import Path

import pytest

from autoprune.errors import StorageError
from autoprune.naming import StudyPaths
from autoprune.study import reading
from autoprune.study.artifacts import kept_numbers
from autoprune.study.integrity import (
    digest_of,
    fault_of,
    heal_database,
    keep_copy,
    seal,
    seal_line,
    seal_value,
    set_aside,
    set_aside_orphans,
    study_attribute,
    unseal,
    unseal_line,
    unseal_value,
)
from autoprune.study.reading import parse_json, read_bytes, read_json, read_text
from tests.study.made import add, open_for_writing


def test_what_was_sealed_is_read_back_and_nothing_else() -> None:
    content = {"a": [1, 2.5, None], "b": "text"}
    assert unseal(seal(content)) == content
    assert unseal(seal({})) == {}
    # What earlier versions wrote has no checksum.
    assert unseal(json.dumps(content)) == content
    for other in (seal(content).replace("text", "test"), seal(content).replace("2.5", "2.4")):
        with pytest.raises(ValueError, match="its checksum differs: it is not what was written"):
            unseal(other)
    for text in ("[1]", "7"):
        with pytest.raises(ValueError, match="it is no mapping"):
            unseal(text)
    assert len(digest_of(content)) == 16


def test_lines_are_sealed_at_their_end() -> None:
    for text in ("a note", "", "one #two", "a #0123456789abcdef"):
        assert unseal_line(seal_line(text)) == text
    # Without a checksum they are from earlier versions.
    for text in ("a note", "issue #12", "", "#0123456789abcdef"):
        assert unseal_line(text) == text
    with pytest.raises(ValueError, match="its checksum differs"):
        unseal_line(seal_line("a note").replace("note", "nose"))


def test_what_is_set_aside_has_the_next_free_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = []
    for _ in range(3):
        (tmp_path / "file.json").write_text("x")
        names.append(set_aside(tmp_path / "file.json", "it is torn").name)
    assert names == [f"file.json.damaged-{number}" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (
        f"{tmp_path / 'file.json'} is damaged (it is torn): it was set aside as file.json.damaged-3"
        in caplog.text
    )


def test_artifacts_beyond_the_record_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = StudyPaths(tmp_path)
    names = ("trial-00001", "trial-00002", "trial-00003", "trial-00002-final1", "trial-x", "trial-²", "other")
    for name in names:
        (paths.artifacts / name).mkdir(parents=True)
    assert kept_numbers(paths) == {1, 2, 3}
    set_aside_orphans(paths, 2)
    assert caplog.text.count("(the record has 2 trials: its end was lost)") == 3
    assert {path.name for path in paths.artifacts.iterdir()} == {
        "trial-00001", "trial-x", "trial-²", "other", "trial-00002.damaged-1", "trial-00003.damaged-1",
        "trial-00002-final1.damaged-1",
    }  # fmt: skip


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes('{"ä": 1}'.encode())
    assert read_json(tmp_path / "file") == {"ä": 1}
    assert read_text(tmp_path / "file") == '{"ä": 1}'
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="is not a regular file"):
            read_bytes(place)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "gone")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(OSError, match=r"has 67,108,865 bytes; allowed: up to 67,108,864"):
        read_bytes(tmp_path / "large")
    monkeypatch.setattr(reading, "LARGEST", 4)
    (tmp_path / "four").write_bytes(b"1234")
    assert read_bytes(tmp_path / "four") == b"1234"
    (tmp_path / "other").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "other")
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json("[" * 100_000)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="not a regular file"):
        read_bytes(tmp_path)
    assert read_bytes(tmp_path / "four")
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of a study of two trials and a note."""
    patch = pytest.MonkeyPatch()
    patch.setenv("AUTOPRUNE_STUDIES", str(tmp_path_factory.mktemp("studies")))
    store = open_for_writing("made")
    add(store, 0.2)
    add(store, 0.4)
    store.note("data", "digits")
    store.set_spent(1234.5)
    store.phase = "final"
    store.release()
    patch.undo()
    with closing(sqlite3.connect(store.paths.database)) as link:
        link.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return store.paths.database


@pytest.fixture
def paths(made: Path) -> StudyPaths:
    """A study's folder with a copy of that database."""
    paths = StudyPaths.of("made")
    paths.root.mkdir(parents=True)
    paths.database.write_bytes(made.read_bytes())
    return paths


def change(database: Path, statement: str) -> None:
    with closing(sqlite3.connect(database)) as link:
        link.execute(statement)
        link.commit()


def test_a_sound_database_has_no_fault(paths: StudyPaths, tmp_path: Path) -> None:
    assert fault_of(paths.database) == ""
    # A run that was killed as it made the file or its tables damaged nothing.
    (tmp_path / "empty").write_bytes(b"")
    assert fault_of(tmp_path / "empty") == ""
    change(tmp_path / "other.db", "CREATE TABLE studies (study_id integer)")
    assert fault_of(tmp_path / "other.db") == ""


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("UPDATE trials SET state = 'COMPLETED' WHERE number = 1", "trial 1 is 'COMPLETED'"),
        ("UPDATE trials SET number = 2 WHERE number = 1", "numbers of trials are missing"),
        ("DELETE FROM trials WHERE number = 0", "numbers of trials are missing"),
        (
            "UPDATE trial_user_attributes SET value_json = replace(value_json, 'tpe', 'tpf')",
            "plan of trial 0: its checksum differs: it is not what was written",
        ),
        (
            "UPDATE trial_user_attributes SET value_json = '{' WHERE key = 'autoprune:result'",
            "result of trial 0: Expecting property name",
        ),
        (
            "UPDATE study_user_attributes SET value_json = replace(value_json, 'digits', 'digit')",
            "note:data: its checksum differs",
        ),
        ("UPDATE study_user_attributes SET value_json = '7' WHERE key = 'note:data'", "note:data: "),
        (
            "UPDATE study_user_attributes SET value_json = replace(value_json, '1234.5', '9234.5')",
            "spent_s: its checksum differs",
        ),
        (
            "UPDATE study_user_attributes SET value_json = replace(value_json, 'final', 'fival')",
            "phase: its checksum differs",
        ),
        (
            "UPDATE study_user_attributes SET value_json = '{' WHERE key = 'autoprune_schema'",
            "value_json in study_user_attributes: Expecting property name",
        ),
        (
            "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)"
            " VALUES (1, 'x', 0.5, '{')",
            "distribution_json in trial_params: ",
        ),
        (
            "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)"
            " VALUES (1, 'x', 'y', '{}')",
            "param_value in trial_params: could not convert string to float",
        ),
        ("UPDATE trial_values SET value_type = 'NONE'", "value_type in trial_values: 'NONE'"),
        ("UPDATE trials SET datetime_start = 'yesterday'", "datetime_start in trials: Invalid isoformat"),
        # What Python cannot decode comes without any code of SQLite's.
        (
            "UPDATE trial_user_attributes SET value_json = CAST(X'22ff22' AS TEXT) WHERE key = 'autoprune:result'",
            "Could not decode to UTF-8",
        ),
        (
            "UPDATE trial_user_attributes SET value_json = printf('%.*c', 200000, '[')",
            "plan of trial 0: maximum recursion depth exceeded",
        ),
    ],
)
def test_a_changed_text_or_number_is_told(paths: StudyPaths, statement: str, fault: str) -> None:
    change(paths.database, statement)
    assert fault_of(paths.database).startswith(fault)


def test_whatever_bit_flips_in_a_text_is_told_before_the_copy_is_replaced(paths: StudyPaths) -> None:
    keep_copy(paths)
    sound, copy = paths.database.read_bytes(), paths.database_copy.read_bytes()
    at = sound.index(b"parity_error")
    for bit in range(8):
        paths.database.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << bit]) + sound[at + 1 :])
        assert fault_of(paths.database), f"bit {bit}"
    assert paths.database_copy.read_bytes() == copy
    store = open_for_writing("made")  # which heals what is damaged
    assert (len(store.records()), store.spent_s) == (2, 1234.5)
    store.release()


@pytest.mark.parametrize("value", [12.5, "final:1", "1h", [1.0, 2.5], [], "", {"a": None}])
def test_values_are_sealed_and_every_single_bit_counts(value: object) -> None:
    text = seal_value(value)
    assert unseal_value(text) == value
    assert unseal_value(value) == value, "as earlier versions kept it"
    for at, bit in product(range(len(text)), range(7)):
        flipped = text[:at] + chr(ord(text[at]) ^ 1 << bit) + text[at + 1 :]
        with pytest.raises(ValueError, match=r"."):
            unseal_value(flipped)


def test_a_database_that_is_busy_or_cannot_be_opened_is_not_damaged(
    paths: StudyPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda place, timeout: connect(place, timeout=0))
    with closing(connect(paths.database)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        assert fault_of(paths.database) == ""
    (paths.root / "folder.db").mkdir()
    assert fault_of(paths.root / "folder.db") == ""


def test_attributes_of_others_are_none_of_ours(paths: StudyPaths) -> None:
    change(paths.database, "UPDATE trial_user_attributes SET key = 'their' || key, value_json = '{'")
    assert fault_of(paths.database) == ""


def test_attributes_of_the_study_are_read_without_optuna(paths: StudyPaths) -> None:
    assert study_attribute(paths.database, "note:data") == seal_line("digits")
    assert study_attribute(paths.database, "nothing") is None
    assert study_attribute(paths.root / "gone.db", "note:data") is None
    assert not (paths.root / "gone.db").exists()
    paths.database.write_bytes(b"no database" * 500)
    assert study_attribute(paths.database, "note:data") is None


def test_a_damaged_database_is_healed_from_its_copy(
    paths: StudyPaths, caplog: pytest.LogCaptureFixture
) -> None:
    heal_database(paths)
    assert not caplog.records
    sound = paths.database.read_bytes()
    keep_copy(paths)
    assert fault_of(paths.database_copy) == ""
    assert {path.name for path in paths.root.iterdir()} == {paths.database.name, paths.database_copy.name}
    # While somebody reads it, what was written last lies beside the file.
    with closing(sqlite3.connect(paths.database)) as reader:
        reader.execute("SELECT count(*) FROM trials").fetchone()
        change(paths.database, "UPDATE trials SET state = 'WRONG'")
        heal_database(paths)
    assert fault_of(paths.database) == ""
    assert study_attribute(paths.database, "note:data") == seal_line("digits")
    aside = f"{paths.database.name}.damaged-1"
    assert {path.name for path in paths.root.iterdir()} == {
        paths.database.name, paths.database_copy.name, aside, f"{aside}-wal", f"{aside}-shm",
    }  # fmt: skip
    assert "is damaged (trial 0 is 'WRONG'): it was set aside as" in caplog.text
    assert f"goes on from the copy {paths.database_copy.name}: trials that were recorded after" in caplog.text
    assert len(paths.database.read_bytes()) == len(sound)


@pytest.mark.parametrize("lost", ["missing", "empty"])
def test_a_database_that_is_gone_comes_back_from_its_copy(
    paths: StudyPaths, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    keep_copy(paths)
    paths.database.unlink()
    if lost == "empty":
        paths.database.write_bytes(b"")
    heal_database(paths)
    assert fault_of(paths.database) == "" and study_attribute(paths.database, "note:data") == seal_line(
        "digits"
    )
    assert "is damaged (it is empty or missing): it was set aside as" in caplog.text
    assert {path.name for path in paths.root.iterdir()} == {
        paths.database.name, paths.database_copy.name, f"{paths.database.name}.damaged-1",
    }  # fmt: skip


@pytest.mark.parametrize("copy", [None, "UPDATE trials SET state = 'WRONG'"])
def test_without_a_sound_copy_a_damaged_database_is_refused(paths: StudyPaths, copy: str | None) -> None:
    if copy is not None:
        keep_copy(paths)
        change(paths.database_copy, copy)
    change(paths.database, "UPDATE trials SET state = 'BAD'")
    with pytest.raises(
        StorageError, match=r"study 'made' \(.*study\.db'\) is damaged: trial 0 is 'BAD'"
    ) as caught:
        heal_database(paths)
    assert "restore it from a backup, or set the study aside with --fresh" in caught.value.hint
    assert paths.database.exists()


def test_where_there_is_no_database_there_is_nothing_to_heal() -> None:
    heal_database(StudyPaths.of("none"))


def test_a_copy_that_cannot_be_written_leaves_the_old_one(
    paths: StudyPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_copy(paths)
    before = paths.database_copy.read_bytes()

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        keep_copy(paths)
    assert paths.database_copy.read_bytes() == before
    assert {path.name for path in paths.root.iterdir()} == {paths.database.name, paths.database_copy.name}


@pytest.mark.parametrize(
    "damage",
    [lambda raw: b"no database" * 500, lambda raw: raw[: len(raw) // 2], lambda raw: raw[:4000] + raw[8000:]],
)
def test_damaged_pages_are_damage(paths: StudyPaths, damage: Callable[[bytes], bytes]) -> None:
    paths.database.write_bytes(damage(paths.database.read_bytes()))
    assert fault_of(paths.database)
