"""A whole search on a network and data of the user's own: sealed report split, artifacts that keep their word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import autoprune
from autoprune.clock import FakeClock
from autoprune.config import Budget, make_config
from autoprune.errors import StorageError, UsageError
from autoprune.search.budget import Timekeeper
from autoprune.search.events import Progress, ignore
from autoprune.search.interrupt import Interrupt
from autoprune.search.run import check_same_inputs, with_trained_dense
from autoprune.space.space_files import load_space
from autoprune.study.artifacts import verify
from autoprune.study.front import point_json
from autoprune.study.store import StudyStore
from autoprune.workloads.workload import Workload, workload_from_objects
from tests.conftest import measure_briefly


class Guarded(Dataset[tuple[Tensor, Tensor]]):
    """A data set that raises on every read while it is armed."""

    def __init__(self, inner: Dataset[tuple[Tensor, ...]], length: int) -> None:
        self.inner = inner
        self.length = length
        self.armed = False
        self.reads = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.armed:
            raise AssertionError("the report split was read during the search")
        self.reads += 1
        inputs, target = self.inner[index]
        return inputs, target


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def digits() -> tuple[TensorDataset, TensorDataset]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    return TensorDataset(images[:1200], labels[:1200]), TensorDataset(images[1200:], labels[1200:])


def guarded() -> tuple[TensorDataset, Guarded]:
    train, test = digits()
    return train, Guarded(test, len(test))


def trained() -> nn.Module:
    model = network()
    images, labels = digits()[0].tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(60):
        rows = torch.arange(step * 64, step * 64 + 64) % len(images)
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Progress], int]:
    """Run one search and return its folder, its events and how often the report split was read."""
    root = tmp_path_factory.mktemp("search")
    patch = pytest.MonkeyPatch()
    patch.setenv("AUTOPRUNE_STUDIES", str(root / "studies"))
    patch.setenv("AUTOPRUNE_CACHE", str(root / "cache"))
    measure_briefly(patch)
    train, test = guarded()
    events: list[Progress] = []

    def listen(progress: Progress) -> None:
        events.append(progress)
        test.armed = progress.phase in ("baselines", "search", "final")

    study = autoprune.search(
        trained(),
        (train, test),
        budget="3trials",
        study="own",
        space="quick",
        progress=listen,
        front_points=2,
        final_share=0.2,
    )
    patch.undo()
    return study.path, events, test.reads


@pytest.fixture
def study(finished: tuple[Path, list[Progress], int], monkeypatch: pytest.MonkeyPatch) -> autoprune.Study:
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(finished[0].parent))
    return autoprune.open_study("own")


def test_the_report_split_is_read_at_the_end_and_never_before(
    finished: tuple[Path, list[Progress], int],
) -> None:
    _, events, reads = finished
    phases = [event.phase for event in events]
    assert phases.index("search") < phases.index("measure")
    assert reads > 0


def test_nothing_failed_and_the_front_has_final_points(study: autoprune.Study) -> None:
    records = study.records()
    assert [r for r in records if r.state != "complete"] == []
    finals = [r for r in records if r.fidelity == "final"]
    assert len(finals) >= 3
    assert all(r.measurement is not None and r.measurement.report is not None for r in finals)
    trained_points = [r for r in finals if r.recipe is not None and r.recipe.prunes]
    assert trained_points
    parents = {r.number: r for r in records}
    assert all(
        r.parent is not None and r.train_steps >= parents[r.parent].train_steps for r in trained_points
    )


def test_final_points_are_measured_whole_in_one_session_and_trials_briefly(study: autoprune.Study) -> None:
    measured = [(r.fidelity, r.measurement.figures) for r in study.records() if r.measurement is not None]
    finals = [figures for fidelity, figures in measured if fidelity == "final"]
    for figures in finals:
        assert figures.dense is not None
        for each in (figures, figures.dense):
            assert each.cold_start_ms is not None and each.throughput_per_s is not None
    assert len({figures.dense.cold_start_ms for figures in finals if figures.dense}) == 1
    brief = [figures for fidelity, figures in measured if fidelity == "search"]
    assert {figures.cold_start_ms for figures in brief} == {None}
    assert all("trials measure latency" in figures.why("throughput_per_s") for figures in brief)
    assert {"cold_start_ms", "throughput_batch", "energy_mj"} <= set(study.front().columns)


def test_the_front_is_a_table_and_its_points_are_not_dominated(study: autoprune.Study) -> None:
    frame = study.front()
    assert frame["artifact"].notna().all()
    assert frame["export_command"].str.startswith("autoprune export own --trial").all()
    costs = np.column_stack([-frame["accuracy"], frame["latency_ratio"], frame["size_ratio"]])
    for row in costs:
        assert not ((costs <= row).all(axis=1) & (costs < row).any(axis=1)).any()


def test_an_exported_point_runs_and_gives_the_printed_accuracy(
    study: autoprune.Study, tmp_path: Path
) -> None:
    point = study.pick(max_drop=1.0)
    folder = point.export(tmp_path / "out")
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    images, labels = digits()[1].tensors
    outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    accuracy = float((outputs.argmax(1) == labels.numpy()).mean())
    measured = point.record.measurement
    assert measured is not None
    assert measured.report is not None
    assert accuracy == pytest.approx(measured.report.value, abs=1e-9)
    assert (folder / "model.onnx").stat().st_size == measured.size_bytes
    assert set(load_file(folder / "weights.safetensors"))
    assert json.loads((folder / "recipe.json").read_text())["recipe"] == json.loads(
        point.record.recipe.canonical_json() if point.record.recipe else "{}"
    )
    assert str(point.trial) in (folder / "card.md").read_text()
    with pytest.raises(UsageError, match="not an empty folder"):
        point.export(folder)


def test_every_point_of_the_front_has_a_whole_artifact(study: autoprune.Study) -> None:
    store = StudyStore.open("own")
    for point in study.points():
        folder = point_json(store.paths, point.record)["artifact"]
        assert folder is not None
        verify(Path(folder))


def test_a_damaged_artifact_is_not_exported(
    finished: tuple[Path, list[Progress], int], study: autoprune.Study, tmp_path: Path
) -> None:
    store = StudyStore.open("own")
    point = study.points()[-1]
    model = Path(point_json(store.paths, point.record)["artifact"]) / "model.onnx"
    whole = model.read_bytes()
    try:
        model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(StorageError, match=r"model\.onnx"):
            autoprune.Point("own", point.record).export(tmp_path / "out")
    finally:
        model.write_bytes(whole)


def test_the_report_and_the_plot_are_there(study: autoprune.Study) -> None:
    assert all(path.is_file() for path in study.report())
    assert study.plot().axes


def test_a_finished_study_is_not_searched_again(study: autoprune.Study) -> None:
    before = len(study.records())
    train, test = digits()
    events: list[Progress] = []
    for _ in range(2):  # the first call must not keep the study locked
        autoprune.search(
            trained(),
            (train, test),
            budget="3trials",
            study="own",
            space="quick",
            progress=events.append,
            front_points=2,
            final_share=0.2,
        )
    assert [event.phase for event in events] == ["done", "done"]
    assert len(autoprune.open_study("own").records()) == before


def test_a_larger_budget_continues_a_finished_study(
    finished: tuple[Path, list[Progress], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0], tmp_path / "studies" / "own")
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(tmp_path / "studies"))
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(finished[0].parent.parent / "cache"))
    measure_briefly(monkeypatch)
    before = autoprune.open_study("own").records()
    study = autoprune.search(
        trained(), guarded(), budget="5trials", study="own", space="quick", front_points=2, final_share=0.2
    )
    records = study.records()
    first, second = ([r for r in records if r.round == number] for number in (1, 2))
    assert [r.number for r in before] == [r.number for r in records[: len(before)]]
    # So small a space may have nothing more to gain before the fifth.
    proposed = [r for r in records if r.fidelity == "search" and r.recipe and r.recipe.prunes]
    assert 3 <= len(proposed) <= 5
    assert {r.parent for r in second} >= {r.parent for r in first if r.recipe and r.recipe.prunes} | {0}
    assert len({r.parent for r in second}) == len(second)
    # What the first budget trained is trained on, never from the start again.
    steps = {r.parent: r.train_steps for r in first}
    assert all(r.train_steps >= steps.get(r.parent, 0) for r in second)
    assert {point.record.round for point in study.points()} == {2}
    assert all(point_json(StudyStore.open("own").paths, p.record)["artifact"] for p in study.points())
    assert not list((study.path / "artifacts").glob("*-recovered*"))


def own_workload(model: nn.Module, data: object, **options: bool) -> Workload:
    config = make_config({"model": "Sequential", "data": "given", "study": "own"})
    return workload_from_objects(model, data, config=config, **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("study")
def test_other_content_under_the_same_name_is_refused() -> None:
    store = StudyStore.open("own")
    space = load_space("quick")
    train, test = guarded()
    check_same_inputs(store, own_workload(trained(), (train, test)), space)
    with pytest.raises(UsageError, match="the data of study 'own' changed"):
        check_same_inputs(store, own_workload(trained(), (train, Guarded(test, len(test) - 1))), space)
    other = trained()
    with torch.no_grad():
        next(iter(other.parameters())).mul_(1.01)
    with pytest.raises(UsageError, match="the network of study 'own' changed"):
        check_same_inputs(store, own_workload(other, (train, test)), space)
    edited = space.model_copy(update={"width": space.width * 2})
    with pytest.raises(UsageError, match="the search space of study 'own' changed"):
        check_same_inputs(store, own_workload(trained(), (train, test)), edited)


@pytest.mark.usefixtures("study")
def test_a_resumed_study_takes_the_dense_network_that_it_trained() -> None:
    store = StudyStore.open("own")
    keeper = Timekeeper(Budget(trials=1), 0.6, FakeClock())
    untrained = own_workload(network(), guarded(), train_dense=True)
    workload = with_trained_dense(
        store, untrained, make_config({"model": "x", "data": "given"}), keeper, Interrupt(), ignore
    )
    assert workload.dense_trained
    for name, tensor in trained().state_dict().items():
        assert torch.equal(workload.model.state_dict()[name], tensor)
