"""Verb `profile`: what it prints and draws, from a profile whose figures are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoprune import actions
from autoprune.cli.main import main
from autoprune.search.options import Options
from autoprune.search.profile import Profile
from tests.search.test_cost_model import make_options

WORDS = ["profile", "--model", "cifar_resnet20", "--data", "digits", "--quiet"]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Options:
    options = make_options()

    def measured(*_: object) -> tuple[Profile, Options]:
        return options.profile, options

    monkeypatch.setattr(actions, "profile_network", measured)
    return options


def test_json_holds_the_errors_of_the_predictor_and_every_choice(
    known: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "maps" / "profile.png"
    assert main([*WORDS, "--to", str(picture), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["latency_error"] == pytest.approx(known.costs.latency_error)
    assert found["size_error"] == pytest.approx(known.costs.size_error)
    assert [group["group"] for group in found["groups"]] == ["a", "b", "c"]
    removed = [cell for cell in found["groups"][1]["cells"] if cell["kept"] == 0]
    assert len(removed) == 1
    assert removed[0]["latency"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table_names_every_group_and_says_what_is_precious(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, "--to", str(tmp_path / "profile.png")]) == 0
    printed = capsys.readouterr().out
    assert "precious" in printed
    assert "latency_error" in printed
    rows = [line.split() for line in printed.splitlines() if line.split()[:1] in (["a"], ["b"], ["c"])]
    assert [row[1] for row in rows] == ["32", "64", "64"]
