"""Points of the final front: exported into their final place, scored on both splits, timed in one session."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from autoprune.compress.pipeline import Compressed
from autoprune.deploy.runtime import Artifact, Runtime
from autoprune.errors import TrialError
from autoprune.faults import reached
from autoprune.measure.figures import FULL_RUN, RunProtocol, within
from autoprune.measure.latency import measure_front
from autoprune.measure.record import Capability, Latency, Measurement, RunFigures
from autoprune.search.bench import Bench
from autoprune.search.budget import CLOSING_S
from autoprune.search.driver import Driver
from autoprune.search.jobs import describe, with_steps
from autoprune.search.trial import assemble, evaluate_file, failures_as_trial_errors
from autoprune.space.recipe import Recipe
from autoprune.study.artifacts import commit_folder, temporary_folder
from autoprune.study.front import dense_number
from autoprune.study.records import TrialRecord
from autoprune.target import Target


@dataclass(frozen=True)
class Deployed:
    """A network's artifact for one target, scored there.

    Attributes:
        artifact: The exported model.
        search: Capability on the search split.
        report: Capability on the report split.
    """

    artifact: Artifact
    search: Capability
    report: Capability


@dataclass(frozen=True)
class FinalPoint:
    """One artifact of the final phase.

    Attributes:
        parent: The trial whose recipe it continues.
        recipe: The recipe with the steps that its network took in all.
        compressed: The recovered network.
        artifact: The exported model in its final place.
        search: Capability on the search split.
        report: Capability on the report split.
        elsewhere: The same network for further targets of the study, by the target's word.
        variant: What tells it from the point of the parent's own recipe; empty for that one.
    """

    parent: TrialRecord
    recipe: Recipe
    compressed: Compressed
    artifact: Artifact
    search: Capability
    report: Capability
    elsewhere: Mapping[str, Deployed] = field(default_factory=dict)
    variant: str = ""

    @property
    def label(self) -> str:
        """Its name for people."""
        own = self.parent.label or f"{self.parent.origin} #{self.parent.number}"
        return f"{own}, {self.variant.removeprefix('bits')} bits" if self.variant else own


class Points:
    """Makes and measures the points of a final phase.

    Args:
        driver: The driver of the study.
        bench: What the trials share.
    """

    def __init__(self, driver: Driver, bench: Bench) -> None:
        self.driver = driver
        self.bench = bench

    def make(
        self, record: TrialRecord, compressed: Compressed, own: Recipe | None = None, variant: str = ""
    ) -> FinalPoint | None:
        """Export one point into its final place and score it on both splits.

        Args:
            record: The trial that it continues.
            compressed: The recovered network.
            own: Its recipe; the trial's if not given.
            variant: What tells it from the point of the trial's recipe.
        """
        recipe = own or record.recipe
        if recipe is None:
            return None
        steps = compressed.train_steps
        recipe = recipe.model_copy(update={"recovery": with_steps(recipe.recovery, steps)})
        self.driver.listener(self.driver.progress(f"final measurement of trial {record.number}", "measure"))
        folder = temporary_folder(self.driver.paths.artifacts)
        bench = self.bench
        try:
            with failures_as_trial_errors():
                artifact = bench.deploy(compressed, recipe, folder)
                bench.save(compressed, recipe, folder)
                scored = self._scored(bench.runtime, artifact)
                elsewhere = {
                    target.spec: found
                    for target in bench.config.also
                    if (found := self._elsewhere(target, record, compressed, recipe, folder)) is not None
                }
                place = self.driver.paths.final_artifact(record.number, self.driver.store.round, variant)
                commit_folder(folder, place)
                self.driver.shelf.put(place)
                reached("final:committed")
        except TrialError as error:
            if variant:  # the network's own point is there
                self.driver.say(f"trial {record.number} as {variant} failed: {error.kind}: {error.reason}")
            else:
                self.driver.note_final_failure(record, error)
            return None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        moved = {spec: _moved(each, folder, place) for spec, each in elsewhere.items()}
        scored = _moved(scored, folder, place)
        return FinalPoint(
            record, recipe, compressed, scored.artifact, scored.search, scored.report, moved, variant
        )

    def _scored(self, runtime: Runtime, artifact: Artifact) -> Deployed:
        data, metric = self.bench.workload.data, self.bench.workload.metric
        search = evaluate_file(runtime, artifact.path, data.search, metric)
        return Deployed(artifact, search, evaluate_file(runtime, artifact.path, data.report.unseal(), metric))

    def _elsewhere(
        self, target: Target, record: TrialRecord, compressed: Compressed, recipe: Recipe, folder: Path
    ) -> Deployed | None:
        """Export and score a point for a further target; one that fails there stays without figures of it."""
        try:
            with failures_as_trial_errors():
                artifact = self.bench.deploy_on(target, compressed, recipe, folder)
                return self._scored(self.bench.runtime_of(target), artifact)
        except TrialError as error:
            self.driver.store.note(
                f"target_failure:{record.number}:{target.spec}", f"{error.kind}: {error.reason}"
            )
            self.driver.say(f"trial {record.number} on {target.spec} failed: {error.kind}: {error.reason}")
            return None

    def _measured(
        self, target: Target, paths: list[Path], dense: Path, sessions: int
    ) -> list[tuple[Latency, RunFigures]]:
        """Measure files and the dense one interleaved; ``sessions`` are to come, this one included."""
        shape = self.bench.workload.data.input_shape
        run = self._run_protocol(len(paths), sessions)
        return measure_front(paths, dense, target, shape, run=run)

    def _run_protocol(self, count: int, sessions: int) -> RunProtocol:
        """Return how long is measured besides latency: as planned, less where the time left is less."""
        keeper = self.driver.keeper
        if keeper.left_s is None:
            return FULL_RUN
        # The dense network is measured with them.
        left_s = (keeper.left_s - CLOSING_S) / (sessions * (count + 1)) - self.bench.timings.timing_s()
        return within(min(keeper.figures_s(count * len(self.bench.config.targets)), left_s))

    def measure(self, points: list[FinalPoint], started_from: Mapping[int, int]) -> None:
        """Measure all points and the dense network interleaved in one session on each target, and record them.

        Args:
            points: What :meth:`make` made.
            started_from: By trial, the trial whose final network it was cut from.
        """
        dense = self.bench.dense
        if dense is None:
            raise RuntimeError("the final phase needs the dense artifact, which trial 0 builds")
        clock = self.driver.clock
        begun_s = clock.monotonic()
        paths: list[Path] = [point.artifact.path for point in points]
        try:
            targets = self.bench.config.targets
            timed = self._measured(targets[0], paths, dense.path, len(targets))
        except TrialError as error:
            if len(points) == 1:
                self.driver.note_final_failure(points[0].parent, error)
                return
            for point in points:  # one that cannot be timed must not take the others with it
                self.measure([point], started_from)
            return
        elsewhere = self._measured_elsewhere(points)
        each_s = (clock.monotonic() - begun_s) / len(points)
        for point, (latency, figures) in zip(points, timed, strict=True):
            measurement = assemble(
                self.bench,
                point.compressed.model,
                point.artifact,
                latency,
                figures,
                search=point.search,
                report=point.report,
            )
            others = elsewhere.get((point.parent.number, point.variant), {})
            measurement = measurement.model_copy(update={"elsewhere": others})
            number = self.driver.store.add_final(
                point.parent,
                measurement,
                recipe=point.recipe,
                train_steps=point.compressed.train_steps,
                duration_s=each_s,
                label=point.label,
                variant=point.variant,
                started_from=started_from.get(point.parent.number),
                ended_s=self.driver.keeper.spent_s,
            )
            reached("final:told")
            self.driver.reload()
            self.driver.listener(
                self.driver.progress(f"final point {number}", "measure", describe(number, measurement))
            )

    def _measured_elsewhere(self, points: list[FinalPoint]) -> dict[tuple[int, str], dict[str, Measurement]]:
        """Time the points on each further target; return what was measured by trial and variant, and by target."""
        found: dict[tuple[int, str], dict[str, Measurement]] = {}
        for number, target in enumerate(self.bench.config.also):
            there = [
                (point, point.elsewhere[target.spec]) for point in points if target.spec in point.elsewhere
            ]
            dense = self._dense_on(target, points)
            if not there or dense is None:
                continue
            paths = [deployed.artifact.path for _, deployed in there]
            self.driver.listener(
                self.driver.progress(f"timing {len(paths)} points on {target.spec}", "measure")
            )
            try:
                timed = self._measured(target, paths, dense, len(self.bench.config.also) - number)
            except TrialError as error:
                self.driver.store.note(f"target_failure::{target.spec}", f"{error.kind}: {error.reason}")
                self.driver.say(f"timing on {target.spec} failed: {error.kind}: {error.reason}")
                continue
            for (point, deployed), (latency, figures) in zip(there, timed, strict=True):
                found.setdefault((point.parent.number, point.variant), {})[target.spec] = assemble(
                    self.bench,
                    point.compressed.model,
                    deployed.artifact,
                    latency,
                    figures,
                    search=deployed.search,
                    report=deployed.report,
                    reference=dense,
                )
        return found

    def _dense_on(self, target: Target, points: list[FinalPoint]) -> Path | None:
        """Return the dense network's file for a further target: of these points, or of what a killed run left."""
        records = self.driver.records
        number = dense_number(records)
        made = [
            p.elsewhere[target.spec]
            for p in points
            if p.parent.number == number and target.spec in p.elsewhere
        ]
        if made:
            return made[0].artifact.path
        if number is None:
            return None
        paths = self.driver.paths
        kept = paths.on_target(target.spec).in_artifact(paths.final_artifact(number, self.driver.store.round))
        return next(iter(kept.glob(f"*{Path(target.facts.model_file).suffix}")), None)


def _moved(deployed: Deployed, folder: Path, place: Path) -> Deployed:
    """Return an artifact as it lies in its final place."""
    artifact = deployed.artifact
    return replace(deployed, artifact=replace(artifact, path=place / artifact.path.relative_to(folder)))
