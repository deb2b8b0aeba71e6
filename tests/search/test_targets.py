"""Several targets in one study: files, figures and fronts for each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import autoprune
from autoprune.api import Study
from autoprune.cli.main import main
from autoprune.compress.pipeline import Compressed
from autoprune.deploy.runtime import Artifact
from autoprune.errors import ExportError, UsageError
from autoprune.exporting import export_point
from autoprune.naming import file_name_of
from autoprune.report.view import view_of
from autoprune.search.bench import Bench
from autoprune.space.recipe import Recipe
from autoprune.study.artifacts import artifact_folder
from autoprune.target import RUNTIMES, Target
from tests.conftest import measure_briefly

SECOND = "openvino" if RUNTIMES["openvino"].installed else "onnxruntime:batch=2"
THIRD = "onnxruntime:batch=3"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """A study on three targets, the last of which takes the dense network alone."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(300, 1, 8, 8, generator=generator)
    labels = (images.mean((1, 2, 3)) > 0).long()
    data = (TensorDataset(images[:200], labels[:200]), TensorDataset(images[200:], labels[200:]))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2)
    )
    deploy = Bench.deploy_on

    def picky(bench: Bench, target: Target, network: Compressed, recipe: Recipe, folder: Path) -> Artifact:
        if target.spec == THIRD and recipe.groups:
            raise ExportError("no kernel for this")
        return deploy(bench, target, network, recipe, folder)

    patch = pytest.MonkeyPatch()
    for name in ("AUTOPRUNE_STUDIES", "AUTOPRUNE_CACHE"):
        patch.setenv(name, str(tmp_path_factory.mktemp("folder")))
    measure_briefly(patch)
    patch.setattr(Bench, "deploy_on", picky)
    yield autoprune.search(
        model, data, budget="1trials", study="two", target=f"onnxruntime,{SECOND},{THIRD}", sampler="random",
        space="int8", calibration_examples=16,
    )  # fmt: skip
    patch.undo()


@pytest.fixture(autouse=True)
def own_folders(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the place of the fixture that gives every test folders of its own."""
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(study.path.parent))


def test_every_point_is_built_scored_and_timed_on_each_target(study: Study) -> None:
    assert study.targets == ("onnxruntime", SECOND, THIRD)
    finals = [r for r in study.records() if r.fidelity == "final"]
    numbers = {point.record.number for point in study.on(SECOND).points()}
    assert numbers <= {r.number for r in finals}
    for record in finals:
        assert record.measurement is not None
        measured = record.measurement.elsewhere[SECOND]
        assert measured.report is not None
        assert measured.latency.dense_ms != record.measurement.latency.dense_ms
    dense = next(r for r in finals if r.label == "dense")
    assert dense.measurement is not None
    assert dense.measurement.elsewhere[SECOND].size_ratio == 1.0
    name = file_name_of(SECOND)
    for file in ("report.html", "front.png", "front.csv", f"report-{name}.html", f"front-{name}.csv"):
        assert (study.path / file).is_file()


def test_a_front_is_told_of_the_target_asked_for(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["front", "two", "--target", SECOND, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["target"], found["targets"]) == (SECOND, ["onnxruntime", SECOND, THIRD])
    points = study.on(SECOND).points()
    assert [point["trial"] for point in found["points"]] == [point.record.number for point in points]
    last = found["points"][-1]
    assert last["latency_ms"] == points[-1].measurement.latency.latency_ms
    assert last["export_command"].endswith(f"--target {SECOND} --to DIR")
    assert Path(last["artifact"]).parent.name == "targets"


def test_what_was_measured_elsewhere_is_of_the_target_asked_for(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    point = study.on(SECOND).points()[-1]
    path = artifact_folder(study.on(SECOND).paths, point.record) / "model.onnx"
    entry = {
        "study": "two", "trial": point.record.number, "target": SECOND,
        "model_sha256": sha256(path.read_bytes()).hexdigest(), "metric": "accuracy", "accuracy": 0.7,
        "accuracy_ci": [0.6, 0.8], "examples": 100, "latency_ms": 2.0, "dense_latency_ms": 8.0, "latency_ratio": 0.25,
        "latency_ratio_ci": [0.2, 0.3], "size_bytes": 1000, "size_ratio": 0.5,
    }  # fmt: skip
    file = tmp_path / "there.json"
    file.write_text(json.dumps(entry), encoding="utf-8")
    asked = ["front", "two", "--measurements", str(file), "--json"]
    assert main(asked) == 2
    assert f"give --target {SECOND}" in capsys.readouterr().err
    assert main([*asked, "--target", SECOND]) == 0
    assert json.loads(capsys.readouterr().out)["points"][-1]["latency_ms"] == 2.0
    whole = artifact_folder(study.paths, point.record) / "model.onnx"
    file.write_text(
        json.dumps({**entry, "model_sha256": sha256(whole.read_bytes()).hexdigest()}), encoding="utf-8"
    )
    if whole.read_bytes() != path.read_bytes():
        assert main([*asked, "--target", SECOND]) == 2


def test_an_export_is_of_the_target_asked_for(study: Study, tmp_path: Path) -> None:
    last = study.points()[-1].record.number
    folder = export_point("two", last, tmp_path / "out", SECOND)
    content = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    assert content["settings"]["target"]["runtime"] == SECOND.partition(":")[0]
    assert (content["study"], content["trial"]) == ("two", last)
    assert (folder / "dense.onnx").is_file()
    with pytest.raises(UsageError, match="no artifact for target"):
        export_point("two", last, tmp_path / "more", THIRD)


def test_a_network_that_one_target_refuses_keeps_its_figures_of_the_others(study: Study) -> None:
    assert len(study.points()) >= 2
    assert [point.record.label for point in study.on(THIRD).points()] == ["dense"]
    assert view_of(study.on(THIRD)._store).failures()["there: export"] >= 1
    assert view_of(study._store).failures() == {}
    notes = study._store.notes()
    assert any(key.startswith("target_failure:") and "no kernel" in text for key, text in notes.items())
