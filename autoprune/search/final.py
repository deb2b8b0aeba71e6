"""The final phase: long recovery of the front, then every point measured again in one session."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from functools import partial

from autoprune.compress.pipeline import Compressed
from autoprune.errors import TrialError
from autoprune.search.bench import Bench
from autoprune.search.driver import Driver
from autoprune.search.final_recovery import LongRecovery
from autoprune.search.points import Points
from autoprune.search.trial import failures_as_trial_errors
from autoprune.search.variants import Variants, narrower
from autoprune.study.artifacts import usable
from autoprune.study.front import front_numbers
from autoprune.study.records import TrialRecord
from autoprune.study.retries import MAX_RETRIES, WORKER_LOST

# A network that gets fewer steps than this multiple of a trial's is better left out in favour of the others.
_LEAST_GAIN = 4
_LEAST_FREE = 2
# Networks that do not cover the axes have to promise this much more volume.
_HARDLY_MORE = 1.1
# The volume hardly depends on their number: the more there are to choose from, the better.
_HARDLY_LESS = 0.97

# For each network its trials, the leading one first.
Networks = list[list[TrialRecord]]


def choose_number(
    covering: Sequence[tuple[float, Networks]], others: Sequence[tuple[float, Networks]]
) -> Networks:
    """Return the most networks that promise hardly less than the best number of them.

    Args:
        covering: Choices that cover the axes, the largest first, with the volume that each promises to add.
        others: Choices that only add volume; the best of them is taken where it promises clearly more.
    """
    best = max((volume for volume, _ in covering), default=0.0)
    promised, rival = max(others, key=lambda choice: choice[0], default=(0.0, []))
    if promised > _HARDLY_MORE * best:
        return rival
    return next((networks for volume, networks in covering if volume >= _HARDLY_LESS * best), [])


def slot_of(index: int, needs: Sequence[float], workers: int) -> float:
    """Return the share of the time left that a network's training gets when it begins.

    One worker shares the time out by need. Several train side by side in as many waves as are needed, and the networks
    of one wave get the same, so that the last, which is the deepest cut, is not left with the rest.

    Args:
        index: Place of the network; those before it have begun.
        needs: Weight of each network.
        workers: Networks that are trained side by side.
    """
    if workers == 1:
        return needs[index] / sum(needs[index:])
    waves = math.ceil(len(needs) / workers) - index // workers
    return 1.0 / waves


class FinalPhase:
    """Trains, exports and measures the points that the user will choose from.

    Args:
        driver: The driver of the study, after its search.
        bench: What the trials share.
    """

    def __init__(self, driver: Driver, bench: Bench) -> None:
        self.driver = driver
        self.bench = bench
        self.paths = driver.paths
        self.keeper = driver.keeper
        self.points = Points(driver, bench)
        self.round = driver.store.round
        finals = [r for r in driver.records if r.fidelity == "final"]
        self.done = {r.parent for r in finals if r.round == self.round and not r.variant}
        # What earlier rounds left of a trial: the weights that this round continues.
        self._earlier = {r.parent: r for r in finals if r.round < self.round and not r.variant}
        self.recovery = LongRecovery(driver, bench, self._earlier)
        # What a run of this phase that was ended has trained and not measured.
        self._trained = {
            r.number
            for r in driver.records
            if r.number not in self.done and usable(self.paths.recovered(r.number, self.round))
        }
        self._most_free: int | None = None
        self._trains = True

    def reserve_s(self, artifacts: int | None = None) -> float:
        """Return the seconds that exporting, scoring and timing the front takes, from what trials took."""
        count = max(1, len(self._free()) if artifacts is None else artifacts)
        data = self.bench.workload.data
        examples = len(data.search) + data.report.examples
        targets = len(self.bench.config.targets)
        figures_s = self.keeper.figures_s(count * targets)
        return targets * self.bench.timings.artifacts_s(count, examples, figures_s)

    def run(self) -> None:
        """Recover the chosen networks and record every point of the front, measured in one session."""
        self._most_free = self._affordable_free()
        networks = self._networks()
        for record in [
            *self._free(),
            *self._kept_from_earlier(),
            *(r for members in networks for r in members),
        ]:
            self.driver.forget_final_failure(record)
        recovered = self._recover(networks)
        if self.driver.interrupt():
            return
        # A network whose recovery failed is measured as the search left it.
        trained = {
            record.number: compressed
            for members, compressed in zip(networks, recovered, strict=True)
            for record in members
        }
        wanted = {r.number for r in [*self._free(), *self._kept_from_earlier()]} | set(trained)
        chosen = [r for r in self.driver.records if r.number in wanted]
        made = [self.points.make(r, trained.get(r.number) or self.recovery.untrained(r)) for r in chosen]
        points = [point for point in made if point is not None]
        networks_made = [p for p in points if p.parent.number in trained]
        points += Variants(self.bench, self.points, self.driver.space, self._fits_variant).of(networks_made)
        if points:
            self.points.measure(points, self.recovery.started_from)
        for record in chosen:
            shutil.rmtree(self.paths.recovered(record.number, self.round), ignore_errors=True)

    def _free(self) -> list[TrialRecord]:
        """Return what needs no training: the dense network, int8 alone and what else on the front prunes nothing."""
        records = self.driver.records
        front = front_numbers(records, self.driver.store.objectives)
        found = [
            r
            for r in records
            if r.state == "complete"
            and r.fidelity == "search"
            and r.number not in self.done
            and r.recipe is not None
            and not r.recipe.prunes
            and r.repeat_of is None
            and (r.number in front or r.origin in ("dense", "baseline"))
        ]
        return found[: self._most_free]

    def _affordable_free(self) -> int:
        """Return how many of them there is time to measure; the dense network and int8 come first, and always."""
        count = len(self._free())
        while count > _LEAST_FREE and self.keeper.training_left_s(self.reserve_s(count)) < 0:
            count -= 1
        return count

    def _kept_from_earlier(self) -> list[TrialRecord]:
        """Return trials whose recovery by an earlier round may still be on the front."""
        return [
            r
            for r in self.driver.records
            if r.number in self._earlier
            and r.number not in self.done
            and r.recipe is not None
            and r.recipe.prunes
        ]

    def _networks(self) -> list[list[TrialRecord]]:
        """Choose the networks to train.

        The default search takes the most that promise about the largest volume in the time left: each costs the others
        training. Networks that cover the axes come before a choice that promises hardly more. A plain sampler's study
        takes as many as the time left can train for long enough.
        """
        config = self.bench.config
        auto = config.sampler == "auto"
        found: list[list[TrialRecord]] = []
        if auto:
            covering, others = (self._promising(covering=each) for each in (True, False))
            found = choose_number(covering, others)
        else:
            found = next((networks for networks, _ in self._affordable(covering=True)), found)
        self._trains = bool(found)
        return found or self._affordable_untrained()

    def _promising(self, *, covering: bool) -> list[tuple[float, Networks]]:
        """Return choices that there is time to train for long enough, with the volume that each promises to add."""
        outlook = self.driver.outlook
        untrained = outlook.expected_volume([], 0.0)
        # What is trained already is alike in all choices, however much time each of them has for the rest.
        even_s = (self.keeper.final_s or 0.0) / max(1, self.bench.config.most_networks)
        trained = dict.fromkeys(self._trained, even_s)
        return [
            (outlook.expected_volume(self._from_mildest(networks), slot_s, trained) - untrained, networks)
            for networks, slot_s in self._affordable(covering=covering)
        ]

    def _from_mildest(self, networks: Networks) -> Networks:
        """Return networks in the order of their cuts, where what is trained already was put first."""
        if not self._trained:
            return networks

        def kept(members: list[TrialRecord]) -> int:
            recipe = members[0].recipe
            return 0 if recipe is None else sum(recipe.kept_counts(self.bench.groups).values())

        return sorted(networks, key=kept, reverse=True)

    def _affordable(self, *, covering: bool) -> Iterator[tuple[Networks, float]]:
        """Yield choices that there is time to train for long enough, the largest first, and the seconds for each."""
        most = self.bench.config.most_networks
        while most >= 0:  # with none beside those that are trained already
            networks = self._unfinished(self.driver.outlook.networks(most, covering=covering))
            left_s = self.keeper.training_left_s(self.reserve_s(self._artifacts(networks)))
            waiting = networks[self._trained_of(networks) :]
            if networks and left_s >= len(waiting) * self._least_s(waiting):
                yield networks, left_s / max(1, len(waiting))
            most = min(most, len(networks)) - 1

    def _unfinished(self, networks: list[list[TrialRecord]]) -> list[list[TrialRecord]]:
        """Leave out what a killed run of this phase has measured, and begin with all that it has trained."""
        rest = [[r for r in members if r.number not in self.done] for members in networks]
        named = {r.number for members in rest for r in members}
        rest += [[r] for r in self.driver.records if r.number in self._trained - named]
        ordered = [sorted(members, key=self._is_waiting) for members in rest if members]
        return sorted(ordered, key=lambda members: self._is_waiting(members[0]))

    def _is_waiting(self, record: TrialRecord) -> bool:
        return record.number not in self._trained

    def _trained_of(self, networks: Networks) -> int:
        """Return how many networks, which come first, need no training any more."""
        return sum(members[0].number in self._trained for members in networks)

    def _least_s(self, networks: list[list[TrialRecord]]) -> float:
        """Return the seconds of training below which a network is not worth taking."""
        steps = max((self._trial_steps(members[0]) for members in networks), default=0)
        if self.bench.config.sampler == "auto" and steps:  # a higher rung's network was trained already
            steps = self.driver.space.rungs[1].steps
        return steps * self.bench.timings.step_s() * _LEAST_GAIN

    def _affordable_untrained(self) -> list[list[TrialRecord]]:
        """Return networks to be measured as the search left them, where there is no time to train any."""
        networks = self._unfinished(self.driver.outlook.networks(self.bench.config.most_networks))
        while networks and self.keeper.training_left_s(self.reserve_s(self._artifacts(networks))) < 0:
            networks = networks[:-1]
        return networks

    def _artifacts(self, networks: list[list[TrialRecord]]) -> int:
        """Return how many artifacts are to be measured with these networks."""
        trained = {r.number for members in networks for r in members}
        variants = sum(self._has_variants(members[0]) for members in networks)
        return len(self._free()) + len(trained | {r.number for r in self._kept_from_earlier()}) + variants

    def _has_variants(self, record: TrialRecord) -> bool:
        """Whether a network may be deployed in fewer bits too."""
        recipe = record.recipe
        if recipe is None:
            return False
        return next(narrower(recipe, self.bench.groups, self.driver.space), None) is not None

    def _fits_variant(self, artifacts: int) -> bool:
        """Return whether one more variant can be tried, made and measured beside so many artifacts."""
        if self.driver.interrupt() or self.keeper.left_s is None:
            return not self.driver.interrupt()
        timings, data = self.bench.timings, self.bench.workload.data
        examples = 2 * len(data.search) + data.report.examples
        targets = len(self.bench.config.targets)
        figures_s = self.keeper.figures_s((artifacts + 1) * targets)
        measuring_s = (artifacts + 2) * (timings.timing_s() + figures_s)
        # It is built twice: to be tried, and in its place.
        making_s = timings.artifacts_s(1, examples) + timings.artifacts_s(1, 0) - 2 * timings.timing_s()
        return self.keeper.training_left_s(targets * (measuring_s + making_s)) > 0

    @staticmethod
    def _trial_steps(record: TrialRecord) -> int:
        return record.recipe.recovery.finetune_steps if record.recipe is not None else 0

    # -- recovery ----------------------------------------------------------------------------

    def _recovered(self, record: TrialRecord, slot_s: float) -> Compressed:
        """Train one network; one whose worker is lost is trained again, for the time that is left of its share."""
        begun_s = self.driver.clock.monotonic()
        for left in reversed(range(MAX_RETRIES + 1)):
            spent_s = self.driver.clock.monotonic() - begun_s
            try:
                with failures_as_trial_errors():
                    return self.recovery.recover(record, max(0.0, slot_s - spent_s))
            except TrialError as error:
                if error.kind != WORKER_LOST or not left or self.driver.interrupt():
                    raise
        raise AssertionError("the last try returns or raises")

    def _recover(self, networks: list[list[TrialRecord]]) -> list[Compressed | None]:
        """Train each network for its share of the time that measuring leaves."""
        artifacts = self._artifacts(networks)
        needs = self.recovery.needs(networks)
        recovered: list[Compressed | None] = [None] * len(networks)
        workers, trained = self.driver.lanes.count, self._trained_of(networks)

        def recover(index: int) -> None:
            record = networks[index][0]
            self.driver.listener(
                self.driver.progress(
                    f"final recovery {index + 1} of {len(networks)} (trial {record.number})", "final"
                )
            )
            left_s = self.keeper.training_left_s(self.reserve_s(artifacts))
            slot_s = slot_of(index - trained, needs[trained:], workers) * left_s if index >= trained else 0.0
            try:
                recovered[index] = self._recovered(record, slot_s if self._trains else 0.0)
            except TrialError as error:
                self.driver.note_final_failure(record, error)
            self.driver.store.set_spent(self.keeper.spent_s)

        self.driver.run_each(partial(recover, index) for index in range(len(networks)))
        return recovered
