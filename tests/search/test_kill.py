"""kill -9 at random moments of a real search, and the study that comes out of it in the end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoprune.naming import StudyPaths, studies_root
from autoprune.study.artifacts import verify
from autoprune.study.front import point_json
from autoprune.study.store import StudyStore

_MODEL = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(4),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(4),
        nn.Flatten(), nn.Linear(128, 10),
    )
"""
_KILLS = 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_lose_double_and_tear_nothing(tmp_path: Path, program: list[str]) -> None:
    (tmp_path / "net.py").write_text(_MODEL)
    words = [
        "search",
        "--model",
        f"{tmp_path / 'net.py'}:build",
        "--data",
        "digits",
        "--trust-code",
        "--study",
        "killed",
    ]
    words += ["--space", "quick", "--budget", "12trials", "front_points=2", "final_share=0.2"]
    environment = {**os.environ, "AUTOPRUNE_STUDIES": str(studies_root())}
    moments = random.Random(0)
    acknowledged: dict[int, str] = {}
    kills = 0
    while kills < _KILLS:
        process = subprocess.Popen(
            [*program, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        time.sleep(moments.uniform(3.0, 14.0))
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read() if process.stderr else ""
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if StudyPaths.of("killed").database.is_file():
            acknowledged = check(acknowledged)
    assert kills >= _KILLS // 2, "the search ended before it was killed often enough"
    result = subprocess.run([*program, *words], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    check(acknowledged)
    store = StudyStore.open("killed")
    records = store.records()
    assert store.phase == "done"
    assert all(r.state != "running" for r in records)
    assert not list(store.paths.artifacts.glob(".unfinished-*"))
    for number in {r.number for r in records if r.fidelity == "final"}:
        folder = point_json(store.paths, records[number])["artifact"]
        assert folder is not None
        verify(Path(folder))
    labels = [r.label for r in records if r.origin in ("dense", "baseline") and r.state == "complete"]
    assert len(labels) == len(set(labels))
    sys.stdout.write(
        f"{kills} kills, {len(records)} trials, {sum(r.failure_kind == 'lost' for r in records)} lost\n"
    )


def check(acknowledged: dict[int, str]) -> dict[int, str]:
    """Compare with what was finished before, and return what is finished now."""
    finished = {
        r.number: r.model_dump_json() for r in StudyStore.open("killed").records() if r.state == "complete"
    }
    for number, content in acknowledged.items():
        assert finished.get(number) == content, f"trial {number} was lost or changed"
    return finished
