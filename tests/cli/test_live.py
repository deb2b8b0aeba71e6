"""The live view: a panel on a terminal, plain lines elsewhere, nothing on the standard output."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from autoprune.cli import live
from autoprune.cli.live import duration, live_view, plain_line
from autoprune.search.events import Progress

STATE = Progress(
    phase="search",
    message="trial 7 done",
    trials=8,
    front=3,
    hypervolume=0.4321,
    failures={"nan": 2, "export": 1},
    left_s=125.4,
    last="#7 accuracy 0.8610 [x0.5]",
)


def test_a_plain_line_says_everything() -> None:
    assert plain_line(STATE) == (
        "[search] | 2m05s left | 8 trials, front 3, hypervolume 0.4321 | failures: 1 export, 2 nan"
        " | trial 7 done | #7 accuracy 0.8610 [x0.5]"
    )
    assert plain_line(Progress("load", "loading resnet18")) == "[load] | loading resnet18"


def test_without_a_terminal_each_new_state_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with live_view("title") as listener:
        for state in (STATE, STATE, Progress("final", "training")):
            listener(state)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [plain_line(STATE), "[final] | training"]


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with live_view("title", quiet=True) as listener:
        listener(STATE)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_panel_shows_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with live_view("autoprune mine") as listener:
        listener(STATE)
    shown = terminal.getvalue()
    for part in ("autoprune mine", "trial 7 done", "3 points, hypervolume 0.4321", "1 export, 2 nan"):
        assert part in shown


def test_the_panel_counts_down_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now_s[0])
    panel = live._Panel("title")
    panel.update(STATE)
    now_s[0] += 60.0
    console = Console(file=io.StringIO(), width=100)
    console.print(panel)
    assert "1m05s" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3.0, "0m00s"), (0.4, "0m00s"), (59.6, "1m00s"), (125.0, "2m05s"), (3725.0, "1h02m")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
