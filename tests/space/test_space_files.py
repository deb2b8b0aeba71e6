"""Search spaces by name and from files, and where the shipped ones lie."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from autoprune.errors import UsageError
from autoprune.space import space_files
from autoprune.space.search_space import SearchSpace
from autoprune.space.space_files import (
    json_schema,
    load_space,
    parse_space,
    shipped_folder,
    shipped_spaces,
    space_path,
)


def test_the_shipped_spaces_are_those_beside_the_package(repository: Path) -> None:
    assert shipped_folder() == repository / "search_spaces"
    assert list(shipped_spaces()) == sorted(
        path.stem for path in (repository / "search_spaces").glob("*.yaml")
    )
    assert shipped_spaces()["default"] == repository / "search_spaces" / "default.yaml"


def test_an_installation_s_own_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "_data" / "search_spaces"
    installed.mkdir(parents=True)
    (installed / "mine.yaml").write_text("width: 4\n", encoding="utf-8")
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    assert shipped_folder() == installed
    assert load_space("mine").width == 4


def test_an_installation_without_spaces_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    monkeypatch.setattr(space_files, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(UsageError, match="search spaces that autoprune ships are missing"):
        shipped_folder()


@pytest.mark.parametrize("given", ["own.yaml", "own.yml", "folder/own", "folder\\own"])
def test_what_looks_like_a_file_is_one(given: str) -> None:
    assert space_path(given) == Path(given)


def test_other_words_are_names_of_shipped_spaces() -> None:
    assert space_path("quick") == shipped_spaces()["quick"]
    with pytest.raises(UsageError, match="unknown search space 'own'") as caught:
        space_path("own")
    assert "`autoprune spaces copy` writes one" in caught.value.hint


def test_faults_name_the_file_and_say_what_is_allowed() -> None:
    with pytest.raises(
        UsageError, match=r"search space:1: a search space is a mapping of settings, not \[1, 2\]"
    ):
        parse_space("[1, 2]")
    with pytest.raises(UsageError, match=r"search space:2: unknown setting 'bit'; did you mean 'bits'"):
        parse_space("width: 8\nbit: [8]")
    # An error of a validator of ours has its own advice.
    with pytest.raises(UsageError, match=r"^search space: unknown criterion 'l7'"):
        parse_space("criteria: {conv: [l7]}")
    with pytest.raises(UsageError, match=r"^search space: sparsity 0.7 .*'2:4'") as caught:
        parse_space("sparsities: [0.7]\nmasks: {pattern: '2:4'}")
    assert "set the sparsity to one of these" in caught.value.hint


def test_the_schema_is_a_schema_of_spaces() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == set(SearchSpace.model_fields)
    assert {"type": "integer", "minimum": 1, "maximum": 1024} in schema["properties"]["width"]["anyOf"]
    assert {"const": "auto"} in schema["properties"]["width"]["anyOf"]
