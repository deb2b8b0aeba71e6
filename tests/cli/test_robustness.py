"""``--robustness`` of fronts, reports and artifacts, on a study of known networks on the digits."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.cli.main import main
from autoprune.config import StudyConfig, make_config
from autoprune.deploy.onnxruntime import OnnxRuntime
from autoprune.deploy.runtime import Formats
from autoprune.naming import StudyPaths
from autoprune.search import robustness as searched
from autoprune.search.bench import RECIPE_FILE
from autoprune.space.recipe import GroupChoice, Recipe
from autoprune.study.artifacts import commit_folder, temporary_folder
from autoprune.study.decode import Plan
from autoprune.study.robustness import RobustnessCache
from autoprune.study.store import StudyStore
from autoprune.workloads.data import load_data
from autoprune.workloads.workload import TOP1
from tests.cli.test_front import measured


class Templates(nn.Module):
    """The mean image of every class: an image is of the class whose mean it is nearest to; ``blind`` to one class."""

    def __init__(self, means: Tensor, blind: int | None) -> None:
        super().__init__()
        self.linear = nn.Linear(means[0].numel(), len(means))
        with torch.no_grad():
            flat = means.flatten(1)
            self.linear.weight.copy_(flat)
            self.linear.bias.copy_(-0.5 * flat.square().sum(1))
            if blind is not None:
                self.linear.bias[blind] -= 1e4

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.linear(x.flatten(1))
        return scores


def templates(config: StudyConfig) -> Tensor:
    inputs, targets = zip(*load_data(config).train.batches(200), strict=True)
    images, classes = torch.cat(inputs), torch.cat(targets)
    return torch.stack([images[classes == index].mean(0) for index in range(10)])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a whole classifier and one that never says 3."""
    folder = tmp_path_factory.mktemp("built")
    patch = pytest.MonkeyPatch()
    patch.setenv("AUTOPRUNE_CACHE", str(folder / "cache"))
    config = make_config(
        {"model": "cifar_resnet20", "data": "digits", "study": "known", "report_examples": 200}
    )
    means = templates(config)
    runtime = OnnxRuntime(config.target)
    runtime.prepare(Templates(means, None).eval(), means[:2])
    for name, blind in (("dense", None), ("blind", 3)):
        runtime.build(Templates(means, blind).eval(), folder / f"{name}.onnx", Formats(), [means])
    patch.undo()
    return folder


@pytest.fixture
def study(built: Path) -> StudyPaths:
    """A study with the dense network, one point that is blind to a class and one without artifact."""
    config = make_config(
        {"model": "cifar_resnet20", "data": "digits", "study": "known", "report_examples": 200}
    )
    paths = StudyPaths.of("known")
    store = StudyStore.create_or_resume(config, paths, fresh=False)
    store.note("data_content", load_data(config).fingerprint)
    for origin, ratio, figures in (
        ("dense", 0.0, (0.90, 1.00, 1.00)),
        ("tpe", 0.5, (0.85, 0.60, 0.60)),
        ("tpe", 0.7, (0.80, 0.30, 0.25)),
    ):
        trial = store.ask()
        store.begin(
            trial, Plan(Recipe(groups={"a": GroupChoice(ratio=ratio)}), origin, "dense" * (origin == "dense"))
        )
        store.complete(trial, measured(*figures), train_steps=0, duration_s=1.0)
    for number, name in ((0, "dense"), (1, "blind")):
        folder = temporary_folder(paths.artifacts)
        shutil.copy2(built / f"{name}.onnx", folder / "model.onnx")
        commit_folder(folder, paths.artifact(number))
    store.release()
    return paths


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_front_tells_what_each_point_lost(
    study: StudyPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = said(["front", "known", "--robustness"], capsys)
    dense, blind, gone = found["dense"]["robustness"], *(p["robustness"] for p in found["points"][1:])
    assert gone is None, "its artifact was not kept"
    assert dense["accuracy"] > 0.8
    assert set(dense["drop"]["corruptions"]) == {"gaussian_noise", "gaussian_blur", "contrast", "jpeg"}
    assert dense["drop"]["accuracy"] == 0.0
    assert blind["worst_class"] == 0.0
    assert blind["worst_class_is"]["index"] == 3
    assert blind["drop"]["worst_class"] == dense["worst_class"] > 0
    for name, severities in blind["corruptions"].items():
        assert list(severities) == ["1", "3", "5"]
        for severity, accuracy in severities.items():
            lost = dense["corruptions"][name][severity] - accuracy
            assert blind["drop"]["corruptions"][name][severity] == pytest.approx(lost)
    # The accuracy is that of the report split by the file itself.
    assert dense["examples"] == 200

    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing is measured twice, and nothing is loaded for it")

    monkeypatch.setattr(searched, "load_data", never)
    monkeypatch.setattr(searched, "measure_robustness", never)
    assert said(["front", "known", "--robustness"], capsys) == found
    assert main(["front", "known", "--robustness"]) == 0
    printed = capsys.readouterr().out
    assert "no artifact" in printed
    assert f"{dense['accuracy']:.4f} (+0.0000)" in printed


def test_a_report_gets_a_table_and_a_picture(study: StudyPaths, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(["report", "known", "--robustness"], capsys)
    assert [Path(path).name for path in found["files"]][-2:] == ["robustness.csv", "robustness.png"]
    rows = list(csv.DictReader((study.root / "robustness.csv").open(encoding="utf-8")))
    assert len(rows) == 2 * (1 + 4 * 3)
    blind = next(row for row in rows if row["trial"] == "1" and row["corruption"] == "none")
    assert (blind["worst_class"], float(blind["worst_class_accuracy"])) == ("3", 0.0)
    assert float(blind["accuracy_drop"]) > 0.03
    assert (study.root / "robustness.png").read_bytes().startswith(b"\x89PNG")


def test_another_file_or_other_data_is_measured_again_and_a_damaged_cache_too(
    study: StudyPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    first = said(["front", "known", "--robustness"], capsys)
    cache = RobustnessCache(study)
    entries = json.loads(study.robustness.read_text(encoding="utf-8"))
    assert len(entries) == 2
    assert cache.get(entries[0]["model"], entries[0]["data"]) is not None
    assert cache.get(entries[0]["model"], "other data") is None
    assert cache.get("other file", entries[0]["data"]) is None
    study.robustness.write_text("{not json", encoding="utf-8")
    assert said(["front", "known", "--robustness"], capsys) == first
    assert len(json.loads(study.robustness.read_text(encoding="utf-8"))) == 2


def test_a_damaged_artifact_and_changed_data_are_refused(
    study: StudyPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    model = study.artifact(1) / "model.onnx"
    model.write_bytes(model.read_bytes() + b"x")
    assert main(["front", "known", "--robustness"]) == 4
    assert "model.onnx differs" in capsys.readouterr().err
    store = StudyStore.open("known")
    store.note("data_content", "another")
    study.robustness.unlink()
    assert main(["front", "known", "--robustness"]) == 2
    assert "other content under the same name" in capsys.readouterr().err


def test_csv_and_robustness_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["front", "known", "--robustness", "--csv"]) == 2
    assert "--robustness and --csv exclude each other" in capsys.readouterr().err


@pytest.mark.slow
def test_an_artifact_is_compared_with_its_dense_network(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config({"model": "cifar_resnet20", "data": "digits", "report_examples": 100})
    folder = temporary_folder(tmp_path)
    for name, file in (("blind", "model.onnx"), ("dense", "dense.onnx")):
        shutil.copy2(built / f"{name}.onnx", folder / file)
    content = {
        "recipe": {}, "kept": {}, "metric": TOP1.name, "settings": config.identity(),
        "data_fingerprint": load_data(config).fingerprint,
    }  # fmt: skip
    (folder / RECIPE_FILE).write_text(json.dumps(content), encoding="utf-8")
    commit_folder(folder, tmp_path / "artifact")
    found = said(["measure", str(tmp_path / "artifact"), "--robustness"], capsys)
    own = found["robustness"]
    assert own["accuracy"] == found["accuracy"]
    assert own["worst_class"] == 0.0
    assert own["drop"]["worst_class"] > 0
    assert own["drop"]["corruptions"]["jpeg"]["5"] > 0
