"""Puts the networks of a finished pruning on fewer bits, one width after the other, until a budget is spent."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searches import Run

from autoprune.compress.pipeline import Compressed
from autoprune.config import make_config
from autoprune.deploy.runtime import Artifact
from autoprune.measure.latency import FINAL_PROTOCOL, measure_front
from autoprune.measure.record import Capability, Measurement
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

BITS = (8, 4, 6, 3, 2)
HOW = Quantization(scale="mse", rounding="gptq", bias_correction=True)
# Seconds that timing one artifact takes in the final session, at least.
_TIMING_S = 2.5


@dataclass(frozen=True)
class Deployed:
    """A file with its scores."""

    artifact: Artifact
    search: Capability
    report: Capability


# A network and its files, one for each target.
Made = list[tuple[Compressed, list[Deployed]]]


def quantize_front(run: Run, budget_s: float) -> dict[str, Any]:
    """Return what was measured of the quantized networks, and the seconds that all of the run took.

    Args:
        run: A finished search of ratios.
        budget_s: Seconds for the search and for this.
    """
    begun_s = time.monotonic()
    store = StudyStore.open(run.study)
    bench = bench_of(store)
    folder = Path(tempfile.mkdtemp(prefix="autoprune-afterwards-"))
    try:
        references = dense_files(bench, folder)
        made: Made = []
        for bits in BITS:
            for point in front_points(store):
                timing_s = _TIMING_S * len(bench.config.targets) * (len(made) + 2)
                if store.spent_s + time.monotonic() - begun_s + timing_s > budget_s:
                    break
                recipe = point.record.recipe
                assert recipe is not None  # noqa: S101
                network = bench.load(artifact_folder(store.paths, point.record))
                place = folder / str(len(made))
                place.mkdir()
                made.append((network, deployed(bench, network, with_bits(recipe, bits, bench.groups), place)))
        further = measured(bench, made, references)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    spent_s = store.spent_s + time.monotonic() - begun_s
    return {"further": [m.model_dump(mode="json") for m in further], "spent_s": spent_s}


def bench_of(store: StudyStore) -> Bench:
    """Return the bench of a finished study."""
    config = make_config({k: v for k, v in store.settings().items() if k != "study"})
    groups = Groups.model_validate_json(store.notes()["groups"])
    bench = Bench.build(config, as_groups_say(load_workload(config), groups), groups, gradients=False)
    dense = dense_record(store.records())
    assert dense is not None  # noqa: S101
    bench.adopt_dense(artifact_folder(store.paths, dense), dense)
    return bench


def dense_files(bench: Bench, folder: Path) -> list[Path]:
    """Return the dense network's file for each target."""
    assert bench.dense is not None  # noqa: S101
    dense = Compressed(bench.workload.model)
    return [
        bench.dense.path,
        *(bench.deploy_on(target, dense, Recipe(), folder).path for target in bench.config.also),
    ]


def with_bits(recipe: Recipe, bits: int, groups: Groups) -> Recipe:
    """Return a recipe with all weights in so many bits."""
    chosen = {
        g.name: recipe.choice(g.name).model_copy(update={"bits": bits if g.producers else 32})
        for g in groups.groups
    }
    return recipe.model_copy(update={"groups": chosen, "quantization": HOW})


def deployed(bench: Bench, network: Compressed, recipe: Recipe, place: Path) -> list[Deployed]:
    """Return a network's files for each target, with their scores."""

    def scored(target: Target, artifact: Artifact) -> Deployed:
        runtime, data = bench.runtime_of(target), bench.workload.data
        splits = (data.search, data.report.unseal())
        return Deployed(
            artifact, *(evaluate_file(runtime, artifact.path, s, bench.workload.metric) for s in splits)
        )

    files = [bench.deploy(network, recipe, place)]
    files += [bench.deploy_on(target, network, recipe, place) for target in bench.config.also]
    return [scored(target, file) for target, file in zip(bench.config.targets, files, strict=True)]


def measured(bench: Bench, made: Made, references: list[Path]) -> list[Measurement]:
    """Time all files of each target interleaved; return the first target's measurements with the others' in them."""
    on: list[list[Measurement]] = []
    for number, target in enumerate(bench.config.targets):
        files = [each[number] for _, each in made]
        timed = measure_front(
            [file.artifact.path for file in files],
            references[number],
            target,
            bench.workload.data.input_shape,
            protocol=FINAL_PROTOCOL,
        )
        on.append(
            [
                assemble(
                    bench,
                    network.model,
                    file.artifact,
                    latency,
                    figures,
                    search=file.search,
                    report=file.report,
                    reference=references[number],
                )
                for (network, _), file, (latency, figures) in zip(made, files, timed, strict=True)
            ]
        )
    specs = [target.spec for target in bench.config.also]
    return [
        first.model_copy(update={"elsewhere": dict(zip(specs, others, strict=True))})
        for first, *others in zip(*on, strict=True)
    ]
