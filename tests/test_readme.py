"""What the README shows works: the library script, and the commands' verbs and options."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from autoprune.cli.main import main

README = Path(__file__).resolve().parents[1] / "README.md"


def library_script() -> str:
    found = re.search(
        r"<!-- library-script -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found, "the README lacks its library script"
    return found.group(1)


def commands() -> list[str]:
    """Return every autoprune command in the README's blocks."""
    blocks = re.findall(r"```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("#")[0].split("&&")[-1].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("autoprune ")]


def test_the_library_script_is_short() -> None:
    assert len([line for line in library_script().splitlines() if line.strip()]) <= 15


@pytest.mark.timeout(600)
def test_the_library_script_runs(tmp_path: Path) -> None:
    script = library_script()
    assert script.count('budget="2m"') == 1
    result = subprocess.run(
        [sys.executable, "-c", script.replace('budget="2m"', 'budget="45s"')],
        cwd=tmp_path,
        env={
            **os.environ,
            "AUTOPRUNE_STUDIES": str(tmp_path / "studies"),
            "PYTHONPATH": str(README.parent),
            "MPLBACKEND": "agg",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "latency_ratio" in result.stdout
    assert (tmp_path / "front.png").stat().st_size > 0
    assert {path.suffix for path in (tmp_path / "out").iterdir()} >= {".onnx", ".safetensors", ".json", ".md"}


def test_the_readme_shows_both_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert "\npip install . && autoprune search --model resnet18 --data digits --budget 5m\n" in text
    assert "\npip install '.[test]' && pytest\n" in text


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_has_options_that_exist(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)[1:]
    verb = words[:2] if words[0] == "spaces" else words[:1]
    assert main([*verb, "--help"]) == 0
    shown = capsys.readouterr().out
    for option in (word for word in words if word.startswith("--")):
        assert option in shown
