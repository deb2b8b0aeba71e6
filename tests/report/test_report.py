"""Reports: the figures are in them, names cannot break out of them, nothing is loaded from elsewhere."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from autoprune.report import page
from autoprune.report.card import card_text
from autoprune.report.html import report_page, script_json
from autoprune.report.plot import staircase
from autoprune.report.table import write_csv
from autoprune.report.view import view_of
from autoprune.report.writing import write_report
from autoprune.search.space_cut import SpaceCut
from autoprune.space.mask import Mask
from autoprune.space.quantization import Bits, Quantization
from autoprune.space.recipe import GroupChoice, Recipe
from tests.report.studies import EVIL, make_study


def without_plotly(text: str) -> str:
    """Return the page without plotly's own source, which is not ours to judge."""
    from plotly.offline import get_plotlyjs

    assert get_plotlyjs() in text
    return text.replace(get_plotlyjs(), "")


def test_the_page_holds_every_point_and_what_to_make_of_it(tmp_path: Path) -> None:
    store = make_study(tmp_path / "study")
    text = without_plotly(report_page(store))
    for record in store.records():
        if record.fidelity == "final" and record.measurement and record.measurement.report:
            assert f"autoprune export study --trial {record.number} --to DIR" in text
            assert f"{record.measurement.report.value:.4f}" in text
    assert "winner&#x27;s curse" in text
    assert "may have been trained on images of the search split" in text
    assert "Not so: head: it runs in float (in 1 of " in text
    assert "1 final: parity, 1 nan" in text
    assert "Test CPU" in text


def test_the_page_shows_what_else_was_measured_and_why_the_rest_was_not(tmp_path: Path) -> None:
    text = without_plotly(report_page(make_study(tmp_path / "study")))
    assert all(f">{name}</button>" in text for name in ("memory MB", "start ms", "per s"))
    assert ">mJ</button>" not in text
    assert '<td data-key="250.0">250.0</td>' in text  # the dense network's examples per second
    assert "Not measured: energy (there is no counter)." in text
    early = without_plotly(report_page(make_study(tmp_path / "early", final=False)))
    assert ">start ms</button>" not in early
    assert "Of trials peak memory alone is measured" in early


def test_the_page_says_which_choices_bring_no_time(tmp_path: Path) -> None:
    store = make_study(tmp_path / "study")
    assert "Search space" not in without_plotly(report_page(store))
    cut = SpaceCut(lines=("left out: bits 4 of conv layers: they run in int8", "width 16: measured"))
    store.notes()["space_cut"] = cut.model_dump_json()
    text = without_plotly(report_page(store))
    assert (
        "<dt>Search space</dt><dd>left out: bits 4 of conv layers: they run in int8; width 16: measured.</dd>"
        in text
    )


def test_markup_in_names_stays_text(tmp_path: Path) -> None:
    text = without_plotly(report_page(make_study(tmp_path / "study", evil=True)))
    assert "<script>alert" not in text
    # Only the data, plotly and the page's own script end one.
    assert text.count("</script>") == 3
    assert "&lt;/script&gt;" in text


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    text = without_plotly(report_page(make_study(tmp_path / "study")))
    assert not re.search(r"(?:src|href|action)\s*=\s*[\"']?\s*(?:https?:)?//", text)
    assert not re.search(r"@import|url\((?!data:)", page.STYLE)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("value", ["</script>", "<!--", "\u2028", {"a": [EVIL]}])
def test_json_in_a_script_reads_back_and_cannot_end_it(value: object) -> None:
    text = script_json(value)
    assert "</" not in text
    assert "<!--" not in text
    assert json.loads(text) == value


def test_before_the_final_phase_the_page_says_so(tmp_path: Path) -> None:
    text = report_page(make_study(tmp_path / "study", final=False))
    assert "All figures are of the search split" in text


def test_all_files_are_written_and_the_table_has_the_front(tmp_path: Path) -> None:
    store = make_study(tmp_path / "study", evil=True)
    paths = write_report(store)
    assert {path.name for path in paths.values()} == {"report.html", "front.png", "front.csv"}
    assert paths["front.png"].read_bytes().startswith(b"\x89PNG")
    with paths["front.csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    members = [s.record.number for s in view_of(store).shown if s.point.on_front]
    assert sorted(int(row["trial"]) for row in rows) == sorted(members)
    left = {path.name for path in store.paths.root.iterdir()}
    assert left == {"report.html", "front.png", "front.csv", "env.json"}


def test_cells_that_a_spreadsheet_would_run_are_defused(tmp_path: Path) -> None:
    frame = pd.DataFrame({"label": ["=1+1", "-x", "fine"], "drop": [-0.5, 1.0, 2.0]})
    write_csv(frame, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["'=1+1", "'-x", "fine"]
    assert [float(row["drop"]) for row in rows] == [-0.5, 1.0, 2.0]


def test_the_card_holds_the_figures_and_the_commands(tmp_path: Path) -> None:
    store = make_study(tmp_path / "study")
    record = next(r for r in store.records() if r.fidelity == "final" and r.parent == 4)
    assert record.measurement is not None
    assert record.measurement.report is not None
    text = card_text(store, record)
    assert f"{record.measurement.report.value:.4f}" in text
    assert f"{record.measurement.latency.ratio:.3f}" in text
    assert "autoprune measure" in text
    assert "layer1.0.conv1" in text
    figures = record.measurement.figures
    assert f"| cold start, median | {figures.cold_start_ms:.1f} ms |  | 55.0 ms |" in text
    assert "examples/s (batch 8) |  | 250.0 examples/s (batch 8) |" in text
    assert "energy of one example" not in text
    assert "Not measured: energy (there is no counter)." in text
    assert "from opening the file to the first result" in text


def test_the_card_of_a_mixed_file_says_how_its_session_is_opened(tmp_path: Path) -> None:
    store = make_study(tmp_path / "study")
    record = next(r for r in store.records() if r.fidelity == "final" and r.measurement is not None)
    assert record.measurement is not None
    for int8_layers in (0, 18, 20):
        executed = record.measurement.executed.model_copy(update={"int8_layers": int8_layers, "layers": 20})
        measurement = record.measurement.model_copy(update={"executed": executed})
        text = card_text(store, record.model_copy(update={"measurement": measurement}))
        assert ("WeightBiasQuantization" in text) == (int8_layers == 18)


def test_the_card_says_that_masked_weights_run_dense(tmp_path: Path) -> None:
    store = make_study(tmp_path / "study")
    record = next(r for r in store.records() if r.fidelity == "final" and r.recipe is not None)
    masked = Recipe(groups={"stem": GroupChoice(sparsity=0.8)}, mask=Mask(pattern="1:5"))
    for recipe in (record.recipe, masked):
        text = card_text(store, record.model_copy(update={"recipe": recipe}))
        assert (
            "80% of `stem`. Masked weights are stored packed in the model file and run dense" in text
        ) == (recipe is masked)
        assert ("run dense" in text) == (recipe is masked)
        assert ("1 groups masked, 80% of weights" in text) == (recipe is masked)


def test_the_card_says_how_integers_were_made(tmp_path: Path) -> None:
    store = make_study(tmp_path / "study")
    record = next(r for r in store.records() if r.fidelity == "final" and r.recipe is not None)

    def card(bits: Bits, **how: object) -> str:
        recipe = Recipe(
            groups={"stem": GroupChoice(bits=bits)}, quantization=Quantization.model_validate(how)
        )
        return card_text(store, record.model_copy(update={"recipe": recipe}))

    text = card(
        4, rounding="gptq", block_size=32, equalize="cross_layer", activations="dynamic", half="bfloat16"
    )
    assert (
        "Integers: scales by minmax, rounding gptq, blocks of 32 weights, channels rescaled first (cross\\_layer), "
        "ranges of linear layers' inputs found at each inference." in text
    )
    assert "Weights: 16 bits are bfloat16." in card(16, half="bfloat16", rounding="gptq")
    assert "Integers" not in card(8, half="bfloat16")
    assert "Weights" not in card(32, half="bfloat16")


def test_stairs_rise() -> None:
    assert staircase([(0.5, 0.8), (0.4, 0.9), (0.6, 0.95), (0.7, 0.95)]) == [(0.4, 0.9), (0.6, 0.95)]
