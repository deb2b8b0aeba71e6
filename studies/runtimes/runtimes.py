"""Measures what int8 and pruning bring to large networks on each target, and writes the tables from the records."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

import pandas as pd  # noqa: E402
from searches import commit  # noqa: E402
from tables import markdown  # noqa: E402

RECORDS = HERE / "records"


def settings() -> dict[str, Any]:
    """Return what runtimes.yaml defines."""
    from autoprune.yaml_io import read_yaml

    values: dict[str, Any] = read_yaml(HERE / "runtimes.yaml").values
    return values


def record_file(model: str, target: str) -> Path:
    """Return the file that keeps what was measured of a network on a target."""
    return RECORDS / f"{re.sub(r'[^a-z0-9_]+', '-', f'{model}-{target}'.lower())}.json"


def planned(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the networks and targets of the study, those for a GPU last."""
    gpu = values["gpu"]
    here = [(model, target) for model in values["models"] for target in values["targets"]]
    return here + [(model, target) for model in gpu["models"] for target in gpu["targets"]]


def run_missing(targets: list[str], again: bool, gpu: bool) -> None:
    """Build and time what has no record yet, one network on one target after the other."""
    from autoprune.study.artifacts import write_text_atomic

    values = settings()
    chosen = [(m, t) for m, t in planned(values) if ("cuda" in t) == gpu]
    if targets:
        chosen = [(model, target) for model in values["models"] for target in targets]
    for model, target in chosen:
        place = record_file(model, target)
        if again or not place.is_file():
            print(f"{model} on {target}", file=sys.stderr, flush=True)
            RECORDS.mkdir(exist_ok=True)
            write_text_atomic(place, json.dumps(measure(model, target, values), indent=1))


def measure(model: str, word: str, values: dict[str, Any]) -> dict[str, Any]:
    """Build a network's versions for one target, time them interleaved, and return the record."""
    import torch
    import torchvision

    from autoprune.compress.discovery import cuttable, find_groups
    from autoprune.compress.surgery import prune
    from autoprune.deploy.registry import make_runtime
    from autoprune.deploy.runtime import Artifact, Formats
    from autoprune.errors import ExportError
    from autoprune.measure.cost import size_bytes
    from autoprune.measure.host import describe_host
    from autoprune.measure.latency import FINAL_PROTOCOL, measure_front
    from autoprune.space.recipe import uniform_recipe
    from autoprune.target import Target, parse_target

    torch.manual_seed(0)
    pixels = values["pixels"]
    network = getattr(torchvision.models, model)(weights=None).eval()
    inputs = torch.randn(values["calibration"], 3, pixels, pixels)
    groups = find_groups(network, inputs[:2])
    network = cuttable(network, groups, inputs[:2]) if groups.rewritten else network
    counts = uniform_recipe(groups, values["ratio"], 32, width=values["width"]).kept_counts(groups)
    # Speed does not depend on which units stay.
    plan = {g.name: tuple(range(counts[g.name])) for g in groups.groups if counts[g.name] < g.size}
    half = prune(network, groups, plan).eval()
    target = Target.model_validate(parse_target(word))
    runtime = make_runtime(target)
    runtime.prepare(network, inputs[:2])
    kinds = {m.layer: m.kind for g in groups.groups for m in g.members if m.own and m.axis == "out"}
    own = [layer for group in groups.groups for layer in group.producers]
    int8 = Formats(int8=[layer for layer in own if kinds.get(layer) in target.facts.int8])
    versions = {
        "dense": (network, Formats()),
        "int8": (network, int8),
        "pruned": (half, Formats()),
        "pruned, int8": (half, int8),
    }
    if target.device == "cuda":
        linear = [layer for layer in own if kinds.get(layer) == "linear"]
        versions["fp8"] = (network, Formats(fp8=linear))
        versions["2:4"] = (two_of_four(network, linear), Formats(packed=True))
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="autoprune-runtimes-") as folder:
        made: dict[str, Artifact] = {}
        refused: dict[str, str] = {}
        for number, (name, (version, asked)) in enumerate(versions.items()):
            place = Path(folder) / f"{number}-{target.facts.model_file}"
            try:
                made[name] = runtime.build(version, place, asked, [inputs])
            except ExportError as error:
                if name == "dense":
                    raise
                refused[name] = error.message
        others = [name for name in made if name != "dense"]
        timed = measure_front(
            [made[name].path for name in others],
            made["dense"].path,
            target,
            (3, pixels, pixels),
            protocol=FINAL_PROTOCOL,
        )
        rows = [
            {
                "version": name,
                "latency": latency.model_dump(mode="json"),
                "figures": figures.model_dump(mode="json"),
                "size_bytes": size_bytes(made[name].path),
                "dense_size_bytes": size_bytes(made["dense"].path),
                "executed": made[name].executed.model_dump(mode="json"),
            }
            for name, (latency, figures) in zip(others, timed, strict=True)
        ]
    return {
        "model": model,
        "target": word,
        "ratio": values["ratio"],
        "pixels": pixels,
        "dense": made["dense"].executed.model_dump(mode="json"),
        "versions": rows,
        "refused": refused,
        "host": describe_host(),
        "commit": commit(),
        "seconds": time.monotonic() - begun_s,
    }


def two_of_four(network: Any, layers: list[str]) -> Any:
    """Return a copy whose linear layers keep the two largest of every four weights in a row."""
    import torch

    copy = deepcopy(network)
    with torch.no_grad():
        for name in layers:
            weight = copy.get_submodule(name).weight
            if weight.shape[1] % 4 == 0:
                fours = weight.view(len(weight), -1, 4)
                fours.scatter_(2, fours.abs().topk(2, dim=2, largest=False).indices, 0.0)
    return copy


def rows() -> Iterator[dict[str, Any]]:
    """Yield the lines of the table."""
    for file in sorted(RECORDS.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        first = record["versions"][0]["latency"]
        yield {
            "network": record["model"], "target": record["target"], "version": "dense", "ratio": 1.0, "low": 1.0,
            "high": 1.0, "ms": first["dense_ms"], "size": 1.0, "ran": ran(record["dense"]), "as asked": asked(record["dense"]),
        }  # fmt: skip
        for version in record["versions"]:
            latency = version["latency"]
            yield {
                "network": record["model"],
                "target": record["target"],
                "version": version["version"],
                "ratio": latency["ratio"],
                "low": latency["ratio_ci"][0],
                "high": latency["ratio_ci"][1],
                "ms": latency["latency_ms"],
                "size": version["size_bytes"] / version["dense_size_bytes"],
                "ran": ran(version["executed"]),
                "as asked": asked(version["executed"]),
            }


def ran(executed: dict[str, Any]) -> str:
    """Return what the layers run in."""
    return ", ".join(f"{count} {kind}" for kind, count in executed["ran"].items())


def asked(executed: dict[str, Any]) -> str:
    """Return the share of layers that run as asked."""
    return f"{1 - len(executed['not_as_asked']) / executed['layers']:.0%}"


def report() -> None:
    """Write README.md, runtimes.csv and runtimes.png from the records that there are."""
    table = pd.DataFrame(rows())
    if table.empty:
        raise SystemExit("there are no records yet; begin with: runtimes.py run")
    table.to_csv(HERE / "runtimes.csv", index=False, float_format="%.5g")
    draw(table)
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RECORDS.glob("*.json"))]
    values = settings()
    shown = table.assign(
        **{
            "x dense": [f"{r:.3f}" for r in table["ratio"]],
            "95 %": [
                f"{a:.3f} to {b:.3f}" if v != "dense" else ""
                for a, b, v in zip(table["low"], table["high"], table["version"], strict=True)
            ],
            "x size": [f"{s:.3f}" for s in table["size"]],
            "dense ms": [
                f"{m:.2f}" if v == "dense" else "" for m, v in zip(table["ms"], table["version"], strict=True)
            ],
        }
    )[["network", "target", "version", "dense ms", "x dense", "95 %", "x size", "ran", "as asked"]]
    missing = [f"{m} on {t}" for m, t in planned(values) if not record_file(m, t).is_file()]
    lines = [
        "# What int8 and pruning bring to large networks",
        "",
        "Generated by `python studies/runtimes/runtimes.py report` from `records/`; `runtimes.yaml` defines the runs. Weights are",
        f"random, which serves for speed; images have {values['pixels']} pixels. *pruned* removes {values['ratio']:g} of the units of every group",
        f"that can be cut, in steps of {values['width']}. A ratio is the median of pairs with the dense network on the same target, timed",
        "interleaved in one session; the interval is a bootstrap over processes. *ran* is read back from what the runtime executes.",
        "",
        markdown(shown),
        "",
        "![latency](runtimes.png)",
        "",
        *[
            f"- {r['model']} on {r['target']}: {r['host']['processor']}, commit {r['commit']}, {r['seconds']:.0f} s"
            for r in records
        ],
        *[
            f"- {r['model']} on {r['target']} has no {name}: {why}"
            for r in records
            for name, why in r.get("refused", {}).items()
        ],
    ]
    if missing:
        lines += ["", f"Not run: {', '.join(missing)}."]
    (HERE / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(table: pd.DataFrame) -> None:
    """Draw the ratios as bars with their intervals, one panel for each network."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(table["network"]))
    figure = Figure(figsize=(6 * len(models), 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        own = table[(table["network"] == model) & (table["version"] != "dense")]
        targets = list(dict.fromkeys(own["target"]))
        versions = list(dict.fromkeys(own["version"]))
        for place, version in enumerate(versions):
            chosen = own[own["version"] == version].set_index("target").loc[targets]
            spread = [chosen["ratio"] - chosen["low"], chosen["high"] - chosen["ratio"]]
            positions = [index + 0.27 * (place - 1) for index in range(len(targets))]
            axis.bar(positions, chosen["ratio"], 0.25, yerr=spread, capsize=3, label=version)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(targets)), targets)
        axis.set_title(model)
        axis.set_ylabel("latency, share of the dense network's on the target")
    figure.axes[0].legend()
    figure.savefig(HERE / "runtimes.png")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run what is missing")
    run.add_argument("--target", action="append", default=[], help="only this target; may be given again")
    run.add_argument("--gpu", action="store_true", help="what is for a GPU instead")
    run.add_argument("--again", action="store_true", help="also what has a record")
    verbs.add_parser("report", help="write the table and the picture")
    given = parser.parse_args()
    if given.verb == "run":
        run_missing(given.target, given.again, given.gpu)
    report()


if __name__ == "__main__":
    main()
