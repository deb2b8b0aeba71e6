"""Runs the searches that bits.yaml defines, and writes the tables and the picture from their records."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import pandas as pd  # noqa: E402
from searches import Outcome, Run, run_missing  # noqa: E402
from tables import markdown  # noqa: E402

from autoprune.config import parse_budget  # noqa: E402
from autoprune.yaml_io import read_yaml  # noqa: E402

AFTERWARDS = "one after the other"
BITS = (8, 4, 6, 3, 2)
SHARES = (0.25, 0.165, 0.125, 0.1)
# Seconds that timing one artifact takes in the final session, at least.
_TIMING_S = 2.5


def values() -> dict[str, Any]:
    """Return what bits.yaml defines."""
    found: dict[str, Any] = read_yaml(HERE / "bits.yaml").values
    return found


def planned() -> Iterator[Run]:
    """Yield the runs."""
    given = values()
    for target in given["targets"]:
        for name, settings in given["runs"].items():
            budget = given["pruning_first"] if name == AFTERWARDS else given["budget"]
            yield Run(HERE, target, f"{name} {target}", given["seed"], budget, {**settings, "target": target})
    more = given["long"]
    own = {**given["runs"][more["name"]], "target": more["target"]}
    yield Run(HERE, "long", f"{more['name']} {more['target']}", given["seed"], more["budget"], own)


def quantized_afterwards(run: Run, cache: str) -> dict[str, Any]:
    """Put every network of a finished pruning on fewer bits, until the budget of the others is spent."""
    if not run.name.startswith(AFTERWARDS):
        return {}
    os.environ |= {"AUTOPRUNE_STUDIES": str(run.studies), "AUTOPRUNE_CACHE": cache}
    from autoprune.config import make_config
    from autoprune.measure.latency import FINAL_PROTOCOL, measure_front
    from autoprune.search.bench import Bench, as_groups_say
    from autoprune.search.trial import assemble, evaluate
    from autoprune.space.groups import Groups
    from autoprune.space.quantization import Quantization
    from autoprune.study.artifacts import artifact_folder
    from autoprune.study.front import dense_record, front_points
    from autoprune.study.store import StudyStore
    from autoprune.workloads.workload import load_workload

    begun_s = time.monotonic()
    store = StudyStore.open(run.study)
    whole_s = parse_budget(values()["budget"]).seconds or 0.0
    left_s = whole_s - store.spent_s
    config = make_config({k: v for k, v in store.settings().items() if k != "study"})
    groups = Groups.model_validate_json(store.notes()["groups"])
    workload = as_groups_say(load_workload(config), groups)
    bench = Bench.build(config, workload, groups, gradients=False)
    dense = dense_record(store.records())
    assert dense is not None  # noqa: S101
    bench.adopt_dense(artifact_folder(store.paths, dense), dense)
    how = Quantization(scale="mse", rounding="gptq", bias_correction=True)
    folder = Path(tempfile.mkdtemp(prefix="autoprune-afterwards-"))
    made = []
    try:
        points = front_points(store)
        for bits in BITS:
            for point in points:
                if time.monotonic() - begun_s + _TIMING_S * (len(made) + 2) > left_s:
                    break
                recipe = point.record.recipe
                assert recipe is not None  # noqa: S101
                chosen = {
                    g.name: recipe.choice(g.name).model_copy(update={"bits": bits if g.producers else 32})
                    for g in groups.groups
                }
                recipe = recipe.model_copy(update={"groups": chosen, "quantization": how})
                network = bench.load(artifact_folder(store.paths, point.record))
                place = folder / str(len(made))
                place.mkdir()
                artifact = bench.deploy(network, recipe, place)
                search = evaluate(bench, artifact, workload.data.search)
                report = evaluate(bench, artifact, workload.data.report.unseal())
                made.append((network, artifact, search, report))
        assert bench.dense is not None  # noqa: S101
        timed = measure_front(
            [artifact.path for _, artifact, _, _ in made],
            bench.dense.path,
            config.target,
            workload.data.input_shape,
            protocol=FINAL_PROTOCOL,
        )
        further = [
            assemble(bench, network.model, artifact, latency, figures, search=search, report=report)
            for (network, artifact, search, report), (latency, figures) in zip(made, timed, strict=True)
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    spent_s = store.spent_s + time.monotonic() - begun_s
    return {"further": [m.model_dump(mode="json") for m in further], "spent_s": spent_s}


def row_of(outcome: Outcome) -> dict[str, Any]:
    """Return a run's line of the table."""
    name, _, target = outcome.run.name.rpartition(" ")
    return {
        "search": name,
        "target": target,
        "hypervolume": f"{outcome.volume():.4f}",
        **{f"points lost at {share:g}": _lost(outcome.lost_at(share)) for share in SHARES},
        "least latency": f"{min(m.latency.ratio for m in outcome.measurements):.3f}",
        "front points": sum(outcome.front()),
        "spent, s": f"{outcome.spent_s:.0f}",
        "commit": outcome.commit,
    }


def _lost(points: float) -> str:
    return "" if points != points else f"{points:.2f}"


def report() -> None:
    """Write README.md, bits.csv and fronts.png from the records that there are."""
    outcomes = [Outcome.read(run) for run in planned() if run.records.is_file()]
    if not outcomes:
        raise SystemExit("there are no records yet; begin with: bits.py run --data D --weights F")
    short = [o for o in outcomes if o.run.kind != "long"]
    table = pd.DataFrame([row_of(o) for o in short])
    table.to_csv(HERE / "bits.csv", index=False)
    draw(short)
    given = values()
    lines = [
        "# Bits and pruning, together and apart",
        "",
        "Generated by `python studies/bits/bits.py report` from `records/`; `bits.yaml` defines the runs. All figures are of the",
        "exported files: capability on the report split, latency interleaved with the dense network on the target. Hypervolume",
        "is that below 10 points lost, the dense latency and the dense size, each axis scaled to 1. Every search had "
        f"{given['budget']}, all of",
        f"it counted; *{AFTERWARDS}* is the search of ratios alone for {given['pruning_first']}, whose networks are then put on 8, 6, 4, 3 and 2",
        "bits by GPTQ in the time that is left.",
        "",
        markdown(table),
        "",
        *verdicts(short),
        "",
        "![fronts](fronts.png)",
        *eighth([o for o in outcomes if o.run.kind == "long"], given["eighth"]),
        "",
        f"Measured on {outcomes[0].host.get('processor', 'an unknown processor')}.",
    ]
    missing = [run.study for run in planned() if not run.records.is_file()]
    if missing:
        lines += ["", f"Not run: {', '.join(missing)}."]
    (HERE / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def verdicts(outcomes: list[Outcome]) -> list[str]:
    """Return one line for each target: the joint search against the best other one."""
    lines = []
    for target in dict.fromkeys(o.run.kind for o in outcomes):
        volumes = {
            o.run.name.removesuffix(f" {target}"): o.volume() for o in outcomes if o.run.kind == target
        }
        others = {name: volume for name, volume in volumes.items() if name != "joint"}
        if "joint" in volumes and others:
            best = max(others, key=lambda name: others[name])
            lines.append(
                f"- {target}: the joint search has {volumes['joint']:.4f}, the best other one, {best}, {others[best]:.4f} "
                f"({volumes['joint'] / others[best] - 1:+.1%})."
            )
    return lines


def eighth(outcomes: list[Outcome], share: float) -> list[str]:
    """Return the lines that tell what mixed bits keep at a share of the dense bytes."""
    lines: list[str] = []
    for outcome in outcomes:
        points = [
            (t.measurement.report.value, t.number, t.measurement, t.measurement.report, t)
            for t in outcome.finals
            if t.measurement and t.measurement.report and t.measurement.size_ratio <= share
        ]
        if not points:
            continue
        _, _, measured, kept, best = max(points, key=lambda point: point[:2])
        bits = sorted(choice.bits for choice in (best.recipe.groups if best.recipe else {}).values())
        counts = ", ".join(f"{bits.count(b)} of {b}" for b in dict.fromkeys(bits))
        lines += [
            "",
            f"## Mixed bits at {share:g} of the dense bytes",
            "",
            f"{outcome.run.name} in {outcome.run.budget}: the best point of at most {share:g} of the dense bytes has "
            f"{measured.size_ratio:.3f} of them and {kept.value:.4f} on the",
            f"report split ({kept.ci[0]:.4f} to {kept.ci[1]:.4f}), the dense network {outcome.dense:.4f}: "
            f"{100 * (outcome.dense - kept.value):.2f} points lost after {best.train_steps} steps, at",
            f"{measured.latency.ratio:.3f} of the latency. Its groups by bits: {counts}. Nothing was pruned.",
        ]
    return lines


def draw(outcomes: list[Outcome]) -> None:
    """Draw points lost against size and against latency for each target, one colour for each search."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(o.run.kind for o in outcomes))
    figure = Figure(figsize=(11, 4.6 * len(targets)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for row, target in zip(figure.subplots(len(targets), 2, squeeze=False), targets, strict=True):
        for outcome in (o for o in outcomes if o.run.kind == target):
            on = [
                m
                for m, is_on in zip(outcome.measurements, outcome.front(), strict=True)
                if is_on and m.report
            ]
            lost = [100 * (outcome.dense - m.report.value) for m in on if m.report]
            for axis, shares in zip(
                row, ([m.size_ratio for m in on], [m.latency.ratio for m in on]), strict=True
            ):
                label = outcome.run.name.removesuffix(f" {target}")
                axis.plot(shares, lost, "o", alpha=0.75, markersize=5, label=label)
        for axis, name in zip(row, ("size", "latency"), strict=True):
            axis.set_xlabel(f"{name} on {target}, share of the dense network's")
            axis.set_ylabel("points of accuracy lost")
            axis.set_ylim(10, -1)
            axis.grid(alpha=0.3)
        row[0].legend()
    figure.savefig(HERE / "fronts.png")


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
        run_missing(planned(), values()["model"], given.data, given.weights, given.only, quantized_afterwards)
    report()


if __name__ == "__main__":
    main()
