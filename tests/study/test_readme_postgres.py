"""The README's lines for a study on PostgreSQL work as they stand there; the dashboard reads both kinds of record."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from autoprune.cli.main import main
from autoprune.naming import StudyPaths
from tests.study.made import add, open_for_writing
from tests.study.postgres import Postgres


def test_the_lines_of_the_readme_give_a_server(
    postgres: Postgres, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = (repository / "README.md").read_text(encoding="utf-8").partition("## A study on PostgreSQL")[2]
    found = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert found is not None
    lines = [line for line in found[1].splitlines() if not line.startswith("autoprune ")]
    home = Path(tempfile.mkdtemp(prefix="autoprune-readme-", dir="/tmp"))
    home.chmod(0o777)
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home)}
    try:
        # As another user, where this one is root, whom PostgreSQL refuses.
        done = subprocess.run(
            [*postgres.prefix, "bash", "-eu", "-c", "\n".join([*lines, 'echo "$AUTOPRUNE_STORAGE"'])],
            env=environment, cwd=home, capture_output=True, text=True, timeout=120, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        url = done.stdout.splitlines()[-1]
        folder = url.partition("?host=")[2]
        assert url == f"postgresql://autoprune@/autoprune?host={folder}" and folder.startswith(str(home))
        monkeypatch.setenv("AUTOPRUNE_STORAGE", url)
        assert main(["studies", "--json"]) == 0
        add(open_for_writing("mine"), 0.5)
        assert main(["studies", "--json"]) == 0
        assert '"study": "mine"' in capsys.readouterr().out
        assert not StudyPaths.of("mine").database.exists()
        postgres.run("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
def test_the_dashboard_reads_a_study(storage: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna_dashboard", reason="no dashboard: pip install 'autoprune[dashboard]'")
    store = open_for_writing("seen")
    add(store, 0.5)
    url = f"sqlite:///{store.paths.database}"
    if storage != "sqlite":
        url = storage.replace("postgresql:", "postgresql+psycopg:")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [
        sys.executable,
        "-c",
        "from optuna_dashboard._cli import main; main()",
        url,
        "--port",
        str(port),
    ]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        study = get(port, "studies")["study_summaries"][0]
        assert study["study_name"] == "seen"
        detail = get(port, f"studies/{study['study_id']}?after=0")
        assert detail["objective_names"] == ["accuracy", "latency_ratio", "size_ratio"]
        assert [trial["state"] for trial in detail["trials"]] == ["Complete"]
        add(store, 0.4)  # the driver goes on meanwhile
        until_s = time.monotonic() + 60  # it looks again every 10 s
        while len(get(port, f"studies/{study['study_id']}?after=0")["trials"]) < 2:
            assert time.monotonic() < until_s
            time.sleep(0.5)
    finally:
        process.kill()
        process.wait()
    store.release()


def get(port: int, path: str) -> Any:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=10) as answer:
                return json.load(answer)
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the dashboard does not answer")
