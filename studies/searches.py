"""Searches that a study compares: run one after the other, kept as records, and read back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from autoprune.measure.record import Measurement  # noqa: E402
from autoprune.study.elsewhere import record_on  # noqa: E402
from autoprune.study.front import costs, volume_of  # noqa: E402
from autoprune.study.pareto import non_dominated  # noqa: E402
from autoprune.study.records import TrialRecord  # noqa: E402
from autoprune.study.screens import Screen  # noqa: E402

OBJECTIVES = ("accuracy", "latency", "size")


@dataclass(frozen=True)
class Run:
    """One search of a comparison.

    Attributes:
        home: Folder of the comparison, whose ``records`` keep what came of it.
        kind: What it is run for.
        name: Name in the tables.
        seed: Its seed.
        budget: Its budget.
        settings: Settings beyond the common ones.
        against: Name of the search that has the part which this one lacks; None where it lacks none.
    """

    home: Path
    kind: str
    name: str
    seed: int
    budget: str
    settings: dict[str, Any]
    against: str | None = None

    @property
    def study(self) -> str:
        """Name of its study and of its record files."""
        return re.sub(r"[^a-z0-9]+", "_", f"{self.name} {self.budget} {self.seed}".lower())

    @property
    def records(self) -> Path:
        """The file that keeps its records."""
        return self.home / "records" / f"{self.study}.json"

    @property
    def studies(self) -> Path:
        """The folder that its study is written to."""
        return self.home / "runs"


def run_missing(
    runs: Iterable[Run],
    model: str,
    data: str,
    weights: str,
    only: str | None,
    afterwards: Callable[[Run, str], dict[str, Any]] | None = None,
) -> None:
    """Run what has no records yet, one after the other, each with an empty cache.

    Args:
        runs: The runs.
        model: Model by name.
        data: Data by name.
        weights: Weights by name.
        only: Expression that names of studies have to match.
        afterwards: Called with each finished run and its cache folder; what it returns is kept with the records.
    """
    for run in runs:
        if run.records.is_file() or (only is not None and not re.search(only, run.study)):
            continue
        print(f"{run.study}: {run.budget}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="autoprune-study-") as cache:
            words = [f"{name}={json.dumps(value)}" for name, value in run.settings.items()]
            command = [
                sys.executable, "-m", "autoprune", "search", "--model", model, "--data", data, "--weights", weights,
                "--budget", run.budget, "--seed", str(run.seed), "--study", run.study, "--fresh", "--quiet", *words,
            ]  # fmt: skip
            folders = {"AUTOPRUNE_STUDIES": str(run.studies), "AUTOPRUNE_CACHE": cache}
            environment = {**os.environ, **folders, "PYTHONPATH": str(ROOT)}
            subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)  # noqa: S603
            more = {} if afterwards is None else afterwards(run, cache)
        keep_records(run, more)


def keep_records(run: Run, more: dict[str, Any]) -> None:
    """Write what the tables need of a finished study into one file."""
    os.environ["AUTOPRUNE_STUDIES"] = str(run.studies)
    from autoprune.study.screens import read_screens
    from autoprune.study.store import StudyStore

    store = StudyStore.open(run.study)
    if store.phase != "done":
        raise SystemExit(f"study {run.study} did not end; run the command again")
    described = {name: value for name, value in vars(run).items() if name != "home"}
    content = {
        "run": described,
        "spent_s": store.spent_s,
        "commit": commit(),
        "environment": json.loads(store.paths.environment.read_text(encoding="utf-8")),
        "screens": [screen.model_dump(mode="json") for screen in read_screens(store.paths)],
        "trials": [record.model_dump(mode="json") for record in store.records()],
        **more,
    }
    for entry in content["environment"]:  # where the data lie on the machine is nobody's business
        entry["settings"] = {k: v for k, v in entry["settings"].items() if k not in ("data", "weights")}
    run.records.parent.mkdir(exist_ok=True)
    run.records.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def commit() -> str:
    """Return the commit of the code that runs; empty outside a repository."""
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip()


@dataclass(frozen=True)
class Outcome:
    """What a run came to, on the report split.

    Attributes:
        run: The run.
        trials: Its trials.
        screens: Its screens.
        spent_s: Seconds that it took.
        commit: Commit of the code that ran.
        host: The machine.
        further: What was made of its points afterwards; they count as points of the run.
    """

    run: Run
    trials: list[TrialRecord]
    screens: list[Screen]
    spent_s: float
    commit: str
    host: dict[str, Any]
    further: list[Measurement]

    @classmethod
    def read(cls, run: Run) -> Outcome:
        """Read a run's records."""
        content = json.loads(run.records.read_text(encoding="utf-8"))
        return cls(
            run,
            [TrialRecord.model_validate(trial) for trial in content["trials"]],
            [Screen.model_validate(screen) for screen in content["screens"]],
            content["spent_s"],
            content["commit"],
            content["environment"][-1]["host"],
            [Measurement.model_validate(each) for each in content.get("further", ())],
        )

    def on(self, target: str) -> Outcome:
        """Return what the run came to on one of its targets; points that were not measured there have no figures."""
        if target == self.run.settings["target"].split(",")[0]:
            return self
        trials = [record_on(trial, target) for trial in self.trials]
        further = [m.elsewhere[target] for m in self.further if target in m.elsewhere]
        return replace(self, trials=trials, further=further)

    @property
    def finals(self) -> list[TrialRecord]:
        """The points of the final phase."""
        return [t for t in self.trials if t.fidelity == "final" and t.measurement is not None]

    @property
    def measurements(self) -> list[Measurement]:
        """What was measured of them, and of what was made of them."""
        return [*(t.measurement for t in self.finals if t.measurement), *self.further]

    @property
    def dense(self) -> float:
        """The dense network's capability on the report split."""
        report = next(t.measurement.report for t in self.finals if t.label == "dense" and t.measurement)
        if report is None:
            raise SystemExit(f"{self.run.study}: the dense network was not measured on the report split")
        return report.value

    def volume(self) -> float:
        """Return the hypervolume of the final points below (10 points lost, dense latency, dense size)."""
        return volume_of(self.measurements, OBJECTIVES, self.dense, on_search=False)

    def front(self) -> list[bool]:
        """Return which of the final points no other one dominates."""
        return list(
            non_dominated(np.array([costs(m, OBJECTIVES, on_search=False) for m in self.measurements]))
        )

    def lost_at(self, share: float) -> float:
        """Return the least points lost by a final point of at most ``share`` of the dense bytes; NaN if there is none."""
        lost = [
            100 * (self.dense - m.report.value)
            for m in self.measurements
            if m.report and m.size_ratio <= share
        ]
        return min(lost, default=float("nan"))
