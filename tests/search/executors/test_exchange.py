"""Artifacts that pass through shared storage between a driver and workers that do not see its folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from autoprune.errors import TrialError, WorkerError
from autoprune.naming import StudyPaths
from autoprune.search.events import WorkerState
from autoprune.search.executors.contract import WORKER_LOST, Reference, Reply, Request
from autoprune.search.executors.exchange import Exchange, Mark, MirroredExecutor, inbox
from autoprune.space.recipe import Recipe
from autoprune.study.artifacts import commit_folder, temporary_folder
from autoprune.study.mirror import Mirror
from tests.study.made import make_groups, make_measurement


@dataclass
class Worker:
    """An executor whose one worker stands in for a process that has other folders."""

    exchange: Exchange
    work: Callable[[Request], None]
    size: int = 1
    told: list[Path] = field(default_factory=list)

    def adopt_dense(self, reference: Reference) -> None:
        self.told.append(self.exchange.reference(reference).folder)

    def next_token(self) -> int:
        return 7

    def run(self, request: Request) -> Reply:
        with self.exchange.request(request) as own:
            assert own.folder != request.folder
            self.work(own)
            self.exchange.hand_over(own, request)
        return Reply(request.token)

    def states(self) -> tuple[WorkerState, ...]:
        return ()

    def stop(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    (tmp_path / "storage").mkdir()
    return Mirror(str(tmp_path / "storage"), "s")


@pytest.fixture
def paths(tmp_path: Path) -> StudyPaths:
    made = StudyPaths(tmp_path / "studies" / "s")
    made.artifacts.mkdir(parents=True)
    return made


def unseen(paths: StudyPaths, mirror: Mirror) -> Exchange:
    return Exchange(Mark(Mark.leave(paths).path, "another"), mirror)


def write(text: str) -> Callable[[Request], None]:
    def work(own: Request) -> None:
        assert own.folder is not None
        (own.folder / "model.onnx").write_text(text)

    return work


def artifact(paths: StudyPaths, number: int, text: str) -> Path:
    folder = temporary_folder(paths.artifacts)
    (folder / "model.onnx").write_text(text)
    commit_folder(folder, paths.artifact(number))
    return paths.artifact(number)


def test_what_a_worker_makes_and_reads_passes_through_the_storage(paths: StudyPaths, mirror: Mirror) -> None:
    read: list[str] = []

    def work(own: Request) -> None:
        assert own.start is not None
        read.append((own.start / "model.onnx").read_text())
        write("made")(own)

    worker = Worker(unseen(paths, mirror), work)
    executor = MirroredExecutor(worker, mirror, worker.exchange.mark)
    start, folder = artifact(paths, 3, "start"), temporary_folder(paths.artifacts)
    executor.run(Request(1, "trial", "trial 4", Recipe(), folder, start))
    assert read == ["start"]
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    assert (folder / "model.onnx").read_text() == "made"
    assert mirror.names() == [start.name]


def test_a_worker_that_dies_half_way_hands_nothing_over(paths: StudyPaths, mirror: Mirror) -> None:
    def half(own: Request) -> None:
        write("ha")(own)
        raise TrialError(WORKER_LOST, "killed")

    worker = Worker(unseen(paths, mirror), half)
    executor = MirroredExecutor(worker, mirror, worker.exchange.mark)
    folder = temporary_folder(paths.artifacts)
    with pytest.raises(TrialError, match="killed"):
        executor.run(Request(1, "trial", "trial 4", Recipe(), folder))
    assert not list(folder.iterdir())
    assert mirror.names() == []


def test_what_an_earlier_run_left_is_nobody_s(paths: StudyPaths, mirror: Mirror) -> None:
    late = Worker(unseen(paths, mirror), write("late"))
    late.run(Request(1, "trial", "trial 4", Recipe(), temporary_folder(paths.artifacts)))
    assert mirror.has(inbox(Request(1, "trial", "", Recipe()), late.exchange.mark))
    MirroredExecutor(late, mirror, late.exchange.mark)
    assert mirror.names() == []


def test_the_dense_artifact_reaches_workers(paths: StudyPaths, mirror: Mirror) -> None:
    worker = Worker(unseen(paths, mirror), write("made"))
    dense = artifact(paths, 0, "dense")
    MirroredExecutor(worker, mirror, worker.exchange.mark).adopt_dense(
        Reference(dense, make_measurement(Recipe(), make_groups()))
    )
    (there,) = worker.told
    assert there != dense
    assert (there / "model.onnx").read_text() == "dense"


def test_a_node_that_reaches_neither_is_refused_by_name(paths: StudyPaths) -> None:
    mark = Mark.leave(paths)
    Exchange(mark).check()
    with pytest.raises(WorkerError, match="does not see the study's folder") as caught:
        Exchange(Mark(mark.path, "another")).check()
    assert "--artifacts" in caught.value.hint
