"""Runs commands of autoprune in forks of one warm process: a fork takes milliseconds, imports take seconds.

``python -m tests.faults.forker [MODULE...]`` reads one JSON request a line from its standard input and answers on its
standard output: ``{"started": id, "pid": …}`` and ``{"ended": id, "status": …}``. It has one thread and trains nothing
itself, so that its forks are as sound as fresh processes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from autoprune.cli.main import main

_WARM = (
    "autoprune.cli.main", "autoprune.search.run", "autoprune.report.html", "autoprune.report.plot",
    "autoprune.report.table", "autoprune.report.writing", "optuna.storages", "sqlalchemy.dialects.sqlite",
    "optuna.samplers._tpe.sampler", "optuna.samplers", "tests.faults.setups",
)  # fmt: skip


def serve() -> None:
    """Answer requests until the standard input ends."""
    for name in sys.argv[1:] or _WARM:
        importlib.import_module(name)
    if not sys.argv[1:]:
        from tests.faults import synthetic

        synthetic.groups()
        warm_up()
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    running: dict[int, int] = {}
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    answers.write(json.dumps({"ready": os.getpid()}) + "\n")
    rest = b""
    while True:
        if selector.select(0.005):
            block = os.read(0, 1 << 16)
            if not block:
                return
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    _become(request)
                running[pid] = request["id"]
                answers.write(json.dumps({"started": request["id"], "pid": pid}) + "\n")
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            answers.write(json.dumps({"ended": running.pop(pid), "status": status}) + "\n")


def warm_up() -> None:
    """Run a study that trains nothing, so that what is loaded and compiled on first use is there in every fork."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        space = (here / "space.yaml").read_text().replace("finetune_steps: 1", "finetune_steps: 0")
        (folder / "space.yaml").write_text(space)
        own = {
            "AUTOPRUNE_STUDIES": str(folder / "studies"),
            "AUTOPRUNE_CACHE": str(folder / "cache"),
            "AUTOPRUNE_DATA": name,
        }
        before = dict(os.environ)
        os.environ.update(own)
        words = [
            "search",
            "--model",
            f"{here / 'network.py'}:build",
            "--data",
            f"{here / 'network.py'}:images",
        ]
        words += [
            "--trust-code",
            "--space",
            str(folder / "space.yaml"),
            "--budget",
            "2trials",
            "--quiet",
            "--json",
        ]
        with (
            Path(os.devnull).open("w") as null,
            contextlib.redirect_stdout(null),
            contextlib.redirect_stderr(null),
        ):
            code = main([*words, "--study", "warm", "--sampler", "tpe"])
        assert code == 0, f"the warming run ended with {code}"
        os.environ.clear()
        os.environ.update(before)
    gc.collect()


def _become(request: dict[str, Any]) -> None:
    """Run the command in this fork and end."""
    code = 70
    try:
        os.setpgid(0, 0)
        os.environ.update(request["environment"])
        null = os.open(os.devnull, os.O_RDWR)
        out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        err = os.open(request["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for own, number in ((null, 0), (out, 1), (err, 2)):
            os.dup2(own, number)
        os.closerange(3, 64)
        from tests.faults import setups

        for name, arguments in request["setups"]:
            getattr(setups, name)(*arguments)
        module, _, name = request.get("entry", "autoprune.cli.main:main").partition(":")
        code = getattr(importlib.import_module(module), name)(request["words"])
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
