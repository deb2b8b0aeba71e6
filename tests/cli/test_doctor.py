"""The verb ``doctor`` with tables that were measured before, and with a measurement that is made up."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from autoprune.cli import doctor as module
from autoprune.cli.main import main
from autoprune.errors import ExportError
from autoprune.measure import truth
from autoprune.measure.truth_table import TruthTable, WidthTime, write_table
from autoprune.target import Target
from tests.measure.test_truth import entry, table

WIDTHS = tuple(
    WidthTime(operator="conv 3x3", kind="conv", format="float", channels=c, ratio=-(-c // 16) * 16 / 80,
              ratio_ci=(0.1, 2.0))
    for c in (48, 56, 63, 64, 72, 80)
)  # fmt: skip


def known(**changes: Any) -> TruthTable:
    stored = {
        "ran": {"float32": 3},
        "real": False,
        "ratio": 1.01,
        "ratio_ci": (0.98, 1.03),
        "size_ratio": 0.14,
    }
    return table(
        entries=(
            entry(operator="conv 3x3", size_ratio=0.26),
            entry(operator="conv 3x3", format="int8, 4 bit weights", bits=4, size_ratio=0.14),
            entry(operator="conv 3x3", format="4 bit weights", bits=4, activation_bits=32, **stored),
            entry(operator="conv depthwise", ratio=1.4, ratio_ci=(1.3, 1.5), size_ratio=0.7),
            entry(operator="linear", format="dynamic int8", variant="dynamic", ran={}, real=False, ratio=None,
                  ratio_ci=None, refused="it has none"),
        ),
        widths=WIDTHS,
        complete=True,
        **changes,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs here is another test's."""
    found = [{"name": "onnxruntime", "usable": True, "bits": [32, 8], "note": "fine"},
             {"name": "openvino", "usable": False, "bits": [], "note": "pip install openvino"}]  # fmt: skip
    monkeypatch.setattr(module, "_probe_targets", lambda: found)


def shown(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert main(["doctor", *words]) == code
    return capsys.readouterr().out


def test_a_table_of_this_machine_is_shown_without_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    assert "`autoprune doctor --measure` tells what is faster here" in shown([], capsys)
    write_table(known(), Target())
    text = shown([], capsys)
    rows = {" ".join(line.split()) for line in text.splitlines()}
    assert "conv 3x3, 64 channels int8 int8 (3) 0.500 0.400 to 0.600 faster 0.260" in rows
    assert (
        "conv 3x3, 64 channels int8, 4 bit weights int8 (3) 0.500 0.400 to 0.600 faster, as int8 0.140"
        in rows
    )
    assert any("storage only (no difference)" in row for row in rows)
    assert any(row.startswith("conv depthwise") and "slower" in row for row in rows)
    assert any(row.endswith("refused: it has none -") for row in rows)
    assert "width: 16" in text


def test_scripts_get_verdicts_and_the_width(capsys: pytest.CaptureFixture[str]) -> None:
    write_table(known(), Target())
    (found,) = json.loads(shown(["--json"], capsys))["truth"]
    assert (found["target"], found["width"]) == ("onnxruntime", 16)
    assert [e["verdict"] for e in found["entries"]] == ["faster", "faster", "no difference", "slower", None]
    assert [e["same_as"] for e in found["entries"]] == [None, "int8", None, None, None]
    assert found["steps"] == [{"operator": "conv 3x3", "format": "float", "step": 16}]


def test_tables_and_pictures_are_written_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = Target(batch=4)
    write_table(known(), Target())
    write_table(table(target), target)
    text = shown(["--to", str(tmp_path / "to"), "--target", "onnxruntime"], capsys)
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == [
        "truth-onnxruntime.csv",
        "truth-onnxruntime.png",
    ]
    assert str(tmp_path / "to" / "truth-onnxruntime.png") in text
    with Image.open(tmp_path / "to" / "truth-onnxruntime.png") as picture:
        assert picture.size[0] > 1000
    rows = list(csv.DictReader((tmp_path / "to" / "truth-onnxruntime.csv").open()))
    assert (rows[0]["format"], rows[0]["verdict"], rows[0]["ran"]) == ("int8", "faster", "int8=3")
    assert float(rows[0]["ratio_ci_high"]) == 0.6
    # A table without any entries is drawn too.
    assert "batch4" in shown(["--to", str(tmp_path / "to"), "--target", "onnxruntime:batch=4"], capsys)


def test_what_is_usable_is_measured_with_progress_and_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str]] = []

    def measure(target: Target, thoroughness: str, *, say: truth.Say, keep: truth.Keep) -> TruthTable:
        asked.append((target.spec, thoroughness))
        say("conv 3x3 (1 of 7)")
        keep(known())
        return known()

    monkeypatch.setattr(truth, "measure_truth", measure)
    assert main(["doctor", "--measure"]) == 0
    streams = capsys.readouterr()
    assert streams.err == "[measure] | onnxruntime: conv 3x3 (1 of 7)\n"
    assert "width: 16" in streams.out
    assert main(["doctor", "--measure", "--full", "--target", "onnxruntime:batch=2", "--quiet"]) == 0
    assert asked == [("onnxruntime", "quick"), ("onnxruntime:batch=2", "full")]


def test_what_a_probe_calls_a_target_is_measured_once_for_all_its_precisions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["onnxruntime", "torch", "torch:bfloat16"]
    found = [{"name": name, "usable": True, "bits": [32], "note": ""} for name in names]
    monkeypatch.setattr(module, "_probe_targets", lambda: found)
    asked: list[str] = []

    def measure(target: Target, *rest: Any, **more: Any) -> TruthTable:
        asked.append(target.spec)
        if target.runtime == "onnxruntime":
            raise ExportError("its exporter is broken", "mend it")
        return known()

    monkeypatch.setattr(truth, "measure_truth", measure)
    assert main(["doctor", "--measure", "--quiet"]) == 5  # what fails is told once the others are measured
    assert asked == ["onnxruntime", "torch"]
    assert "onnxruntime cannot be measured" in capsys.readouterr().err


def test_ctrl_c_keeps_and_shows_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(target: Target, thoroughness: str, *, say: truth.Say, keep: truth.Keep) -> TruthTable:
        keep(known().model_copy(update={"complete": False}))
        raise KeyboardInterrupt

    monkeypatch.setattr(truth, "measure_truth", measure)
    text = shown(["--measure"], capsys, code=130)
    assert "faster" in text and "not complete" in text


def test_a_target_that_cannot_be_measured_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(target: Target, *rest: Any, **more: Any) -> TruthTable:
        raise ExportError("its exporter is broken", "mend it")

    monkeypatch.setattr(truth, "measure_truth", measure)
    assert main(["doctor", "--measure"]) == 5
    assert "onnxruntime cannot be measured: its exporter is broken" in capsys.readouterr().err
