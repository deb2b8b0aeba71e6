"""Which record a study's folder, its options and the environment lead to, told without any server."""

from __future__ import annotations

import importlib.util
import json

import pytest

from autoprune.errors import StorageError, UsageError
from autoprune.naming import StudyPaths
from autoprune.storage_url import VARIABLE, parse_database_url
from autoprune.study.opening import has_record
from autoprune.study.place import Place, check_installed

ONE, OTHER = "postgresql://me@host/one", "postgresql://me@host/other"
FILE = "its file"


@pytest.fixture
def paths() -> StudyPaths:
    paths = StudyPaths.of("mine")
    paths.root.mkdir(parents=True)
    return paths


def found(place: Place) -> str:
    return FILE if place.database is None else place.database.text


@pytest.mark.parametrize(
    ("in_folder", "option", "environment", "record"),
    [
        (None, None, None, FILE),
        (FILE, None, None, FILE),
        (ONE, None, None, ONE),
        (None, ONE, None, ONE),
        (None, None, ONE, ONE),
        (None, "sqlite", ONE, FILE),
        # What is in the folder counts before the environment, unless that is another address of a database.
        (FILE, None, ONE, FILE),
        (ONE, None, OTHER, OTHER),
        (ONE, None, "sqlite", ONE),
        # What is given for this study counts before all.
        (FILE, ONE, None, ONE),
        (ONE, OTHER, None, OTHER),
        (ONE, OTHER, ONE, OTHER),
        (ONE, "sqlite", None, ONE),
    ],
)
def test_the_record_of_a_study_is_found(
    in_folder: str | None,
    option: str | None,
    environment: str | None,
    record: str,
    paths: StudyPaths,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if in_folder == FILE:
        paths.database.write_bytes(b"")
    elif in_folder is not None:
        Place(paths, parse_database_url(in_folder)).remember()
    if environment is not None:
        monkeypatch.setenv(VARIABLE, environment)
    place = Place.of(paths, option)
    assert (found(place), place.paths) == (record, paths)
    assert str(place) == (str(paths.database) if record == FILE else record)
    # A run may not put the record of a study in two places.
    before = in_folder and (str(paths.database) if in_folder == FILE else in_folder)
    if option is not None and before not in (None, str(place)):
        with pytest.raises(UsageError, match=r"study 'mine' has its record in .*, not in ") as caught:
            Place.for_writing(paths, option)
        assert f"{before}, not in {place}" in caught.value.message
        assert f"{VARIABLE} gives the database of a study another address" in caught.value.hint
    else:
        assert Place.for_writing(paths, option) == place


def test_a_folder_remembers_its_database_without_the_password(paths: StudyPaths) -> None:
    Place(paths).remember()
    assert not paths.storage.exists()
    Place(paths, parse_database_url("postgresql://me:s3cr3t@host/one")).remember()
    assert json.loads(paths.storage.read_text(encoding="utf-8")) == {"storage": ONE}
    assert found(Place.of(paths)) == ONE


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"storage": 7}', '{"storage": "redis://host"}', "[" * 100_000]
)
def test_a_damaged_pointer_is_never_followed(content: str, paths: StudyPaths) -> None:
    paths.storage.write_text(content, encoding="utf-8")
    with pytest.raises(StorageError, match=r"storage\.json' is damaged: it does not say where") as caught:
        Place.of(paths)
    assert caught.value.hint == "give --storage URL"


def test_a_pointer_that_cannot_be_read_is_told(paths: StudyPaths) -> None:
    paths.storage.mkdir()
    with pytest.raises(StorageError, match=r"storage\.json' cannot be read") as caught:
        Place.of(paths)
    assert caught.value.hint == "give --storage URL"


def test_what_stands_in_the_place_of_a_folder_has_no_pointer() -> None:
    paths = StudyPaths.of("file")
    paths.root.parent.mkdir(parents=True)
    paths.root.write_text("")
    assert found(Place.of(paths)) == FILE


def test_a_file_needs_no_client_of_a_database(paths: StudyPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Place(paths, parse_database_url(ONE))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_installed(database)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_installed(Place(paths))
    with pytest.raises(
        UsageError, match="studies in PostgreSQL need psycopg, which is not installed"
    ) as caught:
        check_installed(database)
    assert caught.value.hint == "pip install 'autoprune[postgres]'"


def test_a_study_was_begun_where_its_file_is(paths: StudyPaths) -> None:
    assert not has_record(paths, None)
    paths.database.write_bytes(b"")
    assert has_record(paths, None)
