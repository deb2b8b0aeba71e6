"""The study's one record: an Optuna study in SQLite, written by one driver."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable
from typing import Any

import optuna

from autoprune.config import StudyConfig
from autoprune.errors import StorageError, UsageError
from autoprune.faults import reached
from autoprune.measure.record import Measurement
from autoprune.naming import StudyPaths, study_folders, unknown_name
from autoprune.space.recipe import Recipe
from autoprune.study import decode
from autoprune.study.artifacts import discard_unfinished, write_text_atomic
from autoprune.study.database import open_database, storage_faults
from autoprune.study.decode import Plan
from autoprune.study.integrity import (
    check_database,
    damaged_reads,
    heal_database,
    keep_copy,
    seal_line,
    set_aside_orphans,
    unseal_line,
)
from autoprune.study.locking import move_aside, take_lock
from autoprune.study.records import TrialRecord
from autoprune.study.samplers import counted, make_sampler
from autoprune.study.settings import SETTINGS_KEY, check_settings, read_settings, settings_text

optuna.logging.set_verbosity(optuna.logging.WARNING)
_log = logging.getLogger(__name__)


class StudyStore:
    """Reads and writes one study. Made by :meth:`create_or_resume` or :meth:`open`.

    Attributes:
        paths: Where everything of the study lies.
        objectives: Names of the objectives, accuracy among them.
        sampler_name: Who proposes.
    """

    def __init__(
        self, paths: StudyPaths, study: optuna.Study, settings: dict[str, Any], lock: int | None
    ) -> None:
        self.paths = paths
        self._study = study
        self._settings = settings
        self._lock = lock
        self._finished: dict[int, TrialRecord] = {}
        self._seen: Callable[[TrialRecord], TrialRecord] | None = None
        self.objectives: tuple[str, ...] = tuple(settings["objectives"])
        self.sampler_name: str = settings["sampler"]

    # -- opening -----------------------------------------------------------------------------

    @classmethod
    def create_or_resume(cls, config: StudyConfig, paths: StudyPaths, *, fresh: bool = False) -> StudyStore:
        """Open the study for the one driver that writes it; make it if there is none.

        Trials that a killed run left running are told to have failed with the kind ``lost``.

        Args:
            config: Settings; those of an existing study must be the same but for the budget.
            paths: The study's paths.
            fresh: Move an existing study aside, to ``<name>.1`` and so on, and begin anew.

        Raises:
            UsageError: If a setting differs from the study's; shows which.
            StorageError: If another driver has the study, or it cannot be read or written.
        """
        if fresh and paths.root.exists():
            # Whoever runs the study now must not have its folder moved away under it.
            os.close(take_lock(paths))
            move_aside(paths)
        lock = take_lock(paths)
        try:
            settings = config.identity()
            if paths.settings.exists():
                check_settings(settings, paths)
            if not paths.settings.exists():
                write_text_atomic(paths.settings, settings_text(settings))
                reached("study:settings")
            with storage_faults(paths):
                heal_database(paths)
                with damaged_reads(paths):
                    study = open_database(paths, settings, create=True)
                reached("study:database")
                store = cls(paths, study, settings, lock)
                set_aside_orphans(paths, len(study.get_trials(deepcopy=False)))
                study.set_user_attr(SETTINGS_KEY, settings_text(settings))
                keep_copy(paths)
                store._reap()
            discard_unfinished(paths)
        except BaseException:
            os.close(lock)
            raise
        return store

    @classmethod
    def open(cls, name: str) -> StudyStore:
        """Open an existing study for reading.

        Raises:
            UsageError: If there is none of this name; the message holds near matches.
            StorageError: If it cannot be read.
        """
        paths = StudyPaths.of(name)
        if not paths.database.is_file() or not paths.settings.is_file():
            known = [entry.name for entry in study_folders()]
            raise unknown_name("study", name, known, "`autoprune studies` lists the studies here")
        settings = read_settings(paths)
        with storage_faults(paths), damaged_reads(paths):
            check_database(paths)
            return cls(paths, open_database(paths, settings, create=False), settings, None)

    def release(self) -> None:
        """Let another driver have the study; the record stays readable."""
        if self._lock is not None:
            try:
                keep_copy(self.paths)
            except (OSError, sqlite3.Error) as error:
                _log.warning("no copy of %s was kept: %s", self.paths.database, error)
            os.close(self._lock)
            self._lock = None

    def as_seen(
        self, seen: Callable[[TrialRecord], TrialRecord], settings: dict[str, Any], paths: StudyPaths
    ) -> StudyStore:
        """Return the study for reading, with its records as ``seen`` makes them, and other settings and paths."""
        other = StudyStore(paths, self._study, settings, None)
        other._seen = seen
        return other

    # -- trials ------------------------------------------------------------------------------

    def ask(self, params: dict[str, Any] | None = None) -> optuna.Trial:
        """Return a new trial; with ``params`` its suggestions are those."""
        drawn = counted(self.records())
        with storage_faults(self.paths):
            # Anew for every trial: the state of a sampler dies with its process.
            self._study.sampler = make_sampler(self.sampler_name, int(self._settings.get("seed", 0)), drawn)
            if params:
                self._study.enqueue_trial(params)
            trial = self._study.ask()
            # NSGA-II ignores an enqueued trial as a parent unless its relative parameters were asked for.
            _ = trial.relative_params
            return trial

    def begin(self, trial: optuna.Trial, plan: Plan) -> None:
        """Record what a trial is going to evaluate, before it does."""
        with storage_faults(self.paths):
            trial.set_user_attr(decode.PLAN, plan.text())

    def complete(
        self,
        trial: optuna.Trial,
        measurement: Measurement,
        *,
        train_steps: int,
        duration_s: float,
        repeat_of: int | None = None,
        ended_s: float = 0.0,
    ) -> None:
        """Record a finished trial; once this returns it is never lost."""
        with storage_faults(self.paths):
            trial.set_user_attr(
                decode.RESULT, decode.result_text(measurement, train_steps, duration_s, repeat_of, ended_s)
            )
            reached("trial:result")
            self._study.tell(trial, self._values(measurement))

    def fail(
        self, trial: optuna.Trial, kind: str, reason: str, *, duration_s: float, ended_s: float = 0.0
    ) -> None:
        """Record a failed trial with its reason; it never enters a front."""
        with storage_faults(self.paths):
            trial.set_user_attr(decode.FAILURE, decode.failure_text(kind, reason, duration_s, ended_s))
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def add_final(
        self,
        parent: TrialRecord,
        measurement: Measurement,
        *,
        recipe: Recipe,
        train_steps: int,
        duration_s: float,
        label: str,
        started_from: int | None = None,
        ended_s: float = 0.0,
        variant: str = "",
    ) -> int:
        """Record a final trial of the current round in one step and return its number; none is doubled."""
        for record in self.records():
            if (record.parent, record.round, record.variant) == (parent.number, self.round, variant):
                return record.number
        plan = Plan(
            recipe,
            "final",
            label,
            fidelity="final",
            rung=0,
            parent=parent.number,
            started_from=started_from,
            round=self.round,
            variant=variant,
            screened=parent.screened,
        )
        with storage_faults(self.paths):
            # Without parameters, so that no sampler takes the long training for what a trial reaches.
            trial = optuna.trial.create_trial(
                values=self._values(measurement),
                user_attrs={
                    decode.PLAN: plan.text(),
                    decode.RESULT: decode.result_text(measurement, train_steps, duration_s, None, ended_s),
                },
            )
            self._study.add_trial(trial)
            return len(self._study.get_trials(deepcopy=False)) - 1

    def records(self) -> list[TrialRecord]:
        """Return every trial in the order of its number."""
        found = []
        with storage_faults(self.paths), damaged_reads(self.paths):
            trials = self._study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.number not in self._finished:
                record = decode.record(trial)
                if record.state == "running":
                    found.append(record)
                    continue
                self._finished[trial.number] = record
            found.append(self._finished[trial.number])
        return found if self._seen is None else [self._seen(record) for record in found]

    def record(self, number: int) -> TrialRecord:
        """Return one trial.

        Raises:
            UsageError: If the study has no trial of this number.
        """
        records = self.records()
        if not 0 <= number < len(records):
            raise UsageError(
                f"study {self.paths.name!r} has no trial {number}; it has 0 to {len(records) - 1}",
                f"`autoprune front {self.paths.name}` lists the front",
            )
        return records[number]

    def _values(self, measurement: Measurement) -> list[float]:
        # Integers among the values would later break Optuna's multi-objective TPE.
        by_name = {
            "accuracy": float(measurement.search.value),
            "latency": float(measurement.latency.ratio),
            "size": float(measurement.size_ratio),
        }
        return [by_name[name] for name in self.objectives]

    def _reap(self) -> None:
        """Fail what killed runs left waiting or running: with the driver's lock held nobody works on it."""
        states = optuna.trial.TrialState
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state == states.WAITING:
                self.fail(
                    self._study.ask(), "lost", "the run was killed before this trial began", duration_s=0.0
                )
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state == states.RUNNING:
                self._study._storage.set_trial_user_attr(
                    trial._trial_id, decode.FAILURE, decode.failure_text("lost", "the run was killed", 0.0)
                )
                self._study.tell(trial.number, state=states.FAIL)

    # -- the study's own attributes ------------------------------------------------------------

    def note(self, key: str, value: str) -> None:
        """Keep a short text with the study."""
        with storage_faults(self.paths):
            self._study.set_user_attr(f"note:{key}", seal_line(value))

    def notes(self) -> dict[str, str]:
        """Return all notes by key."""
        notes = {
            key.removeprefix("note:"): str(value)
            for key, value in self._study.user_attrs.items()
            if key.startswith("note:")
        }
        try:
            return {key: unseal_line(value) for key, value in notes.items()}
        except ValueError as error:
            raise StorageError(
                f"the record of study {self.paths.name!r} ({str(self.paths.database)!r}) is damaged: a note: {error}",
                "run the same search again, which goes on from a copy, or set the study aside with --fresh",
            ) from error

    def settings(self) -> dict[str, Any]:
        """Return the settings that the study was made with."""
        return dict(self._settings)

    @property
    def spent_s(self) -> float:
        """Seconds that all runs of the study used."""
        return float(self._study.user_attrs.get("spent_s", 0.0))

    def set_spent(self, seconds: float) -> None:
        """Record the seconds used so far, from which a resumed run counts on."""
        with storage_faults(self.paths):
            self._study.set_user_attr("spent_s", float(seconds))

    @property
    def ended_rounds_s(self) -> list[float]:
        """Seconds spent on the study by the end of each final phase; a larger budget adds one."""
        return [float(seconds) for seconds in self._study.user_attrs.get("ended_rounds_s", [])]

    @property
    def round(self) -> int:
        """Number of the final phase that is under way or comes next, from 1."""
        return len(self.ended_rounds_s) + 1

    @property
    def ended_budget(self) -> str:
        """The budget that the last final phase ended; empty before the first."""
        return str(self._study.user_attrs.get("ended_budget", ""))

    def end_round(self, spent_s: float, budget: str) -> None:
        """Record that the final phase is over; the study is then done until a larger budget continues it."""
        with storage_faults(self.paths):
            self._study.set_user_attr("ended_budget", budget)
            reached("round:budget")
            # The one write that ends the round: the phase follows from it.
            self._study.set_user_attr("ended_rounds_s", [*self.ended_rounds_s, float(spent_s)])

    @property
    def phase(self) -> str:
        """How far the study is: ``search``, ``final`` or ``done``."""
        name, _, round_of = str(self._study.user_attrs.get("phase", "search")).partition(":")
        return "done" if round_of.isdigit() and int(round_of) < self.round else name

    @phase.setter
    def phase(self, phase: str) -> None:
        with storage_faults(self.paths):
            self._study.set_user_attr("phase", f"{phase}:{self.round}")
