"""The default search: propose from the profile, screen many, train few, more for fewer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from autoprune.clock import Clock
from autoprune.config import StudyConfig
from autoprune.errors import TrialError
from autoprune.faults import reached
from autoprune.search.baselines import Baseline
from autoprune.search.candidates import Candidate
from autoprune.search.driver import MAX_FAILURES_IN_A_ROW, Driver, too_many_failures
from autoprune.search.fidelity import Step
from autoprune.search.jobs import Job, brief, with_steps
from autoprune.search.lineage import find_parent
from autoprune.search.options import Options
from autoprune.search.pool import Pool
from autoprune.search.promotion import are_hopeless, uncovered
from autoprune.search.proposals import Proposal, Proposer, Result
from autoprune.search.replay import keep_anchors, kept_anchors, replay
from autoprune.search.severity import ALL_LOST, volume_ends
from autoprune.search.solver import Choices
from autoprune.search.volume import Array, pick_greedily
from autoprune.space.recipe import Recipe
from autoprune.study.artifacts import kept_numbers
from autoprune.study.records import TrialRecord, is_given
from autoprune.study.retries import CUT_OFF
from autoprune.study.screens import Screen, append_screens

# Screens before anything is trained, as far as they fit into this share of the search's time.
_FIRST_SCREENS = 16
_FIRST_SHARE = 0.25
# However short the time is, so many uniform recipes are looked at.
_LEAST_BASELINES = 2
# Where there is no time for so many solutions for each axis, those of the largest predicted gain are better.
_LEAST_ANCHORS = 3
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
# The volume ends at so many times what the best network within the user's caps is predicted to lose, if that is more.
_ROOM = 2.0
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
        self.config = config
        self.clock = clock
        default = driver.space.default_recovery()
        # A space that trains nothing needs no rung above the first export.
        self.rungs = driver.space.rungs if driver.space.trains else driver.space.rungs[:2]
        self._screen = screen
        self._recovery = with_steps(default, 0)
        # Seconds that looking at a recipe took: its screen, or its first training where nothing is screened.
        self.look_s: list[float] = []
        dense = driver.outlook.dense_measurement().search.value
        self.pool = Pool(options, dense, self.lowest, len(self.rungs))
        # What the best network within the user's caps is predicted to lose, with room to spare.
        self._least_lost = 0.0
        self._scales = volume_ends(driver.outlook.dense_measurement(), config.limits)
        self._counts: dict[int, dict[str, int]] = {}
        # What every run begins with: what came of earlier ones is replayed.
        given = [r for r in driver.records if is_given(r, "auto")]
        self.proposer = Proposer(
            options.problem,
            self._scales_at(self.lowest, given),
            config.objectives,
            seed=config.seed,
            use_solver=config.auto.solver,
            canonical=options.canonical,
            within=options.within if config.auto.lineage else None,
            capped_loss=config.limits.min_accuracy is not None,
        )
        self._failed_screens = 0
        # Screens since the last training.
        self._looks_in_vain = 0
        self._whole_s: float | None = None
        self._least_lost = _ROOM * self.proposer.least_lost()
        self.proposer.rescale(float(self._scales_at(self.lowest, given)[0]))

    def run(self, baselines: Iterable[Baseline]) -> None:
        """Search until the search's share of the budget is spent, or nothing more is to be gained.

        Args:
            baselines: Recipes to begin with.
        """
        self._whole_s = self._whole_search_s()
        self._take_free()
        replay(self)
        first = self._first(baselines)

        def step() -> bool:
            if not self.driver.may_propose():
                return False
            if (task := next(first, None)) is not None:
                task()
                return True
            return self.driver.may_propose() and self._do_next()

        self.driver.run_steps(step)
        if self.driver.may_propose():
            self.driver.say("nothing more is to be gained by proposals")

    def _first(self, baselines: Iterable[Baseline]) -> Iterator[Callable[[], object]]:
        """Yield what is looked at before any proposal; workers that find nothing left of it go on to those."""
        yield from self._baselines(baselines)
        if self.config.auto.solver and not self._is_stalled():
            yield from self._anchors()

    def _baselines(self, baselines: Iterable[Baseline]) -> Iterator[Callable[[], object]]:
        number = sum(c.arm == "baseline" and c.prunes for c in self.pool)  # those of earlier runs
        for baseline in baselines:
            choice = self.pool.options.encode(baseline.recipe)
            if choice in self.pool:
                continue
            few = number < _LEAST_BASELINES or number < self._fitting(_FIRST_SHARE / 2)
            if not few or self._is_stalled():
                return
            if self.driver.may_propose():
                number += 1
                proposal = Proposal(choice, "baseline")
                yield partial(self._evaluate, proposal, baseline.label, 0.0, baseline.recipe)

    def _anchors(self) -> Iterator[Callable[[], object]]:
        axes = max(1, int(self.proposer.axes.counts[1:].sum()))
        begun_s = self.clock.monotonic()
        anchors = kept_anchors(self.driver.store)
        if anchors is None:
            parts = int(min(self._fitting(_FIRST_SHARE) / axes, _ANCHORS * self.config.most_networks))
            found = self.proposer.anchors(parts) if parts >= _LEAST_ANCHORS else []
            anchors = [choice for choice in found if choice not in self.pool]
            if anchors:
                keep_anchors(self.driver.store, anchors)
        each_s = (self.clock.monotonic() - begun_s) / max(1, len(anchors))
        for choice in anchors:
            if choice not in self.pool and self.driver.may_propose():
                yield partial(self._evaluate, Proposal(choice, "solver"), "", each_s)

    def _whole_search_s(self) -> float | None:
        """Return the seconds that proposals had when the first run of this round began them; None without a limit."""
        left_s = self.driver.keeper.search_left_s()
        if left_s is None:
            return None
        name = f"proposing_s:{self.driver.store.round}"
        whole_s = max(left_s, float(self.driver.store.notes().get(name, "0")))
        self.driver.store.note(name, str(whole_s))
        return whole_s

    @property
    def lowest(self) -> int:
        """The rung that every proposal goes through."""
        return 0 if self.config.auto.screening else 1

    # -- what is done next -------------------------------------------------------------------

    def _do_next(self) -> bool:
        """Promote what is due, else look at something new; return False when there is nothing left to do."""
        rungs = range(len(self.rungs) - 2, self.lowest - 1, -1)
        if any(self._is_due(rung) and self._promote(rung) for rung in rungs):
            return True
        if not self._is_stalled() and self._look_at_something_new():
            return True
        if self.driver.keeper.search_left_s() is None:  # trials are left to nobody else
            if any(self._promote(rung) for rung in rungs):
                return True
            return self._looks_in_vain < _STALLED_AFTER and self._look_at_something_new()
        # The time that is left is the final recovery's, once there is enough for it to choose from.
        if self.lowest == 1:
            return False
        if self.pool.count(1) < _LEAST_BY_VOLUME and self._promote(0):
            return True
        enough = _CHOICE_FOR_FINAL * self.config.most_networks
        return self._fill_gap() or (self.pool.count(1) < enough and self._promote(0))

    def _look_at_something_new(self) -> bool:
        """Evaluate a proposal; return whether there was one."""
        begun_s = self.clock.monotonic()
        proposal = self.proposer.propose()
        if proposal is None:
            return False
        self._evaluate(proposal, "", self.clock.monotonic() - begun_s)
        return True

    def _fill_gap(self) -> bool:
        """Train a recipe in a part of the costs where none was trained; return whether there was one."""
        pool = [c for c in self.pool if c.prunes and 0 in c.lost]
        hopeless = self._are_hopeless(pool, 0)
        pool = [c for c, none in zip(pool, hopeless, strict=True) if c.reaches(1) or not none]
        scaled = self._scaled(pool, 0)
        # What exceeds the cap on another axis covers nothing.
        within = np.flatnonzero((scaled < 1.0).all(axis=1))
        pool = [pool[row] for row in within]
        counted = scaled[within][:, self.proposer.axes.counts > 0]
        if not pool or counted.shape[1] < 2:
            return False
        found = uncovered(counted, [c.reaches(1) for c in pool], self.config.most_networks)
        if found is None or not self.driver.fits(self.rungs[1].steps):
            return False
        self._train(pool[found], 1)
        return True

    def _is_due(self, rung: int) -> bool:
        """Return whether the rung above has fewer results than its share."""
        if rung == 0 and self.pool.count(0) < self._first_screens():
            return False
        return self.pool.count(rung + 1) < int(self.steps()[rung].promoted_share * self.pool.count(rung))

    def _first_screens(self) -> int:
        return int(np.clip(self._fitting(_FIRST_SHARE), 2, _FIRST_SCREENS))

    def _fitting(self, share: float) -> float:
        """Return how many recipes can be looked at in a share of the time that is left; infinite where not known."""
        left_s = self.driver.keeper.search_left_s()
        if left_s is None or not self.look_s:
            return math.inf
        return share * max(left_s, 0.0) / max(float(np.median(self.look_s)), 1e-9)

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
        recipe = self.pool.options.recipe(proposal.choice, self._recovery)
        if given is not None:
            recipe = given.model_copy(update={"recovery": self._recovery})
        self.pool.reserve(proposal.choice)
        self.proposer.reserve(proposal.choice)
        if self.lowest == 1:
            candidate = self.candidate(recipe, proposal.choice, proposal.arm, label)
            begun_s = self.clock.monotonic()
            self._train(candidate, 1, proposal.weights)
            self.look_s.append(self.clock.monotonic() - begun_s)
            self.take(proposal, candidate)
            return
        costs = self.pool.options.predicted_costs(proposal.choice)
        begun_s = self.clock.monotonic()
        if len(self.proposer.results) % _TOLD_EVERY == 0:
            self.driver.say(f"screening, {len(self.proposer.results)} recipes so far")
        try:
            with self.driver.lanes.waiting():
                lost = self._screen(recipe)
            self._failed_screens = 0
        except TrialError as error:
            if error.kind in CUT_OFF:
                return  # it says nothing of the recipe, which a run that goes on may look at anew
            self.driver.record_failure(recipe, proposal.arm, label, error, self.clock.monotonic() - begun_s)
            lost = ALL_LOST
            self._failed_screens += 1
            if self._failed_screens >= MAX_FAILURES_IN_A_ROW:
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
        reached("screen:written")
        self.take_screen(proposal, screen)

    def take_screen(self, proposal: Proposal, screen: Screen) -> None:
        self.look_s.append(screen.duration_s)
        self._looks_in_vain += 1
        self.take(proposal, self.pool.screened(screen))

    def take(self, proposal: Proposal, candidate: Candidate) -> None:
        self.pool.put(proposal.choice, candidate)
        values = np.array(candidate.values(self.lowest))
        self.proposer.add(Result(proposal.choice, proposal.arm, values, proposal.weights))

    def _promote(self, rung: int) -> bool:
        """Train the candidate of ``rung`` that adds most to those that were promoted; return whether there was one."""
        waiting = self.pool.waiting(rung)
        hopeless = self._are_hopeless(waiting, rung)
        waiting = [c for c, none in zip(waiting, hopeless, strict=True) if not none]
        known = self._scaled(self.pool.promoted(rung), rung)
        best = pick_greedily(known, self._scaled(waiting, rung), 1) if waiting else []
        if not best or not self.driver.fits(self.rungs[rung + 1].steps):
            return False
        self._train(waiting[best[0]], rung + 1)
        return True

    def _are_hopeless(self, candidates: Sequence[Candidate], rung: int) -> NDArray[np.bool_]:
        """Return for each candidate whether a trained network beats what it may at best come to."""
        best = np.array([c.values(rung) for c in candidates]).reshape(-1, 3)
        best = best * np.array([self.steps()[rung].hopeful_loss, 1.0, 1.0])
        others = np.array([c.values(rung + 1) for c in self.pool if rung + 1 in c.trials]).reshape(-1, 3)
        counts = self.proposer.axes.counts
        return are_hopeless(best * counts, others * counts)

    def candidate(self, recipe: Recipe, choice: Choices, arm: str, label: str) -> Candidate:
        """Return the candidate of a recipe of which nothing is known yet."""
        return Candidate(recipe, arm, label, self.pool.options.predicted_costs(choice))

    def _train(self, candidate: Candidate, rung: int, weights: Mapping[str, float] | None = None) -> None:
        """Run a trial that takes a candidate to ``rung``."""
        earlier = candidate.trials.get(rung - 1)
        if earlier is not None and not self.driver.kept.has(earlier):
            earlier = None  # it was not worth keeping then: all steps are taken anew
        steps = self.rungs[rung].steps - (self.rungs[rung - 1].steps if earlier is not None else 0)
        recipe = candidate.recipe.model_copy(
            update={"recovery": brief(self._recovery, steps) if self.driver.space.trains else self._recovery}
        )
        start = earlier
        if start is None and self.config.auto.lineage and recipe.prunes:
            counts = recipe.kept_counts(self.driver.groups)
            numbers = kept_numbers(self.driver.paths)
            kept = [r for r in self.driver.records if r.number in numbers]
            start = find_parent(counts, kept, self._counts_of, self.driver.kept.has)
        candidate.running = rung
        try:
            record = self.driver.trial(
                Job(
                    recipe=recipe,
                    origin=candidate.arm,
                    label=candidate.label,
                    rung=rung,
                    started_from=None if start is None else start.number,
                    screened=candidate.screened,
                    weights=weights or {},
                )
            )
        finally:
            candidate.running = None
        self.trained(candidate, record, self.driver.records)

    def _counts_of(self, record: TrialRecord) -> dict[str, int]:
        """Return the units that a trial's recipe keeps; asked of all artifacts before each training."""
        if record.number not in self._counts and record.recipe is not None:
            self._counts[record.number] = record.recipe.kept_counts(self.driver.groups)
        return self._counts[record.number]

    def trained(self, candidate: Candidate, record: TrialRecord, records: Sequence[TrialRecord]) -> None:
        """Take up what a trial gave.

        Args:
            candidate: What was trained.
            record: The trial.
            records: The study's trials as they were then.
        """
        self._looks_in_vain = 0
        self.pool.note(candidate, record)
        if record.state == "failed":
            candidate.lost.setdefault(record.rung, ALL_LOST)  # it must not be tried again
        if record.rung == 1:
            self.proposer.rescale(float(self._scales_at(self.lowest, records)[0]))
            if self.pool.correct_costs(self.driver.groups):
                costs = [self.pool[result.choice].costs for result in self.proposer.results]
                self.proposer.correct(self.pool.options.problem, np.array(costs))

    # -- what is known -----------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """Return how each rung's results relate to the next one's so far."""
        return self.driver.outlook.steps()

    def _scaled(self, candidates: Sequence[Candidate], rung: int) -> Array:
        """Return results of ``rung`` as shares of where the volume ends, ``(n, 3)``."""
        values = np.array([c.values(rung) for c in candidates]).reshape(-1, 3)
        return self.proposer.axes.scaled(values, float(self._scales_at(rung)[0]))

    def _scales_at(self, rung: int, records: Sequence[TrialRecord] | None = None) -> Array:
        """Return where the volume ends in results of ``rung``, which lose more than they will in the end.

        Where nothing within the user's caps loses as little as the volume allows, it ends beyond the best that does.
        """
        by_rung = self.driver.outlook.left_by_rung(records)
        first, left = by_rung[self.lowest], by_rung[rung]
        scales: Array = self._scales / np.array([max(left, 1e-3), 1.0, 1.0])
        return np.maximum(scales, [self._least_lost * first / max(left, 1e-3), 0.0, 0.0])

    def _take_free(self) -> None:
        """Take up what needs no training, the dense network and int8 alone, so that nothing is done that they beat."""
        for choice, candidate in self.pool.untrained(self.driver.records):
            if choice not in self.pool:
                self.take(Proposal(choice, candidate.arm), candidate)
