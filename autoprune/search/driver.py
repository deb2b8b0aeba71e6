"""The driver: dense network, baselines, proposals, final phase; the only one that asks and tells."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import optuna

from autoprune.clock import Clock
from autoprune.errors import ExportError, StorageError, TooManyFailuresError, TrialError
from autoprune.faults import reached
from autoprune.measure.quiet import training
from autoprune.measure.record import Measurement
from autoprune.naming import StudyPaths
from autoprune.search.baselines import Baseline, effective_key, grid_recipes
from autoprune.search.bench import Bench
from autoprune.search.budget import Timekeeper
from autoprune.search.events import Listener, Progress
from autoprune.search.executors.contract import CRASHED, Executor
from autoprune.search.interrupt import Interrupt
from autoprune.search.jobs import Job, Strategy, TrialFunction, describe
from autoprune.search.kept import Kept
from autoprune.search.lanes import Lanes
from autoprune.search.ledger import Ledger
from autoprune.search.outcome import Outcome
from autoprune.search.outlook import Outlook
from autoprune.search.shelf import Shelf
from autoprune.search.trial import run_trial
from autoprune.search.unfinished import Unfinished
from autoprune.space.recipe import Recipe
from autoprune.space.search_space import SearchSpace
from autoprune.study.artifacts import commit_folder, temporary_folder
from autoprune.study.decode import Plan
from autoprune.study.records import TrialRecord
from autoprune.study.retries import CUT_OFF, MAX_RETRIES, WORKER_LOST
from autoprune.study.store import StudyStore

MAX_FAILURES_IN_A_ROW = 10
_MAX_REPEATS_IN_A_ROW = 100
# The time used is written so often at most; who resumes counts to the end of the last trial, which is its own record.
_SPENT_EVERY_S = 1.0


def too_many_failures(what: str, error: TrialError) -> TooManyFailuresError:
    """Return the error that ends a search in which ``what``, a plural, failed too often in a row."""
    return TooManyFailuresError(
        f"{MAX_FAILURES_IN_A_ROW} {what} in a row failed alike ({error.kind}): {error.reason}",
        "the finished trials are kept; mend the cause and run the same command again",
    )


class Driver:
    """Runs the search part of a study.

    Args:
        store: The study's record.
        space: What may be tried.
        bench: What the trials share.
        keeper: The budget.
        interrupt: Whether the user asked to end.
        listener: Gets progress.
        clock: Source of time.
        run: Evaluates a recipe into a folder, starting from the network in another one if that is given; the real
            trial if not given.
        adopt_dense: Called with the dense trial before anything is compared with it.
        executor: Who runs trials side by side; the driver itself, one after the other, if not given.
        shelf: Where artifacts are kept besides the study's folder; nowhere if not given.
    """

    def __init__(
        self,
        store: StudyStore,
        space: SearchSpace,
        bench: Bench,
        keeper: Timekeeper,
        interrupt: Interrupt,
        listener: Listener,
        clock: Clock,
        run: TrialFunction | None = None,
        adopt_dense: Callable[[TrialRecord], None] | None = None,
        executor: Executor | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self.store = store
        self.space = space
        self.bench = bench
        self.groups = bench.groups
        self.keeper = keeper
        self.interrupt = interrupt
        self.listener = listener
        self.clock = clock
        self.paths: StudyPaths = store.paths
        self._run = run or self._here
        self._ledger = Ledger(bench.groups, store.objectives, store.sampler_name)
        self.records: list[TrialRecord] = []
        self.reload()
        self.adopt_dense = adopt_dense or (
            lambda record: bench.adopt_dense(self.paths.artifact(record.number), record)
        )
        self.outlook = Outlook(store, space, bench, keeper, lambda: self.records)
        self._unfinished = Unfinished(space, bench.groups, lambda: self.records)
        self.kept = Kept(self.paths, bench.config.most_networks)
        self.executor = executor
        self.shelf = shelf or Shelf(None, store.paths)
        self.lanes = Lanes(1 if executor is None else executor.size, interrupt)
        self._running: set[tuple[str, int]] = set()
        self._phase = "baselines"
        self._noted_spent_s = -_SPENT_EVERY_S

    # -- what is run -------------------------------------------------------------------------

    def search(self, reserve_s: Callable[[], float], strategy: Strategy | None = None) -> None:
        """Run trial 0, the baselines and then proposals, until the search's share of the budget is spent.

        Args:
            reserve_s: Seconds that measuring the front at the end needs at least; baselines may use the
                final phase's time up to that.
            strategy: The default search, which begins with the pruned baselines itself; the study's sampler
                proposes if not given.
        """
        self._phase = "baselines"
        self._dense()
        lost = self._unfinished.lost(self.kept.is_sound)
        self.kept.wanted = {job.started_from for job in lost if job.started_from is not None}
        # A run that was killed may not have come to it.
        self.kept.discard_dominated(self._ledger, self.outlook)
        missing = self._unfinished.baselines()
        first = [b for b in missing if strategy is None or not b.recipe.prunes]
        begun: list[Baseline] = []
        self.run_each(self._fitting_baselines(first, reserve_s, begun))
        if self.interrupt() or len(begun) < len(first):
            return
        self._phase = "search"
        self.run_each(partial(self.trial, job) for job in lost if self.may_propose())
        self.kept.wanted.clear()
        if strategy is not None:
            strategy([b for b in missing if b.recipe.prunes])
            return
        if self.store.sampler_name == "grid":
            self._run_grid()
            return
        self.propose_by_sampler()

    def propose_by_sampler(self) -> None:
        """Let the study's sampler propose until the search's share of the budget is spent."""
        repeats = 0

        def step() -> bool:
            nonlocal repeats
            if not self.may_propose() or repeats >= _MAX_REPEATS_IN_A_ROW:
                return False
            repeats = repeats + 1 if self.trial(Job(None, self.store.sampler_name)).is_repeat else 0
            return True

        self.run_steps(step)

    def run_steps(self, step: Callable[[], bool]) -> None:
        """Take steps, as many side by side as there are workers, until none is left."""
        self.lanes.run(step, self._stop)

    def run_each(self, tasks: Iterator[Callable[[], object]]) -> None:
        """Do every task, as many side by side as there are workers."""
        self.lanes.each(tasks, self._stop)

    def _stop(self) -> None:
        if self.executor is not None:
            self.executor.stop()

    def _run_grid(self) -> None:
        """Try every uniform recipe of the space once, in an order that the seed gives."""
        done = sum(r.origin == "grid" and r.failure_kind not in CUT_OFF for r in self.records)
        recipes = grid_recipes(self.space, self.groups, self.bench.config.seed)[done:]
        self.run_each(partial(self.trial, Job(recipe, "grid")) for recipe in recipes if self.may_propose())

    def _fitting_baselines(
        self, wanted: list[Baseline], reserve_s: Callable[[], float], begun: list[Baseline]
    ) -> Iterator[Callable[[], object]]:
        for baseline in wanted:
            if not self.keeper.fits_at_all(self._ledger.durations(), reserve_s()):
                return
            begun.append(baseline)
            yield partial(self.trial, Job(baseline.recipe, "baseline", baseline.label))

    def _dense(self) -> None:
        """Measure the dense network as trial 0, or rebuild its artifact where an earlier run measured it."""
        if self.outlook.dense_record() is None:
            self.trial(Job(Recipe(), "dense", "dense"))
        record = self.outlook.dense_record()
        if record is None:
            failed = self.records[-1]
            raise ExportError(
                f"the dense network cannot be measured: {failed.failure_kind}: {failed.failure_reason}"
            )
        self.adopt_dense(record)

    def fits(self, steps: int) -> bool:
        """Return whether a training of so many steps is expected to end before proposals have to."""
        left_s = self.keeper.search_left_s()
        return left_s is None or steps * self.bench.timings.step_s() <= left_s

    def may_propose(self) -> bool:
        """Return whether there is time, or a trial, left for one more proposal."""
        trials_left = self.keeper.trials_left(self._ledger.proposals())
        if self.interrupt() or (trials_left is not None and trials_left <= 0):
            return False
        return self.keeper.fits_search(self._ledger.durations())

    # -- one trial ---------------------------------------------------------------------------

    def trial(self, job: Job) -> TrialRecord:
        """Run and record one trial; one whose worker is lost is tried again, as a trial of its own."""
        while True:
            record = self._once(job)
            if record.failure_kind != WORKER_LOST or self.interrupt():
                return record
            job = replace(job, recipe=record.recipe)

    def _once(self, job: Job) -> TrialRecord:
        begun_s = self.clock.monotonic()
        trial, recipe = self._ask(job.recipe)
        reached("trial:asked")
        plan = Plan(
            recipe,
            job.origin,
            job.label,
            rung=job.rung,
            started_from=job.started_from,
            screened=job.screened,
            weights=job.weights,
        )
        self.store.begin(trial, plan)
        reached("trial:begun")
        self.reload()
        self.say(f"trial {trial.number} {job.label or job.origin} begins")
        key = (effective_key(recipe, self.groups), job.rung)
        self.lanes.until(lambda: key not in self._running)
        repeated = self._ledger.same_as(*key)
        if repeated is not None and repeated.measurement is not None:
            self._finish(trial, repeated.measurement, repeated.train_steps, 0.0, repeat_of=repeated.number)
            return self.records[trial.number]
        self._running.add(key)
        folder = temporary_folder(self.paths.artifacts)
        try:
            start = None
            if job.started_from is not None and self.kept.is_sound(job.started_from):  # it may be gone by now
                start = self.paths.artifact(job.started_from)
            # Others decide meanwhile, also while files are hashed, flushed and brought away.
            with self.lanes.waiting():
                outcome = self._run(recipe, folder, start, trial.number)
                if self.interrupt() and outcome.own_steps < recipe.recovery.finetune_steps and recipe.prunes:
                    raise TrialError("interrupted", "the search was asked to end while this trial trained")
                commit_folder(folder, self.paths.artifact(trial.number))
                self.shelf.put(self.paths.artifact(trial.number))
            reached("trial:committed")
            self._finish(trial, outcome.measurement, outcome.train_steps, self.clock.monotonic() - begun_s)
        except TrialError as error:
            # The last try of one whose workers vanish counts as the recipe's own failure.
            if error.kind == WORKER_LOST and self._unfinished.is_last_try(key[0]):
                error = TrialError(CRASHED, f"{error.reason}; tried {MAX_RETRIES + 1} times")
            self._fail(trial, error, self.clock.monotonic() - begun_s)
        except KeyboardInterrupt:
            self.store.fail(
                trial, "interrupted", "stopped at once", duration_s=self.clock.monotonic() - begun_s
            )
            raise
        except OSError as error:
            if not folder.is_dir():  # the next write names the driver that took the study over and tidied up
                self.store.set_spent(self.keeper.spent_s)
            raise StorageError(
                f"trial {trial.number} could not be written: {error}",
                "free space or make the folder writable, then run the same command again: it resumes",
            ) from error
        finally:
            self._running.discard(key)
            shutil.rmtree(folder, ignore_errors=True)
        if self.keeper.spent_s >= self._noted_spent_s + _SPENT_EVERY_S:
            self._noted_spent_s = self.keeper.spent_s
            self.store.set_spent(self._noted_spent_s)
        self.store.note("timings", self.bench.timings.text())
        self.shelf.tidy()
        return self.records[trial.number]

    def _here(self, recipe: Recipe, folder: Path, start: Path | None, number: int) -> Outcome:
        """Run a trial in this process."""
        with training(self.interrupt) as deadline:
            return run_trial(self.bench, recipe, folder, deadline=deadline, start=start)

    def _ask(self, recipe: Recipe | None) -> tuple[optuna.Trial, Recipe]:
        if recipe is None:
            trial = self.store.ask()
            return trial, self.space.suggest(trial, self.groups)
        params = self.space.params_of(recipe, self.groups) or {}
        trial = self.store.ask(params)
        if params:
            self.space.suggest(trial, self.groups)
        return trial, recipe

    def _finish(
        self,
        trial: optuna.Trial,
        measurement: Measurement,
        train_steps: int,
        duration_s: float,
        repeat_of: int | None = None,
    ) -> None:
        self.store.complete(
            trial,
            measurement,
            train_steps=train_steps,
            duration_s=duration_s,
            repeat_of=repeat_of,
            ended_s=self.keeper.spent_s,
        )
        reached("trial:told")
        self._take_up()
        self.listener(self.progress(f"trial {trial.number} done", last=describe(trial.number, measurement)))

    def _fail(self, trial: optuna.Trial, error: TrialError, duration_s: float) -> None:
        self.store.fail(trial, error.kind, error.reason, duration_s=duration_s, ended_s=self.keeper.spent_s)
        self._take_up()
        self.listener(
            self.progress(
                f"trial {trial.number} failed", last=f"#{trial.number} {error.kind}: {error.reason}"
            )
        )
        # Screens that failed stand among trials without those that did not; who screens counts them.
        # Those that run beside it are not over yet, and no success.
        over = (
            r
            for r in reversed(self.records)
            if r.state != "running" and r.failure_kind not in CUT_OFF and (r.rung or r.round)
        )
        recent = list(islice(over, MAX_FAILURES_IN_A_ROW))
        alike = all(r.state == "failed" and r.failure_kind == error.kind for r in recent)
        if alike and len(recent) == MAX_FAILURES_IN_A_ROW:
            raise too_many_failures("trials", error)

    def record_failure(
        self, recipe: Recipe, origin: str, label: str, error: TrialError, duration_s: float
    ) -> None:
        """Record a recipe that failed before it became a trial, so that it is counted and told like one."""
        trial, recipe = self._ask(recipe)
        self.store.begin(trial, Plan(recipe, origin, label, rung=0))
        self.store.fail(trial, error.kind, error.reason, duration_s=duration_s, ended_s=self.keeper.spent_s)
        self._take_up()
        self.say(f"screen failed: {error.kind}: {error.reason}")

    def _take_up(self) -> None:
        """Read a trial that ended, and let networks go that nothing needs any more."""
        self.reload()
        self.kept.discard_dominated(self._ledger, self.outlook)

    def reload(self) -> None:
        """Read the records anew after some were written."""
        self.records = self.store.records()
        self._ledger.take(self.records)

    def forget_final_failure(self, record: TrialRecord) -> None:
        """Forget a loss of an earlier final phase: this one tries again."""
        if self.store.notes().get(f"final_failure:{record.number}"):
            self.store.note(f"final_failure:{record.number}", "")
        for key, text in self.store.notes().items():
            if text and key.startswith((f"target_failure:{record.number}:", "target_failure::")):
                self.store.note(key, "")

    def note_final_failure(self, record: TrialRecord, error: TrialError) -> None:
        """Record that the final phase lost the point that continued ``record``."""
        self.store.note(f"final_failure:{record.number}", f"{error.kind}: {error.reason}")
        self.listener(
            self.progress(
                f"final recovery of trial {record.number} failed", "final", f"{error.kind}: {error.reason}"
            )
        )

    # -- what is shown -----------------------------------------------------------------------

    def say(self, message: str) -> None:
        """Tell the listener what goes on."""
        self.listener(self.progress(message))

    def progress(self, message: str, phase: str | None = None, last: str = "") -> Progress:
        """Return the state of the search now."""
        return Progress(
            phase=phase or self._phase,
            message=message,
            trials=self._ledger.finished,
            front=len(self._ledger.fronts.numbers()),
            hypervolume=self._ledger.fronts.volume(),
            failures=dict(self._ledger.failures),
            left_s=self.keeper.left_s,
            last=last,
            workers=() if self.executor is None else self.executor.states(),
        )
