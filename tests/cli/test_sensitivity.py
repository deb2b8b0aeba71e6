"""Verb `sensitivity`: what it prints, writes and refuses, from an analysis whose figures are known."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from autoprune.cli.main import main
from autoprune.report.sensitivity_view import sensitivity_figure
from autoprune.search import sensitivity
from autoprune.search.curves import Analysis, Cut, Measured
from autoprune.search.interrupt import Interrupt

WORDS = ["sensitivity", "--model", "cifar_resnet20", "--data", "digits", "--quiet", "--ratios", "0.5,0.1"]


def known(groups: int = 3, *, complete: bool = True) -> Analysis:
    """Group ``i`` loses ``i`` points at 0.1 and ten times as much at 0.5 ; the first has a block."""
    made = tuple(Measured(name=f"g{i}", type="conv", units=10, block="b" * (i == 0)) for i in range(groups))
    cuts = [
        Cut(group=f"g{i}", criterion="l2", kept=kept, accuracy=0.9 - i * lost, divergence=i * lost)
        for i in range(groups)
        for kept, lost in ((9, 0.01), (5, 0.1))
    ]
    cuts.append(Cut(group="g0", criterion="", kept=0, accuracy=0.6, divergence=1.0))
    return Analysis(
        metric="accuracy", measure="divergence", recover="none", dense=0.9, uncut=0.9, examples=100, ratios=(0.1, 0.5),
        criteria=("l2",), groups=made, cuts=tuple(cuts), complete=complete,
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def analyse(*given: Any) -> Analysis:
        calls.append(given)
        return known()

    monkeypatch.setattr(sensitivity, "analyse", analyse)
    return calls


def test_json_table_and_files(
    asked: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "--criteria", "l2", "--recover", "closed_form", "--to", str(tmp_path / "new")]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert asked[0][1:4] == ((0.1, 0.5), ("l2",), "closed_form")
    assert found["most_sensitive"] == ["g2"] and found["least_sensitive"] == ["g0"]
    assert [c["ratio_at_one_point"] for c in found["curves"]] == [
        None,
        pytest.approx(0.1),
        pytest.approx(0.05),
    ]
    assert found["curves"][0]["block_drop"] == pytest.approx(0.3)
    rows = list(csv.DictReader((tmp_path / "new" / "sensitivity.csv").open(encoding="utf-8")))
    assert len(rows) == 7
    assert {row["group"]: float(row["drop"]) for row in rows if row["kept"] == "5"} == pytest.approx(
        {"g0": 0.0, "g1": 0.1, "g2": 0.2}
    )
    assert [row["block"] for row in rows if row["kept"] == "0"] == ["b"]
    assert (tmp_path / "new" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert main(words) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["g0", "10", "l2", ">0.50", "0.0", "0.0", "30.0"] in lines
    assert ["g2", "10", "l2", "0.05", "2.0", "20.0"] in lines
    assert 'most_sensitive   ["g2"]' in printed


def test_an_interruption_writes_what_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: Any) -> Analysis:
        interrupt = given[-1]
        assert isinstance(interrupt, Interrupt)
        interrupt.requested = True
        return known(complete=False)

    monkeypatch.setattr(sensitivity, "analyse", interrupted)
    assert main([*WORDS, "--to", str(tmp_path), "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["complete"] is False
    assert (tmp_path / "sensitivity.csv").is_file() and (tmp_path / "sensitivity.png").is_file()


def test_sixty_groups_stay_readable() -> None:
    figure = sensitivity_figure(known(60))
    figure.draw_without_rendering()
    left, right = figure.subfigs
    labels = left.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels][:2] == ["g0 (10)", "g1 (10)"] and len(labels) == 60
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 0.5 for low, high in zip(boxes, boxes[1:], strict=False)), (
        "no label on another"
    )
    assert len(right.axes[0].get_lines()) == 8 + 1, "eight curves and the line at one point"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ratios", "0.5,1"], "--ratios '0.5,1' cannot be used"),
        (["--ratios", "a"], "--ratios 'a' cannot be used"),
        (["--ratios", ""], "--ratios '' cannot be used"),
        (["--criteria", "l2,talyor"], "did you mean 'taylor'"),
        (["--recover", "closed"], "did you mean 'closed_form'"),
        (["--to", __file__], "allowed: a folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    asked: list[tuple[Any, ...]], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, *words]) == 2
    assert message in capsys.readouterr().err
    assert asked == []
