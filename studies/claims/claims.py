"""Tries what people are told pruning does, and writes the page of it.

Each claim leaves a record for each network in records/; README.md and the plots are made of the records alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from networks import CACHE, NAMES, NotHereError, Subject, cifar, subject, with_seed  # noqa: E402
from page import write_page  # noqa: E402

from autoprune.compress.pipeline import Compressed  # noqa: E402
from autoprune.config import make_config  # noqa: E402
from autoprune.deploy.runtime import Artifact  # noqa: E402
from autoprune.measure.cost import count_params  # noqa: E402
from autoprune.measure.latency import FINAL_PROTOCOL, measure_latency  # noqa: E402
from autoprune.measure.robustness import measure_robustness  # noqa: E402
from autoprune.search.bench import Bench  # noqa: E402
from autoprune.search.events import ignore  # noqa: E402
from autoprune.search.ticket_record import TicketSettings  # noqa: E402
from autoprune.search.tickets import compare_tickets  # noqa: E402
from autoprune.space.groups import Group  # noqa: E402
from autoprune.space.mask import Mask  # noqa: E402
from autoprune.space.recipe import GroupChoice, Recipe, uniform_recipe  # noqa: E402
from autoprune.space.schedule import Schedule  # noqa: E402
from autoprune.yaml_io import read_yaml  # noqa: E402

RECORDS = HERE / "records"
Row = dict[str, Any]
Settings = dict[str, Any]
_GRADUAL = Schedule(kind="gradual", rounds=10)


def main() -> None:
    """Run what has no record yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="CLAIM", help=f"of {', '.join(CLAIMS)}")
    parser.add_argument("--subjects", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--again", action="store_true", help="run also what has a record")
    parser.add_argument("--report", action="store_true", help="run nothing, write the page from the records")
    given = parser.parse_args()
    settings: Settings = read_yaml(HERE / "claims.yaml").values  # type: ignore[assignment]
    RECORDS.mkdir(exist_ok=True)
    for name in [] if given.report else (given.subjects or NAMES):
        known: list[Subject] = []
        for claim, (run, subjects) in CLAIMS.items():
            path = RECORDS / f"{claim}.{name}.json"
            if (
                name not in subjects
                or claim not in (given.only or CLAIMS)
                or (path.is_file() and not given.again)
            ):
                continue
            try:
                if not known:
                    known.append(subject(name, settings))
            except NotHereError as error:
                print(f"{name}: {error}", file=sys.stderr)
                break
            rows = []
            for row in run(known[0], settings):
                rows.append({key: value for key, value in row.items() if key != "file"})
                print(f"{claim}, {name}: {row}", file=sys.stderr, flush=True)
            path.write_text(
                json.dumps(_record(claim, known[0], settings, rows), indent=1) + "\n", encoding="utf-8"
            )
    write_page([json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob("*.json"))])


def _record(claim: str, given: Subject, settings: Settings, rows: list[Row]) -> Row:
    return {
        "claim": claim,
        "network": given.name,
        "dense": {"accuracy": given.accuracy(given.model), "params": count_params(given.model)},
        "settings": settings,
        "rows": rows,
        "versions": {name: version(name) for name in ("torch", "onnxruntime")},
        "host": {"machine": platform.machine(), "threads": torch.get_num_threads()},
    }


# -- what a trial gives -------------------------------------------------------------------------


def _scored(given: Subject, recipe: Recipe, **more: Any) -> Row:
    """Carry a recipe out and score the network itself."""
    compressed = given.compressed(recipe)
    return {
        **more,
        "accuracy": given.accuracy(compressed.model),
        "params": count_params(compressed.model),
        "steps": compressed.train_steps,
    }


class _Files:
    """Exports recipes of one network for images, and measures the files against the dense one's."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench = bench
        self.folder = folder
        self.count = 0
        self.dense = self._deployed(bench.workload.model, Recipe())

    def _deployed(self, model: torch.nn.Module, recipe: Recipe) -> Artifact:
        self.count += 1
        path = self.folder / str(self.count)
        path.mkdir()
        return self.bench.deploy(Compressed(model), recipe, path)

    def measured(self, recipe: Recipe) -> Row:
        """Return size and latency of a recipe's file, both as shares of the dense network's."""
        artifact = self._deployed(self.bench.compressed(recipe).model, recipe)
        shape = self.bench.workload.data.input_shape
        latency, _ = measure_latency(
            artifact.path, self.dense.path, self.bench.config.target, shape, protocol=FINAL_PROTOCOL
        )
        size = artifact.path.stat().st_size
        return {
            "size_bytes": size,
            "size_ratio": size / self.dense.path.stat().st_size,
            "latency_ratio": latency.ratio,
            "latency_ratio_ci": list(latency.ratio_ci),
            "int8_layers": artifact.executed.int8_layers,
            "layers": artifact.executed.layers,
            "file": str(artifact.path),
        }


# -- claims -------------------------------------------------------------------------------------


def unstructured(given: Subject, settings: Settings) -> Iterator[Row]:
    """80 to 90 % of single weights removed with little loss."""
    with tempfile.TemporaryDirectory() as folder:
        files = _Files(given.bench, Path(folder)) if given.bench else None
        for sparsity in settings["sparsities"]:
            few, many = settings["steps"][given.name]
            for steps, schedule in ((0, Schedule()), (few, Schedule()), (many, _GRADUAL)):
                recipe = uniform_recipe(
                    given.groups, 0.0, 32, recovery=given.recovery(steps), sparsity=sparsity,
                    mask=Mask(allocation="global"), schedule=schedule,
                )  # fmt: skip
                row = _scored(given, recipe, sparsity=sparsity, schedule=schedule.kind)
                if files and steps == many:
                    row |= files.measured(recipe)
                yield row


def structured(given: Subject, settings: Settings) -> Iterator[Row]:
    """Channels removed: 2 to 4 times faster."""
    assert given.bench is not None  # noqa: S101
    with tempfile.TemporaryDirectory() as folder:
        files = _Files(given.bench, Path(folder))
        for ratio in settings["ratios"]:
            for steps in settings["steps"][given.name]:
                recipe = uniform_recipe(given.groups, ratio, 32, "activation", recovery=given.recovery(steps))
                yield _scored(given, recipe, ratio=ratio) | files.measured(recipe)


def heads(given: Subject, settings: Settings) -> Iterator[Row]:
    """20 to 40 % of attention heads removed with little loss, chosen by gradients."""
    groups = [group for group in given.groups.prunable if _is_heads(group, given)]
    for share in settings["heads"]:
        for criterion in ("taylor", "l2", "random"):
            for steps in (0, settings["steps"][given.name][0]):
                recipe = Recipe(
                    groups={group.name: GroupChoice(ratio=share) for group in groups},
                    criterion={"conv": criterion, "linear": criterion},
                    width=1,
                    recovery=given.recovery(steps),
                    ranking="global",
                )
                yield _scored(given, recipe, heads_removed=share, criterion=criterion)


def _is_heads(group: Group, given: Subject) -> bool:
    """Whether a group's units are heads: its layers' channels are divided between it and another group."""
    return f"{group.name}/width" in given.groups.by_name


def layers(given: Subject, settings: Settings) -> Iterator[Row]:
    """Whole layers removed, those first that change the outputs least by themselves."""
    blocks = [group for group in given.groups.prunable if group.block]
    alone = {
        group.name: given.compressed(
            Recipe(groups={group.name: GroupChoice(ratio=1.0)}, recovery=given.recovery(0))
        ).model
        for group in blocks
    }
    # Ranked by agreement with the dense network on calibration data, never on the test examples.
    order = sorted(alone, key=lambda name: _disagreement(given, alone[name]))
    for count in [n for n in settings["blocks"] if n < len(order)]:
        for steps in (0, *settings["steps"][given.name]):
            chosen = {name: GroupChoice(ratio=1.0) for name in order[:count]}
            recipe = Recipe(groups=chosen, recovery=given.recovery(steps))
            yield _scored(
                given, recipe, blocks_removed=count, of=len(blocks),
                removed=[given.groups.by_name[name].block for name in order[:count]],
            )  # fmt: skip


@torch.no_grad()
def _disagreement(given: Subject, model: torch.nn.Module) -> float:
    """Return how far a network's outputs are from the dense one's on calibration data, in nats."""
    total = 0.0
    for inputs, _ in given.calibration:
        student = model(inputs).log_softmax(1)
        teacher = given.model(inputs).log_softmax(1)
        total += float((teacher.exp() * (teacher - student)).sum(1).mean())
    return total


def schedules(given: Subject, settings: Settings) -> Iterator[Row]:
    """Removing channels bit by bit against at once, at equal steps."""
    steps = settings["schedule_steps"]
    for seed in settings["schedule_seeds"]:
        for kind in settings["schedules"]:
            recipe = uniform_recipe(
                given.groups, settings["schedule_ratio"], 32, "activation", recovery=given.recovery(steps),
                schedule=Schedule(kind=kind),
            )  # fmt: skip
            yield _scored(with_seed(given, seed), recipe, schedule=kind, seed=seed)


def small(given: Subject, settings: Settings) -> Iterator[Row]:
    """Pruning, int8 and distillation together: 10 to 20 % of the size at 95 % of the capability."""
    assert given.bench is not None  # noqa: S101
    with tempfile.TemporaryDirectory() as folder:
        files = _Files(given.bench, Path(folder))
        for ratio in settings["small_ratios"]:
            recipe = uniform_recipe(
                given.groups,
                ratio,
                8,
                "activation",
                recovery=given.recovery(settings["steps"][given.name][-1]),
            )
            row = _scored(given, recipe, ratio=ratio) | files.measured(recipe)
            row["accuracy"] = _of_file(given, Path(row["file"]))
            yield row


def _of_file(given: Subject, path: Path) -> float:
    """Return the accuracy of an exported file on the test examples."""
    assert given.bench is not None  # noqa: S101
    hits = seen = 0
    for inputs, targets in given.test:
        outputs = given.bench.runtime.predict(path, [inputs])
        hits += int((outputs.argmax(1) == targets).sum())
        seen += len(targets)
    return hits / seen


def tickets(given: Subject, settings: Settings) -> Iterator[Row]:
    """Lottery tickets against random weights and random masks."""
    wanted = settings["tickets"]
    config = make_config(
        {
            "model": "cifar_resnet20",
            "data": f"imagefolder:{cifar()}",
            "weights": "none",
            "report_examples": settings["test_examples"],
        }
    )
    folder = CACHE / "tickets"
    record = compare_tickets(config, TicketSettings.model_validate(wanted), folder, ignore)
    for result in record.results:
        yield result.model_dump(mode="json")


def robustness(given: Subject, settings: Settings) -> Iterator[Row]:
    """Accuracy of compressed networks on corrupted images, and of their worst class."""
    assert given.bench is not None  # noqa: S101
    wanted, steps = settings["robustness"], given.recovery(settings["steps"][given.name][-1])
    recipes = {
        "dense": Recipe(),
        "int8": uniform_recipe(given.groups, 0.0, 8),
        "channels": uniform_recipe(given.groups, wanted["ratio"], 32, "activation", recovery=steps),
        "channels, int8": uniform_recipe(given.groups, wanted["ratio"], 8, "activation", recovery=steps),
        "weights": uniform_recipe(
            given.groups,
            0.0,
            32,
            recovery=steps,
            sparsity=wanted["sparsity"],
            mask=Mask(allocation="global"),
            schedule=_GRADUAL,
        ),
    }
    data = given.bench.workload.data
    report = data.report.unseal()
    with tempfile.TemporaryDirectory() as folder:
        files = _Files(given.bench, Path(folder))
        for name, recipe in recipes.items():
            path = Path(files.measured(recipe)["file"])

            def predict(batches: Iterator[torch.Tensor], path: Path = path) -> torch.Tensor:
                assert given.bench is not None  # noqa: S101
                return given.bench.runtime.predict(path, batches)

            found = measure_robustness(predict, report, data.classes, severities=(1, 3, 5))
            yield {
                "what": name,
                "accuracy": found.clean.accuracy.value,
                "worst_class": found.clean.worst_class.value,
                "corrupted": {f"{s.corruption} {s.severity}": s.accuracy.value for s in found.corrupted},
                "worst_corrupted": min(s.worst_class.value for s in found.corrupted),
            }


CLAIMS: dict[str, tuple[Callable[[Subject, Settings], Iterator[Row]], tuple[str, ...]]] = {
    "unstructured": (unstructured, NAMES),
    "structured": (structured, ("resnet20", "vit")),
    "heads": (heads, ("vit", "lm")),
    "layers": (layers, NAMES),
    "schedules": (schedules, ("resnet20",)),
    "small": (small, ("resnet20", "vit")),
    "tickets": (tickets, ("resnet20",)),
    "robustness": (robustness, ("resnet20",)),
}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
