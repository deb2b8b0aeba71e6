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
    for name, settings in given["runs"].items():
        budget = given["pruning_first"] if name == AFTERWARDS else given["budget"]
        own = {**settings, "target": ",".join(given["targets"])}
        yield Run(HERE, "front", name, given["seed"], budget, own)
    more = given["long"]
    own = {**given["runs"][more["name"]], "target": more["target"]}
    yield Run(HERE, "long", more["name"], given["seed"], more["budget"], own)


def quantized_afterwards(run: Run, cache: str) -> dict[str, Any]:
    """Put every network of a finished pruning on fewer bits, until the budget of the others is spent."""
    if run.name != AFTERWARDS:
        return {}
    os.environ |= {"AUTOPRUNE_STUDIES": str(run.studies), "AUTOPRUNE_CACHE": cache}
    from autoprune.compress.pipeline import Compressed
    from autoprune.config import make_config
    from autoprune.deploy.runtime import Artifact
    from autoprune.measure.latency import FINAL_PROTOCOL, measure_front
    from autoprune.measure.record import Capability
    from autoprune.search.bench import Bench, as_groups_say
    from autoprune.search.trial import assemble, evaluate_file
    from autoprune.space.groups import Groups
    from autoprune.space.quantization import Quantization
    from autoprune.space.recipe import Recipe
    from autoprune.study.artifacts import artifact_folder
    from autoprune.study.front import dense_record, front_points
    from autoprune.study.store import StudyStore
    from autoprune.target import Target
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

    def scored(target: Target, artifact: Artifact) -> tuple[Artifact, Capability, Capability]:
        runtime, data = bench.runtime_of(target), workload.data
        splits = (data.search, data.report.unseal())
        search, report = (evaluate_file(runtime, artifact.path, s, workload.metric) for s in splits)
        return artifact, search, report

    how = Quantization(scale="mse", rounding="gptq", bias_correction=True)
    folder = Path(tempfile.mkdtemp(prefix="autoprune-afterwards-"))
    made = []
    try:
        assert bench.dense is not None  # noqa: S101
        references = {t.spec: bench.dense.path for t in config.targets[:1]}
        for target in config.also:
            whole = bench.deploy_on(target, Compressed(workload.model), Recipe(), folder)
            references[target.spec] = whole.path
        points = front_points(store)
        for bits in BITS:
            for point in points:
                timing_s = _TIMING_S * len(config.targets) * (len(made) + 2)
                if time.monotonic() - begun_s + timing_s > left_s:
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
                files = [bench.deploy(network, recipe, place)]
                files += [bench.deploy_on(target, network, recipe, place) for target in config.also]
                made.append((network, [scored(t, f) for t, f in zip(config.targets, files, strict=True)]))
        on: list[list[Any]] = []
        for number, target in enumerate(config.targets):
            reference, there = references[target.spec], [(n.model, *deployed[number]) for n, deployed in made]
            paths = [artifact.path for _, artifact, _, _ in there]
            timed = measure_front(
                paths, reference, target, workload.data.input_shape, protocol=FINAL_PROTOCOL
            )
            on.append(
                [
                    assemble(
                        bench,
                        model,
                        artifact,
                        latency,
                        figures,
                        search=search,
                        report=report,
                        reference=reference,
                    )
                    for (model, artifact, search, report), (latency, figures) in zip(
                        there, timed, strict=True
                    )
                ]
            )
        specs = [target.spec for target in config.also]
        further = [
            first.model_copy(update={"elsewhere": dict(zip(specs, others, strict=True))})
            for first, *others in zip(*on, strict=True)
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    spent_s = store.spent_s + time.monotonic() - begun_s
    return {"further": [m.model_dump(mode="json") for m in further], "spent_s": spent_s}


def row_of(outcome: Outcome, target: str) -> dict[str, Any]:
    """Return a run's line of the table for one of its targets."""
    return {
        "search": outcome.run.name,
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
    given = values()
    on = {target: [o.on(target) for o in short] for target in given["targets"]}
    table = pd.DataFrame([row_of(o, target) for target, there in on.items() for o in there])
    table.to_csv(HERE / "bits.csv", index=False)
    draw(on)
    lines = [
        "# Bits and pruning, together and apart",
        "",
        "Generated by `python studies/bits/bits.py report` from `records/`; `bits.yaml` defines the runs. All figures are of the",
        "exported files: capability on the report split, latency interleaved with the dense network on the target. Hypervolume",
        "is that below 10 points lost, the dense latency and the dense size, each axis scaled to 1. Every search had "
        f"{given['budget']}, all of",
        f"it counted, decided by {given['targets'][0]} and measured its front on each target; *{AFTERWARDS}* is the search of ratios",
        f"alone for {given['pruning_first']}, whose networks are then put on 8, 4, 6, 3 and 2 bits by GPTQ in the time that is left.",
        "",
        markdown(table),
        "",
        *verdicts(on),
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


def verdicts(on: dict[str, list[Outcome]]) -> list[str]:
    """Return one line for each target: the joint search against the best other one."""
    lines = []
    for target, outcomes in on.items():
        volumes = {o.run.name: o.volume() for o in outcomes}
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
            f"{outcome.run.name}, on {outcome.run.settings['target']} in {outcome.run.budget}: the best point of at most {share:g} of the dense bytes has "
            f"{measured.size_ratio:.3f} of them and {kept.value:.4f} on the",
            f"report split ({kept.ci[0]:.4f} to {kept.ci[1]:.4f}), the dense network {outcome.dense:.4f}: "
            f"{100 * (outcome.dense - kept.value):.2f} points lost after {best.train_steps} steps, at",
            f"{measured.latency.ratio:.3f} of the latency. Its groups by bits: {counts}. Nothing was pruned.",
        ]
    return lines


def draw(outcomes: dict[str, list[Outcome]]) -> None:
    """Draw points lost against size and against latency for each target, one colour for each search."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6 * len(outcomes)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(outcomes), 2, squeeze=False)
    for row, (target, there) in zip(rows, outcomes.items(), strict=True):
        for outcome in there:
            on = [
                m
                for m, is_on in zip(outcome.measurements, outcome.front(), strict=True)
                if is_on and m.report
            ]
            lost = [100 * (outcome.dense - m.report.value) for m in on if m.report]
            for axis, shares in zip(
                row, ([m.size_ratio for m in on], [m.latency.ratio for m in on]), strict=True
            ):
                axis.plot(shares, lost, "o", alpha=0.75, markersize=5, label=outcome.run.name)
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
