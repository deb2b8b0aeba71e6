"""Points of the final front: exported into their final place, scored on both splits, timed in one session."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from autoprune.compress.pipeline import Compressed
from autoprune.deploy.runtime import Artifact
from autoprune.errors import TrialError
from autoprune.measure.figures import RunProtocol, within
from autoprune.measure.latency import measure_front
from autoprune.measure.record import Capability, Latency, RunFigures
from autoprune.search.bench import Bench
from autoprune.search.budget import CLOSING_S
from autoprune.search.driver import Driver
from autoprune.search.jobs import describe, with_steps
from autoprune.search.trial import assemble, evaluate, failures_as_trial_errors
from autoprune.space.recipe import Recipe
from autoprune.study.artifacts import commit_folder, temporary_folder
from autoprune.study.records import TrialRecord


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
    """

    parent: TrialRecord
    recipe: Recipe
    compressed: Compressed
    artifact: Artifact
    search: Capability
    report: Capability


class Points:
    """Makes and measures the points of a final phase.

    Args:
        driver: The driver of the study.
        bench: What the trials share.
    """

    def __init__(self, driver: Driver, bench: Bench) -> None:
        self.driver = driver
        self.bench = bench

    def make(self, record: TrialRecord, compressed: Compressed) -> FinalPoint | None:
        """Export one point into its final place and score it on both splits."""
        if record.recipe is None:
            return None
        steps = compressed.train_steps
        recipe = record.recipe.model_copy(update={"recovery": with_steps(record.recipe.recovery, steps)})
        self.driver.listener(self.driver.progress(f"final measurement of trial {record.number}", "measure"))
        folder = temporary_folder(self.driver.paths.artifacts)
        try:
            with failures_as_trial_errors():
                artifact = self.bench.deploy(compressed.model, recipe, folder)
                self.bench.save(compressed, recipe, folder)
                search = evaluate(self.bench, artifact, self.bench.workload.data.search)
                report = evaluate(self.bench, artifact, self.bench.workload.data.report.unseal())
                place = self.driver.paths.final_artifact(record.number, self.driver.store.round)
                commit_folder(folder, place)
        except TrialError as error:
            self.driver.note_final_failure(record, error)
            return None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        moved = Artifact(
            path=place / artifact.path.name, executed=artifact.executed, parity_error=artifact.parity_error
        )
        return FinalPoint(record, recipe, compressed, moved, search, report)

    def _measured(self, paths: list[Path], dense: Path) -> list[tuple[Latency, RunFigures]]:
        shape = self.bench.workload.data.input_shape
        return measure_front(
            paths, dense, self.bench.config.target, shape, run=self._run_protocol(len(paths))
        )

    def _run_protocol(self, count: int) -> RunProtocol:
        """Return how long is measured besides latency: as planned, less where the time left is less."""
        keeper = self.driver.keeper
        each_s = keeper.figures_s(count)
        if keeper.left_s is not None:
            # The dense network is measured with them.
            left_s = (keeper.left_s - CLOSING_S) / (count + 1) - self.bench.timings.timing_s()
            each_s = min(each_s, left_s)
        return within(each_s)

    def measure(self, points: list[FinalPoint], started_from: Mapping[int, int]) -> None:
        """Measure all points and the dense network interleaved in one session, and record them.

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
            timed = self._measured(paths, dense.path)
        except TrialError as error:
            if len(points) == 1:
                self.driver.note_final_failure(points[0].parent, error)
                return
            for point in points:  # one that cannot be timed must not take the others with it
                self.measure([point], started_from)
            return
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
            number = self.driver.store.add_final(
                point.parent,
                measurement,
                recipe=point.recipe,
                train_steps=point.compressed.train_steps,
                duration_s=each_s,
                label=point.parent.label or f"{point.parent.origin} #{point.parent.number}",
                started_from=started_from.get(point.parent.number),
                ended_s=self.driver.keeper.spent_s,
            )
            self.driver.reload()
            self.driver.listener(
                self.driver.progress(f"final point {number}", "measure", describe(number, measurement))
            )
