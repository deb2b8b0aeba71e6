"""A driver that is started again on another node: what it finds there, and what is kept no longer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from autoprune.config import StudyConfig
from autoprune.errors import UsageError
from autoprune.execution import Execution
from autoprune.naming import StudyPaths
from autoprune.search.shelf import Shelf
from autoprune.study.artifacts import commit_folder, write_text_atomic


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyPaths:
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(tmp_path / "studies"))
    return StudyPaths.of("s")


def make_shelf(tmp_path: Path, paths: StudyPaths) -> Shelf:
    execution = Execution(artifacts=str(tmp_path / "shared"))
    return Shelf.of(StudyConfig(model="m", study="s", execution=execution), paths)


def commit(paths: StudyPaths, number: int, content: str) -> Path:
    folder = paths.artifacts / f".making-{number}"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_text(content)
    commit_folder(folder, paths.artifact(number))
    return paths.artifact(number)


def test_another_node_gets_settings_and_artifacts_as_they_were(tmp_path: Path, paths: StudyPaths) -> None:
    (tmp_path / "shared").mkdir()
    shelf = make_shelf(tmp_path, paths)
    write_text_atomic(paths.settings, "model: 1\n")
    for number in range(3):
        shelf.put(commit(paths, number, f"network {number}"))
    shutil.rmtree(paths.artifact(1))  # not worth keeping any more
    shelf.tidy(at_once=True)
    shutil.rmtree(paths.root)  # another node

    assert make_shelf(tmp_path, paths).restore() == ["trial-00000", "trial-00002"]
    assert paths.settings.read_text() == "model: 1\n"
    assert (paths.artifact(2) / "model.onnx").read_text() == "network 2"
    assert make_shelf(tmp_path, paths).restore() == []  # nothing is fetched over what is there


def test_what_another_driver_kept_is_never_removed(tmp_path: Path, paths: StudyPaths) -> None:
    (tmp_path / "shared").mkdir()
    there = make_shelf(tmp_path, paths)
    write_text_atomic(paths.settings, "model: 1\n")
    there.put(commit(paths, 0, "network 0"))
    there.tidy(at_once=True)
    here = make_shelf(tmp_path, paths)
    here.restore()
    shutil.rmtree(paths.artifacts)  # this node has another folder
    there.put(commit(paths, 1, "network 1"))
    shutil.rmtree(paths.artifacts)
    here.tidy(at_once=True)  # it discarded trial 0, and knows nothing of trial 1
    assert make_shelf(tmp_path, paths).restore() == ["trial-00001"]
    here.forget()
    shutil.rmtree(paths.root)
    assert make_shelf(tmp_path, paths).restore() == []


def test_without_a_mirror_nothing_is_done(tmp_path: Path, paths: StudyPaths) -> None:
    shelf = Shelf.of(StudyConfig(model="m", study="s"), paths)
    shelf.put(tmp_path / "nowhere")
    shelf.tidy()
    assert shelf.restore() == []


@pytest.mark.parametrize("url", ["relative", "s3://a/../b", "nonsense://x/y"])
def test_urls_that_cannot_be_used_are_refused(url: str, tmp_path: Path, paths: StudyPaths) -> None:
    with pytest.raises((UsageError, ValueError)):
        Shelf.of(StudyConfig(model="m", study="s", execution=Execution(artifacts=url)), paths)
