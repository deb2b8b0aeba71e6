"""Runs the comparison that runs.yaml defines, and writes its tables and its picture from the records of the runs."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from autoprune.config import StudyConfig  # noqa: E402
from autoprune.measure.record import Measurement  # noqa: E402
from autoprune.report.course import overhead_of  # noqa: E402
from autoprune.study.front import costs, volume_of  # noqa: E402
from autoprune.study.pareto import non_dominated  # noqa: E402
from autoprune.study.records import TrialRecord  # noqa: E402
from autoprune.study.screens import Screen  # noqa: E402
from autoprune.yaml_io import read_yaml  # noqa: E402

OBJECTIVES = ("accuracy", "latency", "size")
# Shares of the dense file at which the points lost are told, and the most that may be lost there by the longest search.
BARS = {0.23: 0.4, 0.165: 1.2, 0.115: 3.5, 0.10: 5.0}


@dataclass(frozen=True)
class Run:
    """One search of the comparison.

    Attributes:
        kind: ``runs``, ``quarter``, ``long``, ``untrained`` or ``ablations``.
        name: Name in the tables.
        seed: Its seed.
        budget: Its budget.
        settings: Settings beyond the common ones.
        against: Name of the search that has the part which this one lacks; None where it lacks none.
    """

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
        return HERE / "records" / f"{self.study}.json"


def planned() -> Iterator[Run]:
    """Yield the runs, those of the first seed first, so that an unfinished comparison compares like with like."""
    values = read_yaml(HERE / "runs.yaml").values
    for seed in values["seeds"]:
        for name, settings in values["runs"].items():
            yield Run("runs", name, seed, values["budget"], settings)
        yield Run("quarter", "auto", seed, values["quarter"], {})
    yield Run("long", "auto", values["seeds"][0], values["long"], {})
    for seed in values["seeds"]:
        yield Run("untrained", "untrained", seed, values["quarter"], values["untrained"])
        for name, settings in values["untrained_ablations"].items():
            yield Run("ablations", name, seed, values["quarter"], settings, "untrained")
    for budget, seeds in values["ablation_seeds"].items():
        for seed in seeds:
            yield Run("ablations", "all parts", seed, budget, {})
            for name, settings in values["ablations"].items():
                yield Run("ablations", name, seed, budget, settings, "all parts")


def run_missing(data: str, weights: str, only: str | None) -> None:
    """Run what has no records yet, one after the other, each with an empty cache."""
    model = read_yaml(HERE / "runs.yaml").values["model"]
    for run in planned():
        if run.records.is_file() or (only is not None and not re.search(only, run.study)):
            continue
        print(f"{run.study}: {run.budget}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="autoprune-compare-") as cache:
            words = [f"{name}={json.dumps(value)}" for name, value in run.settings.items()]
            command = [
                sys.executable, "-m", "autoprune", "search", "--model", model, "--data", data, "--weights", weights,
                "--budget", run.budget, "--seed", str(run.seed), "--study", run.study, "--fresh", "--quiet", *words,
            ]  # fmt: skip
            folders = {"AUTOPRUNE_STUDIES": str(HERE / "runs"), "AUTOPRUNE_CACHE": cache}
            environment = {**os.environ, **folders, "PYTHONPATH": str(ROOT)}
            subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)  # noqa: S603
        keep_records(run)


def keep_records(run: Run) -> None:
    """Write what the tables need of a finished study into one file."""
    os.environ["AUTOPRUNE_STUDIES"] = str(HERE / "runs")
    from autoprune.study.screens import read_screens
    from autoprune.study.store import StudyStore

    store = StudyStore.open(run.study)
    if store.phase != "done":
        raise SystemExit(f"study {run.study} did not end; run the command again")
    content = {
        "run": vars(run),
        "spent_s": store.spent_s,
        "commit": commit(),
        "environment": json.loads(store.paths.environment.read_text(encoding="utf-8")),
        "screens": [screen.model_dump(mode="json") for screen in read_screens(store.paths)],
        "trials": [record.model_dump(mode="json") for record in store.records()],
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
    """What a run came to, on the report split."""

    run: Run
    trials: list[TrialRecord]
    screens: list[Screen]
    spent_s: float
    commit: str
    host: dict[str, Any]

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
        )

    @property
    def finals(self) -> list[TrialRecord]:
        """The points of the final phase."""
        return [t for t in self.trials if t.fidelity == "final" and t.measurement is not None]

    @property
    def measurements(self) -> list[Measurement]:
        """What was measured of them."""
        return [t.measurement for t in self.finals if t.measurement]

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

    def row(self) -> dict[str, Any]:
        """Return the run's line of the table."""
        fastest = min(m.latency.ratio for m in self.measurements)
        return {
            "search": self.run.name,
            "seed": self.run.seed,
            "budget": self.run.budget,
            "hypervolume": self.volume(),
            **{f"points lost at {share:g}": self.lost_at(share) for share in BARS},
            "least latency": fastest,
            "front points": sum(self.front()),
            "trained points": sum(t.train_steps > 0 for t in self.finals),
            "screened": len(self.screens),
            "engine overhead": overhead_of(self.trials, self.screens) or float("nan"),
            "trials": sum(t.is_trained for t in self.trials),
            "proposal, ms": 1e3 * float(np.mean([s.proposal_s for s in self.screens] or [np.nan])),
            "spent, s": self.spent_s,
            "commit": self.commit,
        }


def report() -> None:
    """Write README.md, runs.csv and front.png from the records that there are."""
    outcomes = [Outcome.read(run) for run in planned() if run.records.is_file()]
    if not outcomes:
        raise SystemExit("there are no records yet; begin with: compare.py run --data D --weights F")
    table = pd.DataFrame([{"kind": o.run.kind, **o.row()} for o in outcomes])
    table.to_csv(HERE / "runs.csv", index=False, float_format="%.5g")
    draw(outcomes)
    missing = [run.study for run in planned() if not run.records.is_file()]
    (HERE / "README.md").write_text(readme(table, outcomes, missing), encoding="utf-8")


def readme(table: pd.DataFrame, outcomes: list[Outcome], missing: list[str]) -> str:
    """Return the page of results."""
    runs = table[table["kind"] == "runs"]
    # Only seeds that every search of the table has.
    every = (
        set.intersection(*(set(found["seed"]) for _, found in runs.groupby("search"))) if len(runs) else set()
    )
    means = runs[runs["seed"].isin(every)].groupby("search")["hypervolume"].mean()
    blind = means.drop("auto", errors="ignore")
    lines = [
        "# The default search against plain samplers, and its parts",
        "",
        "Generated by `python studies/compare/compare.py report` from `records/`; `runs.yaml` defines the runs. All figures",
        "are of the exported files: capability on the report split, latency measured interleaved with the dense network.",
        "Hypervolume is that below 10 points lost, the dense latency and the dense size, each axis scaled to 1. The plain",
        "samplers get the same trial code, baselines and share of time for the final recovery (of up to "
        f"{StudyConfig(model='any', sampler='tpe').most_networks} networks, each from",
        "its own trial), without profile, screening, rungs and lineage. The last column is the commit whose code ran.",
        "",
        markdown(table.drop(columns=["kind"])),
        "",
    ]
    if "auto" in means and len(blind):
        best = str(blind.idxmax())
        lines += [f"The best plain sampler is {best}, with a mean hypervolume of {blind[best]:.4f}; the default search has "
                  f"{means['auto']:.4f}, {means['auto'] / blind[best] - 1:+.1%}."]  # fmt: skip
        short = table[(table["kind"] == "quarter") & table["seed"].isin(every)]
        if len(short):
            value, budget = short["hypervolume"].mean(), short["budget"].iloc[0]
            verdict = "reaches" if value >= blind[best] else "does not reach"
            lines += [
                f"In {budget} the default search has {value:.4f}: it {verdict} what {best} has in the end."
            ]
    for _, row in table[table["kind"] == "long"].iterrows():
        lines += ["", f"In {row['budget']}, seed {row['seed']}:", ""]
        for share, bar in BARS.items():
            lost = row[f"points lost at {share:g}"]
            lines.append(f"- {lost:.2f} points lost at {share:g} of the bytes; the bar is {bar:g}: "
                         f"{'met' if lost <= bar else 'missed'}.")  # fmt: skip
    lines += parts_table([o.run for o in outcomes], table)
    lines += [
        "",
        "![fronts](front.png)",
        "",
        f"Measured on {outcomes[0].host.get('processor', 'an unknown processor')}.",
    ]
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def parts_table(runs: list[Run], table: pd.DataFrame) -> list[str]:
    """Return the lines that tell what each part is worth; none where nothing was run without a part."""
    lines: list[str] = []
    by_search: dict[tuple[str, str], dict[int, dict[Any, Any]]] = {}
    for row in table.to_dict("records"):
        by_search.setdefault((row["search"], row["budget"]), {})[row["seed"]] = row
    for name, budget, against in dict.fromkeys((r.name, r.budget, r.against) for r in runs if r.against):
        one, other = by_search[name, budget], by_search.get((against, budget), {})
        seeds = sorted(one.keys() & other.keys())
        if not seeds:
            continue
        without, with_it = ([rows[seed] for seed in seeds] for rows in (one, other))
        means = [np.mean([row["hypervolume"] for row in rows]) for rows in (without, with_it)]
        gains = [b["hypervolume"] / a["hypervolume"] - 1 for a, b in zip(without, with_it, strict=True)]
        counts = [np.mean([row["front points"] for row in rows]) for rows in (without, with_it)]
        lines.append(
            f"| {name} | {against} | {budget} | {means[0]:.4f} | {means[1]:.4f} "
            f"| {', '.join(f'{gain:+.1%}' for gain in gains)} | {counts[0]:g} | {counts[1]:g} |"
        )
    if not lines:
        return []
    return [
        "",
        "## What each part is worth",
        "",
        "The same seeds without the part and with it (`all parts` is the default search once more, run beside those without",
        "one; `untrained` is the search over a space in which no network is trained).",
        "",
        "| without | against | budget | hypervolume without | with | worth by seed | points of the front without | with |",
        "|---|---|---|---|---|---|---|---|",
        *lines,
    ]


def markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown."""
    rows = [list(table.columns), ["---"] * len(table.columns)]
    for _, row in table.iterrows():
        rows.append([_shown(value) for value in row])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"
    return str(value)


def draw(outcomes: list[Outcome]) -> None:
    """Draw points lost against size and latency, one colour for each search, and volumes as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    by_size, by_latency, bars = figure.subplots(1, 3)
    names = list(dict.fromkeys(o.run.name for o in outcomes if o.run.kind == "runs"))
    colours = {name: f"C{index}" for index, name in enumerate(names)}
    for outcome in (o for o in outcomes if o.run.kind == "runs"):
        points = [(m, m.report) for m in outcome.measurements]
        lost = [100 * (outcome.dense - report.value) for _, report in points if report]
        first = outcome.run.seed == min(o.run.seed for o in outcomes)
        for axis, shares in (
            (by_size, [m.size_ratio for m, _ in points]),
            (by_latency, [m.latency.ratio for m, _ in points]),
        ):
            label = outcome.run.name if first else None
            axis.plot(
                shares, lost, "o", color=colours[outcome.run.name], alpha=0.7, markersize=5, label=label
            )
    for axis, name in ((by_size, "size"), (by_latency, "latency")):
        axis.set_xlabel(f"{name}, share of the dense network's")
        axis.set_ylabel("points of accuracy lost")
        axis.set_ylim(10, -1)
        axis.grid(alpha=0.3)
    if names:
        by_size.legend()
    labels = [f"{o.run.name} {o.run.budget} ({o.run.seed})" for o in outcomes]
    bars.barh(labels[::-1], [o.volume() for o in outcomes][::-1], color="C0")
    bars.set_xlabel("hypervolume of the final front")
    figure.savefig(HERE / "front.png")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run what is missing")
    run.add_argument("--data", required=True)
    run.add_argument("--weights", required=True)
    run.add_argument("--only", help="only studies whose name matches this expression")
    verbs.add_parser("report", help="write the tables and the picture")
    given = parser.parse_args()
    if given.verb == "run":
        run_missing(given.data, given.weights, given.only)
    report()


if __name__ == "__main__":
    main()
