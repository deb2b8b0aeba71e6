"""The default search: propose from the profile, screen many, train few, more for fewer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from autoprune.clock import Clock
from autoprune.config import StudyConfig
from autoprune.errors import TrialError
from autoprune.search.baselines import Baseline
from autoprune.search.candidates import Candidate, as_timed
from autoprune.search.driver import (
    MAX_FAILURES_IN_A_ROW,
    MAX_RETRIES,
    UNFINISHED,
    Driver,
    too_many_failures,
)
from autoprune.search.fidelity import Step, steps_between_rungs
from autoprune.search.jobs import Job, brief, with_steps
from autoprune.search.lineage import find_parent
from autoprune.search.options import Options
from autoprune.search.promotion import is_hopeless, uncovered
from autoprune.search.proposals import Proposal, Proposer, Result
from autoprune.search.severity import ALL_LOST, severity, volume_ends
from autoprune.search.solver import Choices
from autoprune.search.volume import Array, pick_greedily
from autoprune.space.recipe import Recipe
from autoprune.study.records import TrialRecord
from autoprune.study.screens import Screen, append_screens, read_screens

# Screens before anything is trained, as far as they fit into this share of the search's time.
_FIRST_SCREENS = 16
_FIRST_SHARE = 0.25
# However short the time is, so many uniform recipes are looked at.
_LEAST_BASELINES = 2
# Where there is no time for so many solutions for each axis, those of the largest predicted gain are better.
_LEAST_ANCHORS = 4
# Solutions for each axis and network of the final recovery.
_ANCHORS = 2
# Screening ends when so many in a row together gained less than this share of the volume.
_STALLED_AFTER = 60
_STALLED_GAIN = 0.01
# In the last part of the search's time nothing new is looked at: what was found is trained.
_LAST_SHARE = 0.35
# Trained recipes that add most volume, before any that fill gaps along the axes.
_LEAST_BY_VOLUME = 4
# Trained recipes for each network of the final recovery, from which they are chosen.
_CHOICE_FOR_FINAL = 1.5
# Trials after which the predictions of latency are corrected again.
_CORRECT_EVERY = 3
# Screens for one line of progress.
_TOLD_EVERY = 10

ScreenFunction = Callable[[Recipe], float]


class AutoSearch:
    """Decides what is screened, trained and trained further.

    Args:
        driver: Runs and records trials; the dense network and what needs no training are there.
        options: Options of every group and their predicted costs.
        screen: Returns the capability that a recipe loses after closed-form recovery alone, by a few examples.
        config: Settings of the study.
        clock: Source of time.
    """

    def __init__(
        self, driver: Driver, options: Options, screen: ScreenFunction, config: StudyConfig, clock: Clock
    ) -> None:
        self.driver = driver
        self.options = options
        self.config = config
        self.clock = clock
        default = driver.space.default_recovery()
        # A space that trains nothing needs no rung above the first export.
        self.rungs = driver.space.rungs if default.finetune_steps else driver.space.rungs[:2]
        self._trains = default.finetune_steps > 0
        self.candidates: dict[bytes, Candidate] = {}
        self._screen = screen
        self._recovery = with_steps(default, 0)
        self._screen_s: list[float] = []
        self._dense = driver.outlook.dense_measurement().search.value
        self._scales = volume_ends(driver.outlook.dense_measurement(), config.limits)
        self.proposer = Proposer(
            options.problem,
            self._scales_at(self._lowest),
            config.objectives,
            seed=config.seed,
            use_solver=config.auto.solver,
            canonical=options.canonical,
            within=options.within if config.auto.lineage else None,
            capped_loss=config.limits.min_accuracy is not None,
        )
        self._corrected_by = 0
        self._failed_screens = 0
        self._whole_s: float | None = None
        self._prunes = any(kept < o.group.size for o in options.of for kept in o.kept)

    def run(self, baselines: Iterable[Baseline]) -> None:
        """Search until the search's share of the budget is spent, or nothing more is to be gained.

        Args:
            baselines: Recipes to begin with.
        """
        self._whole_s = self.driver.keeper.search_left_s()
        self._take_free()
        self._replay()
        for number, baseline in enumerate(baselines):
            if number >= _LEAST_BASELINES and number >= self._fitting(_FIRST_SHARE / 2):
                break
            choice = self.options.encode(baseline.recipe)
            if self._key(choice) not in self.candidates and self.driver.may_propose():
                self._evaluate(Proposal(choice, "baseline"), baseline.label, 0.0, baseline.recipe)
        if self.config.auto.solver:
            axes = max(1, int(self.proposer.axes.counts[1:].sum()))
            parts = int(min(self._fitting(_FIRST_SHARE) / axes, _ANCHORS * self.config.most_networks))
            begun_s = self.clock.monotonic()
            anchors = self.proposer.anchors(parts) if parts >= _LEAST_ANCHORS else []
            each_s = (self.clock.monotonic() - begun_s) / max(1, len(anchors))
            for choice in anchors:
                if self._key(choice) not in self.candidates and self.driver.may_propose():
                    self._evaluate(Proposal(choice, "solver"), "", each_s)
        while self.driver.may_propose() and self._do_next():
            pass

    @property
    def _lowest(self) -> int:
        """The rung that every proposal goes through."""
        return 0 if self.config.auto.screening else 1

    # -- what is done next -------------------------------------------------------------------

    def _do_next(self) -> bool:
        """Promote what is due, else look at something new; return False when there is nothing left to do."""
        rungs = range(len(self.rungs) - 2, self._lowest - 1, -1)
        if any(self._is_due(rung) and self._promote(rung) for rung in rungs):
            return True
        if not self._is_stalled():
            begun_s = self.clock.monotonic()
            proposal = self.proposer.propose()
            if proposal is not None:
                self._evaluate(proposal, "", self.clock.monotonic() - begun_s)
                return True
        # The time that is left is the final recovery's, once there is enough for it to choose from.
        if self._lowest == 1:
            return False
        if self._count(1) < _LEAST_BY_VOLUME and self._promote(0):
            return True
        enough = _CHOICE_FOR_FINAL * self.config.most_networks
        return self._fill_gap() or (self._count(1) < enough and self._promote(0))

    def _fill_gap(self) -> bool:
        """Train a recipe in a part of the costs where none was trained; return whether there was one."""
        while True:
            pool = [c for c in self.candidates.values() if c.recipe.prunes and 0 in c.lost and not c.hopeless]
            scaled = self._scaled(pool, 0)
            # What exceeds the cap on another axis covers nothing.
            within = np.flatnonzero((scaled < 1.0).all(axis=1))
            pool = [pool[row] for row in within]
            counted = scaled[within][:, self.proposer.axes.counts > 0]
            if not pool or counted.shape[1] < 2:
                return False
            found = uncovered(counted, [1 in c.lost for c in pool], self.config.most_networks)
            if found is None or not self.driver.fits(self.rungs[1].steps):
                return False
            if not self._is_hopeless(pool[found], 0):
                self._train(pool[found], 1)
                pool[found].lost.setdefault(1, ALL_LOST)
                return True
            pool[found].hopeless = True

    def _is_due(self, rung: int) -> bool:
        """Return whether the rung above has fewer results than its share."""
        if rung == 0 and self._count(0) < self._first_screens():
            return False
        return self._count(rung + 1) < int(self.steps()[rung].promoted_share * self._count(rung))

    def _count(self, rung: int) -> int:
        return sum(rung in c.lost and (rung == 0 or self._counts(c)) for c in self.candidates.values())

    def _counts(self, candidate: Candidate) -> bool:
        """Return whether a candidate is one that trainings are for; where nothing can be cut, all are."""
        return candidate.recipe.prunes or not self._prunes

    def _first_screens(self) -> int:
        return int(np.clip(self._fitting(_FIRST_SHARE), 2, _FIRST_SCREENS))

    def _fitting(self, share: float) -> float:
        """Return how many screens fit into a share of the search's time that is left; infinite where not known."""
        left_s = self.driver.keeper.search_left_s()
        if left_s is None or not self._screen_s:
            return math.inf
        return share * max(left_s, 0.0) / max(float(np.median(self._screen_s)), 1e-9)

    def _is_stalled(self) -> bool:
        left_s = self.driver.keeper.search_left_s()
        if left_s is not None and self._whole_s is not None and left_s < _LAST_SHARE * self._whole_s:
            return True
        results = len(self.proposer.results)
        return results > 2 * _STALLED_AFTER and self.proposer.gained_lately(_STALLED_AFTER) < _STALLED_GAIN

    # -- screening and training --------------------------------------------------------------

    def _evaluate(
        self, proposal: Proposal, label: str, proposal_s: float, given: Recipe | None = None
    ) -> None:
        """Screen a proposal, or the recipe that it stands for; train it at once where screening is switched off."""
        recipe = self.options.recipe(proposal.choice, self._recovery)
        if given is not None:
            recipe = given.model_copy(update={"recovery": self._recovery})
        costs = self.options.predicted_costs(proposal.choice)
        candidate = Candidate(recipe, proposal.arm, label, costs)
        if self._lowest == 1:
            self._train(candidate, 1)
            candidate.lost.setdefault(1, ALL_LOST)  # one that failed must not be proposed again
            self._take(proposal, candidate)
            return
        begun_s = self.clock.monotonic()
        if len(self.proposer.results) % _TOLD_EVERY == 0:
            self.driver.say(f"screening, {len(self.proposer.results)} recipes so far")
        try:
            lost = self._screen(recipe)
            self._failed_screens = 0
        except TrialError as error:
            self.driver.record_failure(recipe, proposal.arm, label, error, self.clock.monotonic() - begun_s)
            lost = ALL_LOST
            self._failed_screens += 1
            if self._failed_screens == MAX_FAILURES_IN_A_ROW:
                raise too_many_failures("screens", error) from error
        screen = Screen(
            recipe=recipe,
            arm=proposal.arm,
            label=label,
            weights=proposal.weights,
            lost=lost,
            size_ratio=costs[0],
            latency_ratio=costs[1],
            duration_s=self.clock.monotonic() - begun_s,
            proposal_s=proposal_s,
            ended_s=self.driver.keeper.spent_s,
        )
        append_screens(self.driver.paths, [screen])
        self._take_screen(proposal.choice, screen)

    def _take_screen(self, choice: Choices, screen: Screen) -> None:
        candidate = Candidate(
            screen.recipe,
            screen.arm,
            screen.label,
            (screen.size_ratio, screen.latency_ratio),
            {0: severity(screen.lost, self._dense)},
            screened=screen.lost,
        )
        self._screen_s.append(screen.duration_s)
        self._take(Proposal(choice, screen.arm, screen.weights), candidate)

    def _take(self, proposal: Proposal, candidate: Candidate) -> None:
        self.candidates[self._key(proposal.choice)] = candidate
        values = np.array(candidate.values(self._lowest))
        self.proposer.add(Result(proposal.choice, proposal.arm, values, proposal.weights))

    def _promote(self, rung: int) -> bool:
        """Train the candidate of ``rung`` that adds most to those that were promoted; return whether there was one."""
        at_rung = [c for c in self.candidates.values() if rung in c.lost]
        waiting = [
            c for c in at_rung if rung + 1 not in c.lost and not c.hopeless and (rung == 0 or self._counts(c))
        ]
        known = self._scaled([c for c in at_rung if rung + 1 in c.lost], rung)
        while waiting:
            best = pick_greedily(known, self._scaled(waiting, rung), 1)
            if not best:
                return False
            chosen = waiting.pop(best[0])
            if self._is_hopeless(chosen, rung):
                chosen.hopeless = True
                continue
            if not self.driver.fits(self.rungs[rung + 1].steps):
                return False
            self._train(chosen, rung + 1)
            chosen.lost.setdefault(rung + 1, ALL_LOST)
            return True
        return False

    def _is_hopeless(self, candidate: Candidate, rung: int) -> bool:
        """Return whether a trained network beats what the candidate may at best come to."""
        best = np.array(candidate.values(rung)) * np.array([self.steps()[rung].hopeful_loss, 1.0, 1.0])
        others = [c.values(rung + 1) for c in self.candidates.values() if rung + 1 in c.trials]
        counts = self.proposer.axes.counts
        return is_hopeless(best * counts, np.array(others).reshape(-1, 3) * counts)

    def _train(self, candidate: Candidate, rung: int) -> None:
        """Run a trial that takes a candidate to ``rung``."""
        earlier = candidate.trials.get(rung - 1)
        if earlier is not None and not self.driver.has_artifact(earlier):
            earlier = None  # it was not worth keeping then: all steps are taken anew
        steps = self.rungs[rung].steps - (self.rungs[rung - 1].steps if earlier is not None else 0)
        recipe = candidate.recipe.model_copy(
            update={"recovery": brief(self._recovery, steps) if self._trains else self._recovery}
        )
        start = earlier
        if start is None and self.config.auto.lineage and recipe.prunes:
            counts = recipe.kept_counts(self.driver.groups)
            start = find_parent(counts, self.driver.records, self.driver.groups, self.driver.has_artifact)
        self.driver.trial(
            Job(
                recipe=recipe,
                origin=candidate.arm,
                label=candidate.label,
                rung=rung,
                started_from=None if start is None else start.number,
                screened=candidate.screened,
            )
        )
        self._note_trial(candidate, self.driver.records[-1])
        if rung == 1 and self._lowest == 0:
            self.proposer.rescale(float(self._scales_at(0)[0]))
            self._correct_costs()

    def _correct_costs(self) -> None:
        """Fit the predictions of latency to the trials too, once there are some more of them."""
        trained = [c for c in self.candidates.values() if c.trials]
        if len(trained) < self._corrected_by + _CORRECT_EVERY:
            return
        self._corrected_by = len(trained)
        self.options = self.options.corrected([as_timed(c, self.driver.groups) for c in trained])
        for key, candidate in self.candidates.items():
            if not candidate.trials:
                candidate.costs = self.options.predicted_costs(np.frombuffer(key, dtype=np.int64))
        costs = np.array([self.candidates[self._key(r.choice)].costs for r in self.proposer.results])
        self.proposer.correct(self.options.problem, costs)

    def _key(self, choice: Choices) -> bytes:
        return self.options.canonical(choice).tobytes()

    def _note_trial(self, candidate: Candidate, record: TrialRecord) -> None:
        measured = record.measurement
        if record.state != "complete" or measured is None:
            return
        candidate.trials[record.rung] = record
        candidate.lost[record.rung] = severity(self._dense - measured.search.value, self._dense)
        candidate.costs = (measured.size_ratio, measured.latency.ratio)

    # -- what is known -----------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """Return how each rung's results relate to the next one's so far."""
        return steps_between_rungs(self.driver.records, len(self.rungs))

    def _scaled(self, candidates: Sequence[Candidate], rung: int) -> Array:
        """Return results of ``rung`` as shares of where the volume ends, ``(n, 3)``."""
        values = np.array([c.values(rung) for c in candidates]).reshape(-1, 3)
        return self.proposer.axes.scaled(values, float(self._scales_at(rung)[0]))

    def _scales_at(self, rung: int) -> Array:
        """Return where the volume ends in results of ``rung``, which lose more than they will in the end."""
        left = self.driver.outlook.left_by_rung()[rung]
        scales: Array = self._scales / np.array([max(left, 1e-3), 1.0, 1.0])
        return scales

    def _replay(self) -> None:
        """Take up what earlier runs of the study screened and trained."""
        for screen in read_screens(self.driver.paths):
            self._take_screen(self.options.encode(screen.recipe), screen)
        tries: Counter[bytes] = Counter()
        for record in self.driver.records:
            if record.fidelity != "search" or record.rung < 1 or record.recipe is None:
                continue
            choice = self.options.encode(record.recipe)
            key = self._key(choice)
            candidate = self.candidates.get(key)
            if candidate is None:
                if self._lowest == 0 or record.rung > 1:
                    continue
                costs = self.options.predicted_costs(choice)
                candidate = Candidate(record.recipe, record.origin, record.label, costs)
            tries[key] += record.failure_kind in UNFINISHED
            self._note_trial(candidate, record)
            if record.state == "failed" and (
                record.failure_kind not in UNFINISHED or tries[key] > MAX_RETRIES
            ):
                candidate.lost.setdefault(record.rung, ALL_LOST)
            if key not in self.candidates and 1 in candidate.lost:
                self._take(Proposal(choice, record.origin), candidate)

    def _take_free(self) -> None:
        """Take up what needs no training, the dense network and int8 alone, so that nothing is done that they beat."""
        for record in self.driver.records:
            measured = record.measurement
            if not record.is_measured_search or measured is None or record.recipe is None:
                continue
            if record.recipe.prunes or record.origin not in ("dense", "baseline"):
                continue
            lost = severity(max(0.0, self._dense - measured.search.value), self._dense)
            candidate = Candidate(
                record.recipe,
                record.origin,
                record.label,
                (measured.size_ratio, measured.latency.ratio),
                dict.fromkeys(range(self._lowest, len(self.rungs)), lost),
                dict.fromkeys(range(1, len(self.rungs)), record),
            )
            choice = self.options.encode(record.recipe)
            if self._key(choice) not in self.candidates:
                self._take(Proposal(choice, record.origin), candidate)
