"""The settings of a study: as they were written, compared with others, and refused where no version wrote them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Any

import pytest

from autoprune.errors import StorageError, UsageError
from autoprune.naming import StudyPaths
from autoprune.study.place import Place
from autoprune.study.settings import (
    check_same,
    check_settings,
    read_settings,
    settings_in_database,
    settings_text,
)
from tests.study.made import config, open_for_writing

WHOLE: dict[str, Any] = config("kept").identity()


@pytest.fixture
def paths() -> StudyPaths:
    paths = StudyPaths.of("kept")
    paths.root.mkdir(parents=True)
    return paths


def plain(settings: dict[str, Any]) -> str:
    """Return settings as earlier versions wrote them, without a checksum."""
    return "".join(line + "\n" for line in settings_text(settings).splitlines()[:-1])


def test_settings_come_back_as_they_were_written(paths: StudyPaths) -> None:
    text = settings_text({**WHOLE, "note": "a: b # c"})
    assert text.startswith(
        "# The settings of this study; `autoprune search -c settings.yaml` takes them. schema 1\n"
    )
    paths.settings.write_text(text, encoding="utf-8")
    back = read_settings(paths)
    assert back == settings_in_database(text, Place(paths))
    assert back["note"] == "a: b # c"
    assert {name: back[name] for name in ("model", "data", "study", "seed")} == {
        "model": "m", "data": "d", "study": "kept", "seed": 0,
    }  # fmt: skip
    paths.settings.write_text(plain(WHOLE), encoding="utf-8")
    assert read_settings(paths)["model"] == "m"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (settings_text(WHOLE).replace('"m"', '"n"'), "its checksum differs"),
        ("", "objectives"),
        ("\xff", "codec can't decode|objectives"),
        ("objectives: [", "Expecting value"),
        *[
            (plain({**WHOLE, **changes}), f"{name} cannot be what a study was made with")
            for name, changes in (
                ("model", {"model": 3}),
                ("study", {"study": None}),
                ("sampler", {"sampler": "guess"}),
                ("sampler", {"sampler": 7}),
                ("data", {"data": 7}),
                ("weights", {"weights": [1]}),
                ("space", {"space": {}}),
                ("objectives", {"objectives": []}),
                ("objectives", {"objectives": "accuracy"}),
                ("objectives", {"objectives": ["accuracy", "beauty"]}),
                ("target", {"target": "onnxruntime"}),
                ("target", {"target": {"runtime": "abacus"}}),
                ("target", {"target": {"threads": [1]}}),
                ("target", {"also": "torch"}),
                ("target", {"also": [{"runtime": "torch"}, 3]}),
                ("model, objectives", {"model": 3, "objectives": None}),
            )
        ],
    ],
)
def test_what_no_version_wrote_is_refused(text: str, says: str, paths: StudyPaths) -> None:
    paths.settings.write_text(text, encoding="latin-1")
    with pytest.raises(StorageError, match=rf"settings\.yaml' cannot be read: .*({says})") as caught:
        read_settings(paths)
    assert "run the same search again, which restores the file" in caught.value.hint
    with pytest.raises(
        StorageError, match=r"settings of study 'kept' in '.*study\.db' cannot be read"
    ) as caught:
        settings_in_database(text, Place(paths))
    assert "which writes what is missing" in caught.value.hint


def test_little_is_enough(paths: StudyPaths) -> None:
    least: dict[str, Any] = {
        "model": "m",
        "study": "kept",
        "sampler": "tpe",
        "objectives": ["accuracy"],
        "data": None,
    }
    more = {**least, "target": {"runtime": "torch", "threads": 1, "device": None}, "also": [{}]}
    for settings in (least, more):
        paths.settings.write_text(settings_text(settings), encoding="utf-8")
        assert read_settings(paths) == settings
    with pytest.raises(StorageError, match="cannot be read: they are missing"):
        settings_in_database(None, Place(paths))


def test_each_setting_that_differs_is_shown_before_and_now(paths: StudyPaths) -> None:
    check_same({"a": 1, "b": None}, {"a": 1}, paths)
    with pytest.raises(UsageError) as caught:
        check_same({"b": 1, "a": 1, "c": 3}, {"b": 2, "c": 3, "d": 4}, paths)
    assert caught.value.message.splitlines() == [
        "study 'kept' was made with other settings:",
        "  a: 1 -> None",
        "  b: 1 -> 2",
        "  d: None -> 4",
    ]
    assert "or --fresh to start over (the old study is kept)" in caught.value.hint


def test_a_damaged_file_is_set_aside_where_the_database_has_the_settings() -> None:
    store = open_for_writing("kept", seed=3)
    store.release()
    paths, now = store.paths, config("kept", seed=3).identity()
    check_settings(now, paths)
    with pytest.raises(UsageError, match=r"seed: 3 -> 4"):
        check_settings(config("kept", seed=4).identity(), paths)
    paths.settings.write_text("torn", encoding="utf-8")
    with pytest.raises(UsageError, match=r"seed: 3 -> 4"):
        check_settings(config("kept", seed=4).identity(), paths)
    assert paths.settings.exists()
    check_settings(now, paths)
    assert not paths.settings.exists()
    assert (paths.root / f"{paths.settings.name}.damaged-1").read_text() == "torn"


def test_where_both_are_damaged_the_file_is_named_and_stays() -> None:
    store = open_for_writing("kept")
    store.release()
    with closing(sqlite3.connect(store.paths.database)) as link:
        link.execute(
            "UPDATE study_user_attributes SET value_json = '\"x: {\"' WHERE key = 'autoprune:settings'"
        )
        link.commit()
    store.paths.settings.write_text("torn", encoding="utf-8")
    with pytest.raises(StorageError, match=r"settings\.yaml' cannot be read"):
        check_settings(WHOLE, store.paths)
    assert store.paths.settings.read_text() == "torn"


def test_without_a_database_a_damaged_file_is_told(paths: StudyPaths) -> None:
    paths.settings.write_text("torn", encoding="utf-8")
    with pytest.raises(StorageError, match="cannot be read"):
        check_settings(WHOLE, paths)
    assert paths.settings.exists()
