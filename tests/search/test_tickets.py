"""A whole comparison of lottery tickets on a small network: what starts from what, the record, and going on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from autoprune.cli.main import main
from autoprune.compress import ticket_training
from autoprune.config import make_config
from autoprune.errors import UsageError
from autoprune.report.tickets_view import ticket_table, tickets_figure, write_tickets
from autoprune.search import tickets
from autoprune.search.events import Progress, ignore
from autoprune.search.interrupt import Interrupt
from autoprune.search.ticket_record import (
    KINDS,
    TicketRecord,
    TicketResult,
    TicketSettings,
    read_record,
)
from autoprune.search.tickets import compare_tickets
from autoprune.workloads.splits import SealedSplit

CODE = """
from torch import nn

def build(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""


@pytest.fixture
def config(tmp_path: Path) -> Any:
    (tmp_path / "net.py").write_text(CODE, encoding="utf-8")
    model = f"{tmp_path / 'net.py'}:build"
    return make_config({"model": model, "data": "digits", "trust_code": True, "calibration_examples": 64})


SETTINGS = TicketSettings(ratio=0.75, rounds=2, steps=5, rewind_step=2, seeds=1)


def noted_trainings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Note the weights that every training starts from, and how it is done."""
    seen: list[dict[str, Any]] = []

    def train(model: nn.Module, course: Any, **how: Any) -> nn.Module | None:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        result: nn.Module | None = ticket_training.train(model, course, **how)
        end = None if result is None else {n: v.clone() for n, v in result.state_dict().items()}
        seen.append({"start": state, "end": end, **how})
        return result

    monkeypatch.setattr(tickets, "train", train)
    return seen


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_each_kind_starts_from_what_it_says(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = noted_trainings(monkeypatch)
    record = compare_tickets(config, SETTINGS, tmp_path / "to", ignore)
    early, dense, first_round, rewind, rate_rewind, finetune, reinit, random_mask = seen
    checkpoint = load_file(tmp_path / "to" / "seed-0" / "early.safetensors")
    masks = load_file(tmp_path / "to" / "seed-0" / "ticket.safetensors")
    assert early["last"] == 2 and same(early["end"], checkpoint)
    for training in (dense, first_round, rewind, random_mask):
        assert same(training["start"], checkpoint) and training["first"] == 2
    for training in (rate_rewind, finetune):
        assert same(training["start"], first_round["end"]) and training["first"] == 2
    assert [t.get("at_last_rate") for t in (rewind, rate_rewind, finetune)] == [False, False, True]
    assert reinit["first"] == 0
    assert not same(reinit["start"], early["start"])
    for training in (rewind, rate_rewind, finetune, reinit):
        assert same(training["masks"], masks)
    assert not same(random_mask["masks"], masks)
    assert {n: int(m.sum()) for n, m in random_mask["masks"].items()} == {
        n: int(m.sum()) for n, m in masks.items()
    }
    # The first round leaves the half of what two rounds leave a quarter of; what it dropped stays dropped.
    assert all(bool((first_round["masks"][n] | ~mask).all()) for n, mask in masks.items())
    assert [r.kind for r in record.results] == list(KINDS)
    assert [round(r.share_left, 2) for r in record.results] == [1.0] + 5 * [0.25]
    assert [(r.steps, r.steps_before) for r in record.results] == [
        (5, 0), (3, 2), (3, 5), (3, 5), (5, 0), (3, 2),
    ]  # fmt: skip
    assert record.examples == 359
    assert read_record(tmp_path / "to") == record


def test_the_report_split_is_read_after_the_last_training_of_a_seed(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = noted_trainings(monkeypatch)
    at: list[int] = []
    original = SealedSplit.unseal

    def unseal(self: SealedSplit) -> Any:
        at.append(len(seen))
        return original(self)

    monkeypatch.setattr(SealedSplit, "unseal", unseal)
    compare_tickets(config, SETTINGS, tmp_path / "to", ignore)
    assert at == [len(seen)] * len(KINDS)


def test_structured_tickets_drop_channels(config: Any, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"structured": True, "rounds": 1, "ratio": 0.5})
    record = compare_tickets(config, settings, tmp_path / "to", ignore)
    masks = load_file(tmp_path / "to" / "seed-0" / "ticket.safetensors")
    first = masks["0.weight"].flatten(1)
    assert sorted(first.sum(1).tolist()) == 4 * [0] + 4 * [27]
    # Half of the first layer's filters, a quarter of the second's weights, half of the last layer's inputs.
    left = (4 * 27 + 4 * 4 * 9 + 4 * 10) / (8 * 27 + 8 * 8 * 9 + 8 * 10)
    assert record.rows()[1].share_left == pytest.approx(left)


def test_ctrl_c_keeps_what_is_done_and_the_same_call_goes_on(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "to"
    settings = SETTINGS.model_copy(update={"seeds": 2})
    stops: list[Interrupt] = []

    class Noted(Interrupt):
        def __init__(self) -> None:
            super().__init__()
            stops.append(self)

    def end_in_the_second_seed(progress: Progress) -> None:
        if progress.message == "seed 1: rate_rewind":
            stops[-1].requested = True

    monkeypatch.setattr(tickets, "Interrupt", Noted)
    with pytest.raises(KeyboardInterrupt):
        compare_tickets(config, settings, to, end_in_the_second_seed)
    kept = read_record(to)
    assert kept is not None
    assert [(r.seed, r.kind) for r in kept.results] == [(0, k) for k in KINDS] + [
        (1, "dense"),
        (1, "rewind"),
    ]
    seen = noted_trainings(monkeypatch)
    record = compare_tickets(config, settings, to, ignore)
    assert len(seen) == 8  # the first seed is not trained again
    assert [(r.seed, r.kind) for r in record.results] == [(s, k) for s in (0, 1) for k in KINDS]
    assert record.results[:8] == kept.results  # and the second gives the same again


def test_other_settings_and_other_files_are_refused(config: Any, tmp_path: Path) -> None:
    to = tmp_path / "to"
    compare_tickets(config, SETTINGS.model_copy(update={"rounds": 1}), to, ignore)
    before = (to / "tickets.json").read_bytes()
    with pytest.raises(UsageError, match="holds tickets with rounds = 1, not 2"):
        compare_tickets(config, SETTINGS, to, ignore)
    assert (to / "tickets.json").read_bytes() == before
    (to / "tickets.json").unlink()
    with pytest.raises(UsageError, match="not an empty folder"):
        compare_tickets(config, SETTINGS, to, ignore)


def test_a_run_that_was_killed_in_its_first_seed_begins_anew(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "to"

    def killed(self: object, seed: int, name: str, tensors: object) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patched:
        patched.setattr("autoprune.search.tickets._Comparison._keep", killed)
        with pytest.raises(SystemExit):
            compare_tickets(config, SETTINGS, to, ignore)
    assert len(compare_tickets(config, SETTINGS.model_copy(update={"rounds": 1}), to, ignore).results) == 6


def test_a_network_whose_weights_are_always_the_same_has_no_control(config: Any, tmp_path: Path) -> None:
    source = tmp_path / "net.py"
    source.write_text("import torch\n" + CODE.replace("    return", "    torch.manual_seed(0)\n    return"))
    with pytest.raises(UsageError, match="the same weights for every seed"):
        compare_tickets(config, SETTINGS, tmp_path / "to", ignore)


def test_a_rewind_step_beyond_the_usual_steps_is_told(config: Any, tmp_path: Path) -> None:
    settings = TicketSettings(rewind_step=1_000_000)
    with pytest.raises(UsageError, match="rewind step 1000000.*allowed: 0 to"):
        compare_tickets(config, settings, tmp_path / "to", ignore)


def result(kind: Any, seed: int, accuracy: float, share: float) -> TicketResult:
    return TicketResult(
        kind=kind, seed=seed, share_left=share, accuracy=accuracy, ci=(0.1, 0.9), steps=7, steps_before=1
    )


RECORD = TicketRecord(
    settings={"model": "m", "data": "d"},
    metric="accuracy",
    examples=10,
    results=(
        result("rewind", 0, 0.5, 0.2),
        result("dense", 0, 0.9, 1.0),
        result("rewind", 1, 0.75, 0.2),
    ),
)


def test_the_table_the_csv_and_the_picture_are_the_record(tmp_path: Path) -> None:
    headings, cells = ticket_table(RECORD)
    assert headings[:5] == ["kind", "weights left", "accuracy mean", "lowest", "highest"]
    assert cells == [
        ["dense", "100.0%", "0.9000", "0.9000", "0.9000", "1", "7"],
        ["rewind", "20.0%", "0.6250", "0.5000", "0.7500", "2", "7"],
    ]
    files = write_tickets(RECORD, tmp_path)
    with Path(files["csv"]).open(encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    assert [(line["kind"], line["accuracy"], line["ci_high"]) for line in lines] == [
        ("rewind", "0.5", "0.9"),
        ("dense", "0.9", "0.9"),
        ("rewind", "0.75", "0.9"),
    ]
    assert Path(files["png"]).read_bytes().startswith(b"\x89PNG")
    drawn = [np.asarray(line.get_xdata()).tolist() for line in tickets_figure(RECORD).axes[0].lines]
    assert drawn == [[0.9], [0.9], [0.5, 0.75], [0.625]]


def test_seeds_that_lack_a_kind_are_not_complete() -> None:
    whole = tuple(result(kind, 3, 0.5, 0.2) for kind in KINDS)
    record = RECORD.model_copy(update={"results": (*RECORD.results, *whole)})
    assert record.of_complete_seeds().results == whole


def test_the_verb_prints_the_record(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "tickets", "--model", config.model, "--data", "digits", "--trust-code", "--steps", "3", "--rounds", "1",
        "--seeds", "1", "--to", str(tmp_path / "to"), "--quiet", "--json",
    ]  # fmt: skip
    assert main(words) == 0
    shown = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "to" / "tickets.json").read_text(encoding="utf-8"))
    assert shown["results"] == kept["results"]
    assert [row["kind"] for row in shown["rows"]] == list(KINDS)
    assert kept["settings"]["rewind_step"] == 1
    assert {path.name for path in (tmp_path / "to").iterdir()} == {
        "seed-0", "tickets.json", "tickets.csv", "tickets.png",
    }  # fmt: skip
