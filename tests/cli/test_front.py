"""The verbs ``front``, ``studies`` and ``report`` on a study whose figures are known."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from autoprune.api import open_study
from autoprune.cli.main import main
from autoprune.config import Limits, StudyConfig, make_config
from autoprune.measure.record import Capability, Executed, Latency, Measurement, RunFigures
from autoprune.naming import StudyPaths
from autoprune.report.table import print_front
from autoprune.space.recipe import GroupChoice, Recipe
from autoprune.study.decode import Plan
from autoprune.study.front import dense_record
from autoprune.study.store import StudyStore

POINT_NAMES = {
    "trial", "accuracy", "accuracy_search", "latency_ms", "latency_ratio", "latency_ratio_ci", "size_bytes",
    "size_ratio", "params", "macs", "recipe", "artifact", "memory_bytes", "cold_start_ms", "throughput_per_s",
    "throughput_batch", "energy_mj",
}  # fmt: skip


def measured(accuracy: float, ratio: float, size: float) -> Measurement:
    score = Capability(name="accuracy", value=accuracy, ci=(accuracy - 0.01, accuracy + 0.01), examples=1000)
    low, high = ratio - 0.02, ratio + 0.02
    return Measurement(
        search=Capability(name="accuracy", value=accuracy + 0.05, ci=(0.5, 1.0), examples=500),
        report=score,
        latency=Latency(
            latency_ms=10 * ratio,
            latency_p95_ms=None,
            dense_ms=10.0,
            ratio=ratio,
            ratio_ci=(low, high),
            samples=50,
            noisy=False,
        ),
        size_bytes=int(4_000_000 * size),
        size_ratio=size,
        params=1000,
        macs=2000,
        executed=Executed(layers=4, int8_layers=1, asked_int8=1, operators={"Conv": 3}),
        parity_error=0.0,
        figures=RunFigures(
            memory_bytes=int(30_000_000 * size),
            cold_start_ms=200 * size,
            throughput_per_s=100 / ratio,
            throughput_batch=16,
            missing={"energy_mj": "no counter"},
            dense=RunFigures(memory_bytes=30_000_000, cold_start_ms=200.0, throughput_per_s=100.0),
        ),
    )


@pytest.fixture
def study() -> str:
    """A study with the dense network, a dominated point and two points on the front."""
    config = make_config({"model": "tiny", "data": "none", "study": "known"})
    store = StudyStore.create_or_resume(config, StudyPaths.of("known"))
    for origin, ratio, figures in (
        ("dense", 0.0, (0.90, 1.00, 1.00)),
        ("baseline", 0.25, (0.85, 0.70, 0.70)),
        ("tpe", 0.5, (0.89, 0.60, 0.60)),
        ("tpe", 0.7, (0.80, 0.30, 0.25)),
    ):
        trial = store.ask()
        recipe = Recipe(groups={"a": GroupChoice(ratio=ratio)})
        label = {"dense": "dense", "baseline": "uniform 0.25"}.get(origin, "")
        store.begin(trial, Plan(recipe, origin, label))
        store.complete(trial, measured(*figures), train_steps=10, duration_s=1.0)
    trial = store.ask()
    store.begin(trial, Plan(Recipe(), "tpe"))
    store.fail(trial, "nan", "capability is nan", duration_s=1.0)
    store.release()
    return "known"


def object_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_is_one_object_with_the_names_of_the_contract(
    study: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = object_of(["front", study], capsys)
    assert {"study", "dense", "points"} <= set(found)
    assert found["study"] == "known"
    for point in [found["dense"], *found["points"]]:
        assert set(point) >= POINT_NAMES
    assert [point["trial"] for point in found["points"]] == [0, 2, 3]
    assert found["dense"]["accuracy"] == 0.90
    best = found["points"][1]
    assert (best["accuracy"], best["accuracy_search"]) == (0.89, pytest.approx(0.94))
    assert (best["latency_ms"], best["latency_ratio"], best["latency_ratio_ci"]) == (6.0, 0.6, [0.58, 0.62])
    assert (best["size_bytes"], best["size_ratio"]) == (2_400_000, 0.6)
    assert (best["memory_bytes"], best["cold_start_ms"]) == (18_000_000, 120.0)
    assert (best["dense_memory_bytes"], best["dense_cold_start_ms"]) == (30_000_000, 200.0)
    assert (best["throughput_batch"], best["energy_mj"], best["energy_source"]) == (16, None, None)
    assert best["not_measured"] == {"energy_mj": "no counter"}
    assert best["recipe"]["groups"] == {"a": {"ratio": 0.5, "bits": 32, "criterion": ""}}


@pytest.mark.parametrize(
    ("limits", "trials"),
    [
        ([], [0, 2, 3]),
        (["--max-drop", "0.02"], [0, 2]),
        (["--min-accuracy", "0.895"], [0]),
        (["--max-latency-ms", "6.5"], [2, 3]),
        (["--max-latency-ratio", "0.5"], [3]),
        (["--max-size-mb", "1.0"], [3]),
        (["--max-drop", "0.02", "--max-size-mb", "3"], [2]),
    ],
)
def test_limits(study: str, limits: list[str], trials: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    found = object_of(["front", study, *limits], capsys)
    assert [point["trial"] for point in found["points"]] == trials


def test_the_knee_is_one_point(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(object_of(["front", study, "--knee"], capsys)["points"]) == 1


def test_limits_that_nothing_keeps_exit_3_and_name_the_nearest(
    study: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["front", study, "--max-size-mb", "0.5"]) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "0.5" in shown.err and "1" in shown.err


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "x"])
def test_limits_that_are_none(study: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["front", study, f"--max-drop={value}"]) == 2
    assert "max-drop" in capsys.readouterr().err


def test_the_table_shows_every_point_and_marks_baselines(
    study: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["front", study, "--max-latency-ratio", "0.65"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.split() and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["0", "2", "3"]
    assert "dense (baseline)" in next(line for line in lines if "dense (" in line)
    assert {"0.8900", "0.600", "2.400", "1/4"} <= set(rows[1])
    # Memory, cold start, throughput; there is no column for what nobody measured, but a line that says why.
    assert rows[1][-3:] == ["18.0", "120.0", "166.7"]
    assert lines[-1] == "Not measured: energy (no counter)."


def test_a_narrow_terminal_shows_no_further_figures(study: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    found = open_study(study)
    for columns, shown in ((100, False), (240, True)):
        stream = Terminal()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", str(columns))
            print_front(found.points(), dense_record(found.records()), stream)
        assert ("start ms" in stream.getvalue()) == shown


def test_csv_has_one_row_for_each_point(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["front", study, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["trial"] for row in rows] == ["0", "2", "3"]
    assert float(rows[1]["size_ratio"]) == 0.6
    assert (rows[1]["cold_start_ms"], rows[1]["energy_mj"]) == ("120.0", "")
    assert rows[1]["not_measured"] == "energy_mj: no counter"


def test_studies_are_listed(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["studies", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["study"], entry["model"], entry["trials"], entry["failed"]) == ("known", "tiny", 5, 1)
    assert main(["studies"]) == 0
    assert "known" in capsys.readouterr().out


def test_no_studies_are_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["studies"]) == 0
    assert "no studies" in capsys.readouterr().out


def test_a_study_that_is_not_there_answers_with_near_matches(
    study: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["front", "knwon"]) == 2
    assert "unknown study 'knwon'; did you mean 'known'?" in capsys.readouterr().err


def test_a_damaged_database_is_a_storage_fault(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    StudyPaths.of(study).database.write_bytes(b"not a database" * 100)
    for log in Path(StudyPaths.of(study).root).glob("study.db-*"):
        log.unlink()
    assert main(["front", study]) == 4
    assert "Traceback" not in capsys.readouterr().err


def test_an_interrupted_search_shows_what_there_is_and_exits_130(
    study: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autoprune.api.run_search", interrupted)
    words = ["search", "--model", "cifar_resnet20", "--data", "digits", "--json", "--study"]
    assert main([*words, study]) == 130
    shown = capsys.readouterr()
    assert len(json.loads(shown.out)["points"]) == 3
    assert "interrupted; the same command again resumes" in shown.err
    assert main([*words, "unborn"]) == 130
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("limit", "code"), [("0.001", 3), ("1.0", 0)])
def test_a_search_whose_limits_no_point_keeps_says_so(
    study: str, limit: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from autoprune import api

    given: list[Limits] = []

    def found(config: StudyConfig, **_: object) -> api.Study:
        given.append(config.limits)
        return api.open_study(study)

    monkeypatch.setattr(api, "run_search", found)
    words = ["search", "--model", "cifar_resnet20", "--data", "digits", "--max-size-mb", limit, "--quiet"]
    assert main(words) == code
    assert given == [Limits(max_size_mb=float(limit))]
    shown = capsys.readouterr()
    assert "dense" in shown.out
    assert ("size_mb: asked at most 0.001" in shown.err) == (code == 3)


def reported(trial: int, **more: object) -> dict[str, object]:
    return {
        "study": "known", "trial": trial, "target": "onnxruntime", "model_sha256": "0" * 64,
        "metric": "accuracy", "accuracy": 0.7,
        "accuracy_ci": [0.6, 0.8], "examples": 100, "latency_ms": 2.0, "dense_latency_ms": 8.0, "latency_ratio": 0.25,
        "latency_ratio_ci": [0.2, 0.3], "size_bytes": 1000, "size_ratio": 0.5, **more,
    }  # fmt: skip


@pytest.mark.parametrize("form", ["object", "list", "lines"])
def test_a_front_is_ranked_by_measurements_that_were_made_elsewhere(
    study: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "measured.json"
    # There the two trials change places: the milder one is slower, larger and worse.
    entries = [
        reported(3, accuracy=0.88),
        reported(2, latency_ratio=0.9, latency_ratio_ci=[0.85, 0.95], size_ratio=0.9),
    ]
    texts = {
        "object": json.dumps(entries[0]),
        "list": json.dumps(entries),
        "lines": "\n".join(map(json.dumps, entries)),
    }
    file.write_text(texts[form], encoding="utf-8")
    found = object_of(["front", study, "--measurements", str(file)], capsys)
    assert [point["trial"] for point in found["points"]] == [0, 3]
    assert (found["points"][1]["accuracy"], found["points"][1]["latency_ratio"]) == (0.88, 0.25)
    assert found["dense"]["latency_ms"] == 8.0
    before = object_of(["front", study], capsys)
    assert [point["trial"] for point in before["points"]] == [0, 2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", "line 1 is no JSON"),
        ("[]", "holds no measurement"),
        ("[1]", "measurement 1 is no object"),
        (json.dumps(reported(3, study="other")), "not of a measured trial of 'known'"),
        (json.dumps(reported(99)), "not of a measured trial"),
        (json.dumps(reported(3, latency_ms=-1)), "latency_ms = -1"),
        (json.dumps({"trial": 3}), "latency_ratio is required"),
        (json.dumps(reported(3, metric=[])), "value"),
        (json.dumps(reported(3, latency_ratio_ci=[0.1, float("nan")])), "latency_ratio_ci"),
        (json.dumps(reported(3, target="openvino")), "is of target 'openvino', the front of 'onnxruntime'"),
        (json.dumps([reported(3), reported(3)]), "another one of trial 3"),
    ],
)
def test_measurements_that_cannot_be_read_back(
    study: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "measured.json"
    file.write_text(content, encoding="utf-8")
    assert main(["front", study, "--measurements", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_measurements_of_another_file_are_refused(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = StudyPaths.of(study).artifact(3)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"model.onnx": "1" * 64}), encoding="utf-8")
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(reported(3)), encoding="utf-8")
    assert main(["front", study, "--measurements", str(file)]) == 2
    assert "another model file" in capsys.readouterr().err


def test_a_target_that_the_study_does_not_have(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["front", study, "--target", "openvino"]) == 2
    assert "unknown target 'openvino'" in capsys.readouterr().err
