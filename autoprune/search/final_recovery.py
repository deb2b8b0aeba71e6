"""Long recovery of the final phase's networks: each trained for its share of the time, the mildest cuts first."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from autoprune.compress.pipeline import Compressed
from autoprune.faults import reached
from autoprune.measure.quiet import training
from autoprune.search.bench import Bench
from autoprune.search.driver import Driver
from autoprune.search.executors.contract import Request
from autoprune.search.fidelity import INHERITED
from autoprune.search.lineage import prunes_further
from autoprune.search.long_training import train_long
from autoprune.space.recipe import Recipe, Recovery
from autoprune.study.artifacts import artifact_folder, commit_folder, temporary_folder, usable
from autoprune.study.records import TrialRecord

# What a network that lost nothing counts as, against the one that lost most.
_LEAST_NEED = 0.05


class LongRecovery:
    """Trains networks of a final phase, and remembers them for those that cut them further.

    Args:
        driver: The driver of the study, after its search.
        bench: What the trials share.
        earlier: What earlier rounds left of a trial: the weights that this round continues.

    Attributes:
        started_from: By trial, the trial whose network of this phase it was cut from.
    """

    def __init__(self, driver: Driver, bench: Bench, earlier: Mapping[int | None, TrialRecord]) -> None:
        self.driver = driver
        self.bench = bench
        self.paths = driver.paths
        self.round = driver.store.round
        self._earlier = earlier
        # Networks that this phase recovered, by trial, and those of them that know of integers.
        self._lines: dict[int, Compressed] = {}
        self._integers: set[int] = set()
        self.started_from: dict[int, int] = {}

    def needs(self, networks: list[list[TrialRecord]]) -> list[float]:
        """Return each network's weight in sharing out the time; a mild cut is healed soon, a deep one never quite.

        It is the cube root of what the network lost in its trial, so that eight times the loss gets twice the time.
        """
        dense = next((r for r in self.driver.records if r.origin == "dense" and r.measurement), None)
        best = dense.measurement.search.value if dense and dense.measurement else 0.0
        values = [members[0].measurement for members in networks]
        lost = [best - m.search.value if m is not None else 0.0 for m in values]
        unit = max(lost, default=0.0)
        return [max(_LEAST_NEED, loss / unit if unit > 0 else 1.0) ** (1 / 3) for loss in lost]

    def recover(self, record: TrialRecord, slot_s: float) -> Compressed:
        """Continue the trial's network for ``slot_s`` seconds; a finished recovery of a killed run is reused."""
        checkpoint = self.paths.recovered(record.number, self.round)
        if usable(checkpoint):
            if record.recipe is not None and record.recipe.trains_integers:
                self._integers.add(record.number)
            self._lines[record.number] = self.bench.load(checkpoint)
            parent = self.driver.store.notes().get(self._line_note(record))
            if parent:
                self.started_from[record.number] = int(parent)
            return self._lines[record.number]
        compressed = self.untrained(record)
        recipe = record.recipe
        if (
            recipe is None
            or slot_s <= 0
            or recipe.recovery.finetune_steps == 0
            or recipe.order == "tune-prune-quantize"  # nothing is trained after the cut
            or self.driver.interrupt()
        ):
            return compressed
        line = self._line_of(record, compressed)
        if recipe.trains_integers:  # no other recipe's network goes on from this one
            self._integers.add(record.number)
        earlier = self._earlier.get(record.number)
        # The same batches for all, of which the teacher has to be asked once; new ones in a later round.
        start_step = earlier.train_steps if earlier is not None else 0
        folder, remade = (temporary_folder(self.paths.artifacts) for _ in range(2))
        own = self.paths.artifacts / f"{self.paths.artifact(record.number).name}-remade"
        try:
            source = self._own(record)
            if source is None and recipe.prunes:
                self.bench.save(compressed, recipe, remade)
                commit_folder(remade, own)
                source = own
            self._train(record, recipe, folder, source, line, slot_s, start_step)
            trained = self.bench.load(folder)
            if not self.driver.interrupt():
                if line is not None:
                    self.driver.store.note(self._line_note(record), str(line))
                commit_folder(folder, checkpoint)
                self.driver.shelf.put(checkpoint)
                reached("final:recovered")
                self._lines[record.number] = trained
        finally:
            for each in (folder, remade, own):
                shutil.rmtree(each, ignore_errors=True)
        return trained

    def _train(
        self,
        record: TrialRecord,
        recipe: Recipe,
        folder: Path,
        own: Path | None,
        line: int | None,
        slot_s: float,
        start_step: int,
    ) -> None:
        """Train a network for its time, here or in a worker, and leave it in ``folder``."""
        start = None if line is None else self.paths.recovered(line, self.round)
        executor = self.driver.executor
        if executor is None:
            with training(self.driver.interrupt) as stop:
                train_long(
                    self.bench,
                    recipe,
                    folder,
                    own=own,
                    line=start,
                    recovery=self._recovery_of(recipe),
                    slot_s=slot_s,
                    start_step=start_step,
                    stop=stop,
                    clock=self.driver.clock,
                )
            return
        request = Request(
            executor.next_token(),
            "recover",
            f"final recovery of trial {record.number}",
            recipe,
            folder,
            start=start,
            recovery=self._recovery_of(recipe),
            slot_s=slot_s,
            start_step=start_step,
            own=own,
        )
        with self.driver.lanes.waiting():
            executor.run(request)

    def _line_note(self, record: TrialRecord) -> str:
        return f"line:{self.round}:{record.number}"

    def _recovery_of(self, recipe: Recipe) -> Recovery:
        """Return how a network is trained: as in its trial, but for the default search, whose rungs train briefly."""
        auto = self.bench.config.sampler == "auto"
        return self.driver.space.default_recovery() if auto else recipe.recovery

    def _line_of(self, record: TrialRecord, own: Compressed) -> int | None:
        """Return the trial whose network of this phase is cut further instead of the trial's own; None for its own.

        Networks come from the mildest on, so that each one's training goes on in those that follow.
        """
        recipe = record.recipe
        if recipe is None or not self.bench.config.has_lineage:
            return None
        counts = recipe.kept_counts(self.bench.groups)
        parents = [
            (parent.train_steps, number)
            for number, parent in self._lines.items()
            # Its own training counts for more than what a parent took before the cut.
            if INHERITED * parent.train_steps > own.train_steps
            and number not in self._integers
            and prunes_further(counts, {g.name: parent.kept(g) for g in self.bench.groups.groups})
        ]
        if not parents:
            return None
        _, number = max(parents)
        self.started_from[record.number] = number
        return number

    def _own(self, record: TrialRecord) -> Path | None:
        """Return where the network lies that a trial left, undamaged; None for the dense one, or if there is none."""
        if record.recipe is None or not record.recipe.prunes:
            return None
        kept = [each for each in (self._earlier.get(record.number), record) if each is not None]
        return next((f for f in (artifact_folder(self.paths, each) for each in kept) if usable(f)), None)

    def untrained(self, record: TrialRecord) -> Compressed:
        """Return the network that a trial left; made once more from its recipe where its artifact is damaged."""
        if record.recipe is None or not record.recipe.prunes:
            return Compressed(self.bench.workload.model)
        own = self._own(record)
        if own is not None:
            return self.bench.load(own)
        self.driver.say(f"the network of trial {record.number} is made again")
        start = None if record.started_from is None else self.paths.artifact(record.started_from)
        sound = start is not None and usable(start)
        return self.bench.compressed(record.recipe, self.driver.interrupt, start if sound else None)
