"""The entry point: exit codes, where things are printed, and what help promises."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest
from ruamel.yaml import YAML

from autoprune import errors
from autoprune.cli.main import main, say
from autoprune.space.space_files import json_schema, load_space, shipped_spaces

VERBS = [
    "search",
    "front",
    "report",
    "export",
    "compress",
    "measure",
    "groups",
    "sensitivity",
    "studies",
    "spaces",
    "doctor",
]


@pytest.mark.parametrize(
    "words", [[], *([verb] for verb in VERBS), *(["spaces", v] for v in ("list", "show", "copy", "schema"))]
)
def test_help_answers(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr()
    assert "Usage: autoprune" in shown.out
    assert shown.err == ""


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    shown = capsys.readouterr().out
    assert [verb for verb in VERBS if f" {verb} " not in shown] == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("what", "hint"), 2),
        (errors.NoFeasiblePointError("what", "hint"), 3),
        (errors.StorageError("what", "hint"), 4),
        (errors.ExportError("what", "hint"), 5),
        (errors.TooManyFailuresError("what", "hint"), 6),
        (OSError(28, "No space left on device"), 4),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("what"), 1),
    ],
)
def test_errors_become_one_message_and_an_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr("autoprune.space.space_files.shipped_spaces", fail)
    assert main(["spaces"]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("autoprune: ")
    assert "Traceback" not in shown.err
    if isinstance(error, errors.AutopruneError):
        assert shown.err == "autoprune: what\nhint\n"


def test_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) in (0, 2)
    shown = capsys.readouterr()
    assert "Usage" in shown.out + shown.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == __import__("autoprune").__version__ + "\n"


def test_a_reader_that_goes_away_is_no_error(program: list[str]) -> None:
    command = " ".join(program) + " spaces schema | true; exit ${PIPESTATUS[0]}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_spaces_are_listed_shown_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["spaces", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (
        set(listed) == set(shipped_spaces()) == {"default", "structured", "int8", "lowbit", "quick", "sparse"}
    )
    assert main(["spaces", "show", "quick"]) == 0
    shown = capsys.readouterr().out
    assert shown == shipped_spaces()["quick"].read_text(encoding="utf-8")
    assert YAML(typ="safe").load(shown)["width"] == load_space("quick").width
    assert main(["spaces", "copy", "quick"]) == 0
    assert main(["spaces", "copy", "quick", "mine.yaml"]) == 0
    assert load_space("./mine.yaml") == load_space("quick.yaml") == load_space("quick")
    capsys.readouterr()
    assert main(["spaces", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


def test_a_long_message_is_cut_and_what_to_do_is_still_said(capsys: pytest.CaptureFixture[str]) -> None:
    say("x" * 50_000, "do this")
    first, last = capsys.readouterr().err.splitlines()
    assert first == f"autoprune: {'x' * 8000}… (42,000 characters more)"
    assert last == "do this"
    say("short")
    assert capsys.readouterr().err == "autoprune: short\n"
