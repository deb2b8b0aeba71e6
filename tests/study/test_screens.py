"""Screens: one line each, in order, and half a line of a killed run costs that line alone."""

from __future__ import annotations

import pytest

from autoprune.errors import StorageError
from autoprune.naming import StudyPaths
from autoprune.space.recipe import GroupChoice, Recipe
from autoprune.study.screens import Screen, append_screens, read_screens


def screen(ratio: float) -> Screen:
    return Screen(
        recipe=Recipe(groups={"a": GroupChoice(ratio=ratio)}),
        arm="moves",
        lost=0.01,
        size_ratio=0.5,
        latency_ratio=0.6,
        duration_s=2.0,
    )


@pytest.fixture
def paths() -> StudyPaths:
    paths = StudyPaths.of("screened")
    paths.root.mkdir(parents=True)
    return paths


def test_screens_come_back_in_their_order(paths: StudyPaths) -> None:
    assert read_screens(paths) == []
    append_screens(paths, [screen(0.1), screen(0.2)])
    append_screens(paths, [])
    append_screens(paths, [screen(0.3)])
    assert read_screens(paths) == [screen(0.1), screen(0.2), screen(0.3)]
    assert paths.screens.read_bytes().count(b"\n") == 3
    assert b"\n\n" not in paths.screens.read_bytes()


@pytest.mark.parametrize("torn", [b'{"recipe": {"gro', b"\xff\xfe", b"{}", b"[1]", b"7"])
def test_a_torn_line_is_dropped_and_the_next_begins_a_new_one(paths: StudyPaths, torn: bytes) -> None:
    append_screens(paths, [screen(0.1)])
    with paths.screens.open("ab") as file:
        file.write(torn)
    assert read_screens(paths) == [screen(0.1)]
    append_screens(paths, [screen(0.2)])
    assert read_screens(paths) == [screen(0.1), screen(0.2)]


def test_damaged_lines_are_told_with_their_number(
    paths: StudyPaths, caplog: pytest.LogCaptureFixture
) -> None:
    append_screens(paths, [screen(0.1), screen(0.2)])
    with caplog.at_level("WARNING"):
        assert len(read_screens(paths)) == 2
    assert not caplog.records
    with paths.screens.open("ab") as file:
        file.write(b"{\n\nhalf")
    with caplog.at_level("WARNING"):
        assert read_screens(paths) == [screen(0.1), screen(0.2)]
    assert f"{paths.screens}: 2 of its lines are damaged or half written and left out" in caplog.text


def test_a_file_of_half_a_line_is_gone_on_with(paths: StudyPaths) -> None:
    paths.screens.write_bytes(b"{")
    append_screens(paths, [screen(0.1)])
    assert read_screens(paths) == [screen(0.1)]


def test_a_file_that_cannot_be_read_is_told(paths: StudyPaths) -> None:
    paths.screens.mkdir()
    with pytest.raises(StorageError, match=r"screens\.jsonl' cannot be read") as caught:
        read_screens(paths)
    assert caught.value.hint == "take the file away"


def test_screens_that_cannot_be_written_are_told() -> None:
    with pytest.raises(StorageError, match="'gone'"):
        append_screens(StudyPaths.of("gone"), [screen(0.1)])
