"""Names of the user's own stay text: in the page, in its script's data, in the card, in CSV and in the terminal."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autoprune.cli.output import print_pairs, print_table, print_text
from autoprune.cli.rendering import show_csv
from autoprune.report.card import card_text
from autoprune.report.html import report_page
from autoprune.report.table import print_front, write_csv
from autoprune.study.front import all_points, to_frame
from autoprune.study.store import StudyStore
from tests.report import studies

NAMES = (
    "<script>canary()</script>",
    "</script><script>canary()</script>",
    "</title></style><img src=x onerror=canary()>",
    "\"><svg onload='canary()'>",
    "' onmouseover='canary()",
    "<!--<script>",
    "]]>",
    "&lt;script&gt;canary()",
    "javascript:canary()",
    "![x](http://canary/)",
    "[x](javascript:canary())",
    "`canary` | **x** | y",
    "=canary()|' /C calc'!A0",
    "+canary",
    "@canary",
    "-canary",
    "\u202ecanary",
    "\x1b[31mcanary",
)


class Reader(HTMLParser):
    """Collects what elements and attributes a page has, and what its scripts hold."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self._script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(sorted(name for name, _ in attrs))))
        self.values += [(name, value or "") for name, value in attrs]
        self._script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts.append(data)


def study(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> StudyStore:
    """Return a study with a name wherever the user, a network, a host or the data can put one."""
    monkeypatch.setattr(studies, "EVIL", name)
    store: Any = studies.make_study(folder, evil=True)
    store.trials = [
        record.model_copy(
            update={
                "label": record.label and name,
                "failure_reason": record.failure_reason and name,
                "measurement": record.measurement
                and record.measurement.model_copy(
                    update={
                        "search": record.measurement.search.model_copy(update={"name": name}),
                        "report": record.measurement.report
                        and record.measurement.report.model_copy(update={"name": name}),
                        "executed": record.measurement.executed.model_copy(
                            update={"not_as_asked": (name,), "reasons": {name: name}, "ran": {name: 3}}
                        ),
                        "figures": record.measurement.figures.model_copy(
                            update={"missing": {"energy_mj": name}}
                        ),
                    }
                ),
            }
        )
        for record in store.trials
    ]
    words = {key: text.replace("layer1.0.conv1", json.dumps(name)[1:-1]) for key, text in store.words.items()}
    store.words |= {**words, "final_failure:9": f"{name}: {name}", "weights_source": name}
    run = {
        "host": {"processor": name, "flags": [name], "system": name},
        "settings": {"budget": name},
        "seed": 7,
    }
    store.paths.environment.write_text(json.dumps([run]), encoding="utf-8")
    return store  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """The page of a study with harmless names."""
    with pytest.MonkeyPatch.context() as patch:
        return parsed(report_page(study(tmp_path_factory.mktemp("right") / "s", "harmless", patch)))


def parsed(text: str) -> Reader:
    from plotly.offline import get_plotlyjs

    reader = Reader()
    reader.feed(text.replace(get_plotlyjs(), ""))
    reader.close()
    return reader


@pytest.mark.parametrize("name", NAMES)
def test_no_element_or_attribute_of_a_page_comes_from_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: Reader, name: str
) -> None:
    page = parsed(report_page(study(tmp_path / "s", name, monkeypatch)))
    assert page.tags == right.tags
    assert not any(value.startswith("javascript:") for key, value in page.values if key in ("href", "src"))
    (data,) = (script for script in page.scripts if script.startswith("{"))
    assert name in json.dumps(json.loads(data), ensure_ascii=False) or any(
        point["name"] == name for point in json.loads(data)["points"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_cells_of_csv_are_no_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    store = study(tmp_path / "s", name, monkeypatch)
    write_csv(to_frame(all_points(store), store.paths), tmp_path / "front.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "front.csv").read_text(encoding="utf-8"))))
    cells = [cell for row in rows for cell in row if "canary" in cell]
    assert cells if "canary" in name else True
    assert not [cell for cell in cells if cell.lstrip()[:1] in "=+-@"]


@pytest.mark.parametrize("name", NAMES)
def test_a_card_holds_no_markup_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    store = study(tmp_path / "s", name, monkeypatch)
    record = next(r for r in store.records() if r.fidelity == "final" and r.parent == 10)
    card = card_text(store, record)
    prose = outside_of_code(card)
    for sign in ("<script", "<img", "<svg", "<!--", "![x](", "[x]("):
        if sign in name:
            assert sign not in prose, prose[max(0, prose.find(sign) - 200) :][:400]


def outside_of_code(card: str) -> str:
    """Return a card without what stands in fences and in code, where markup means nothing."""
    return re.sub(r"(?<!\\)`[^`\n]*`", "", "".join(card.split("```")[::2]))


@pytest.mark.parametrize("name", [*NAMES, "\x9b31mcanary", "a\tb\rc", "\udcff"])
def test_nothing_that_is_printed_is_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    print_table(["name"], [[name]])
    print_pairs({"name": name})
    print_text(name)
    if name in NAMES:
        store = study(tmp_path / "s", name, monkeypatch)
        print_front(all_points(store), None)
    shown = capsys.readouterr().out
    assert all(c.isprintable() for c in shown.replace("\n", ""))
    assert "canary" not in name or shown.count("canary") >= 3


def test_csv_on_the_standard_output_is_as_safe_as_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = study(tmp_path / "s", "=canary()", monkeypatch)
    points = all_points(store)
    show_csv(SimpleNamespace(paths=store.paths), points)  # type: ignore[arg-type]
    write_csv(to_frame(points, store.paths), tmp_path / "front.csv")
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "front.csv").read_text(encoding="utf-8")
    assert "'=canary()" in shown and ",=canary()" not in shown
