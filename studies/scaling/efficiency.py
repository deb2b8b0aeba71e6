"""How much of many workers' time is work: trials of 10 seconds on 1 to 128 of them.

    python studies/scaling/efficiency.py run      # writes efficiency.json here; needs a machine that does nothing else
    python studies/scaling/page.py                # writes README.md and the pictures from all records here

Simulated: the product's driver, store and samplers, with trials that sleep on a clock which skips the time in which all
workers sleep (clockwork.py). Local and Ray: the product's executors, with real workers that really sleep (sleeping.py).
Trials are those of a network of 20 groups (tests/study/large.py).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECORD = HERE / "efficiency.json"
TRIAL_S = 10.0
# Additions by which the machine's speed is told.
LOOP = 1_000_000
# Kind, sampler, workers, trials for each worker, trials that the study has before.
SIMULATED = [
    *[("simulated", "random", workers, each, 0) for workers, each in ((1, 16), (2, 16), (8, 8), (32, 8), (128, 8))],
    *[("simulated", "auto", workers, each, 0) for workers, each in ((1, 16), (8, 8), (32, 8), (128, 8))],
    ("simulated", "tpe", 128, 8, 0),
    ("simulated", "nsga2", 128, 8, 0),
    ("simulated", "random", 128, 8, 1_000),
    ("simulated", "random", 128, 8, 10_000),
]  # fmt: skip
# These sleep, and so little is decided for them that they are run beside each other.
FEW = [("local", "random", workers, 3, 0) for workers in (1, 2, 8)]
MANY = [("local", "random", 32, 4, 0), ("local", "random", 128, 5, 0)]
RAY = [("ray", "random", 2, 3, 0), ("ray", "random", 8, 3, 0), ("ray", "random", 32, 3, 0)]
Case = tuple[str, str, int, int, int]


def run(kinds: list[str]) -> None:
    """Measure all cases, or those of some kinds alone, and write the record."""
    cases = (*SIMULATED, *MANY, *RAY)
    rows = [measured(case) for case in cases if not kinds or case[0] in kinds]
    if not kinds or "local" in kinds:
        with ThreadPoolExecutor() as pool:
            rows += pool.map(measured, FEW)
    kept: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    others = [row for row in kept.get("rows", []) if kinds and row["kind"] not in kinds]
    # What earlier versions of this file measured has no host of its own.
    record = {**kept, "trial_s": TRIAL_S, "rows": [*others, *rows]}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measured(case: Case) -> dict[str, Any]:
    """Measure one case in a process of its own."""
    before = {**host(), "loop_s": loop_s()}
    with tempfile.TemporaryDirectory(prefix="autoprune-scaling-") as folder:
        paths = os.pathsep.join((str(ROOT), str(HERE)))
        environment = {**os.environ, "AUTOPRUNE_STUDIES": folder, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        environment.pop("AUTOPRUNE_STORAGE", None)
        done = subprocess.run(  # noqa: S603
            [sys.executable, __file__, "one", *map(str, case)],
            env=environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    row: dict[str, Any] = {**json.loads(done.stdout.splitlines()[-1]), "host": before}
    print(json.dumps(row), file=sys.stderr)
    return row


def host() -> dict[str, Any]:
    """Return what a case runs on."""
    load = round(os.getloadavg()[0], 1)
    return {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0)), "load_before": load}


def loop_s() -> float:
    """Return the seconds of a loop in plain Python, the least of five: how quick the machine is at this moment."""

    def once() -> float:
        begun_s, total = time.perf_counter(), 0
        for number in range(LOOP):
            total += number
        return time.perf_counter() - begun_s

    return round(min(once() for _ in range(5)), 4)


def main() -> None:
    """Do what the command line asks for."""
    verb, *words = sys.argv[1:] or [""]
    if verb == "one":
        # Here alone, so that the processes of local workers, which load this file too, stay small.
        from trials import one

        kind, sampler, *numbers = words
        workers, each, before = map(int, numbers[:3])
        seconds = float(numbers[3]) if len(numbers) > 3 else TRIAL_S
        print(json.dumps(one(kind, sampler, workers, each, before, seconds)))
    elif verb == "run":
        run(words)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
