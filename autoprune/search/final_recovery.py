"""Long recovery of the final phase's networks: each trained for its share of the time, the mildest cuts first."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

from autoprune.compress.aware import IntegerTraining
from autoprune.compress.finetune import Trainer
from autoprune.compress.lowrank import with_factors
from autoprune.compress.masking import hold_zeros, masked_layers
from autoprune.compress.pipeline import Compressed
from autoprune.faults import reached
from autoprune.search.bench import Bench
from autoprune.search.driver import Driver
from autoprune.search.fidelity import INHERITED
from autoprune.search.jobs import with_steps
from autoprune.search.lineage import prunes_further
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
        compressed = self._from_line(record, compressed)
        earlier = self._earlier.get(record.number)
        clock = self.driver.clock
        begun_s = clock.monotonic()
        network = deepcopy(compressed.model)
        integers = IntegerTraining.of(network, recipe, self.bench.groups, self.bench.config.target.facts.int8)
        if recipe.trains_integers:  # no other recipe's network goes on from this one
            self._integers.add(record.number)
        trainer = Trainer(
            network,
            self.bench.stream,
            self._recovery_of(recipe),
            loss=self.bench.workload.loss,
            device=self.bench.device,
            training_step=self.bench.workload.training_step,
            # The same batches for all, of which the teacher has to be asked once; new ones in a later round.
            start_step=earlier.train_steps if earlier is not None else 0,
        )
        groups = self.bench.groups
        masked = masked_layers(recipe, groups, groups.removed_blocks(recipe.kept_counts(groups)))
        hold_zeros(with_factors(trainer.model, list(masked)))(trainer)
        integers.watch(trainer)
        steps = trainer.run_for(lambda: (clock.monotonic() - begun_s) / slot_s, stop=self.driver.interrupt)
        trained = Compressed(
            model=integers.finish(trainer.finish()),
            plan=compressed.plan,
            train_steps=compressed.train_steps + steps,
            solved=[],
            factorised=compressed.factorised,
            ranges=integers.ranges,
        )
        if not self.driver.interrupt():
            folder = temporary_folder(self.paths.artifacts)
            self.bench.save(trained, recipe, folder)
            if record.number in self.started_from:
                self.driver.store.note(self._line_note(record), str(self.started_from[record.number]))
            commit_folder(folder, checkpoint)
            reached("final:recovered")
            self._lines[record.number] = trained
        return trained

    def _line_note(self, record: TrialRecord) -> str:
        return f"line:{self.round}:{record.number}"

    def _recovery_of(self, recipe: Recipe) -> Recovery:
        """Return how a network is trained: as in its trial, but for the default search, whose rungs train briefly."""
        auto = self.bench.config.sampler == "auto"
        return self.driver.space.default_recovery() if auto else recipe.recovery

    def _from_line(self, record: TrialRecord, own: Compressed) -> Compressed:
        """Return the network to continue: the trial's own, or a network of this phase that it cuts further.

        Networks come from the mildest on, so that each one's training goes on in those that follow.
        """
        recipe = record.recipe
        if recipe is None or not self.bench.config.has_lineage:
            return own
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
            return own
        _, number = max(parents)
        self.started_from[record.number] = number
        untrained = recipe.model_copy(update={"recovery": with_steps(recipe.recovery, 0)})
        return self.bench.compressed(untrained, start=self.paths.recovered(number, self.round))

    def untrained(self, record: TrialRecord) -> Compressed:
        """Return the network that a trial left; made once more from its recipe where its artifact is damaged."""
        if record.recipe is None or not record.recipe.prunes:
            return Compressed(self.bench.workload.model)
        for kept in (self._earlier.get(record.number), record):
            if kept is not None and usable(folder := artifact_folder(self.paths, kept)):
                return self.bench.load(folder)
        self.driver.say(f"the network of trial {record.number} is made again")
        start = None if record.started_from is None else self.paths.artifact(record.started_from)
        sound = start is not None and usable(start)
        return self.bench.compressed(record.recipe, self.driver.interrupt, start if sound else None)
