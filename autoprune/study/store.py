"""The study's one record: an Optuna study in SQLite or PostgreSQL, written by one driver."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import optuna

from autoprune.config import StudyConfig
from autoprune.errors import StorageError, UsageError
from autoprune.faults import reached
from autoprune.measure.record import Measurement
from autoprune.naming import StudyPaths
from autoprune.space.recipe import Recipe
from autoprune.study import decode
from autoprune.study.artifacts import discard_unfinished
from autoprune.study.database import read_faults, storage_faults
from autoprune.study.decode import Plan
from autoprune.study.integrity import keep_copy, seal_line, seal_value, unseal_line, unseal_value
from autoprune.study.lease import LEASE_S
from autoprune.study.opening import open_for_reading, open_for_writing, set_study_aside
from autoprune.study.place import Place
from autoprune.study.record_storage import RecordStorage
from autoprune.study.records import TrialRecord
from autoprune.study.samplers import counted, make_sampler
from autoprune.study.trial_log import TrialLog
from autoprune.study.window import Window

# What it warns of on the way, such as a statement that is repeated, is told once it cannot be mended.
optuna.logging.set_verbosity(optuna.logging.ERROR)


_T = TypeVar("_T")


class StudyStore:
    """Reads and writes one study. Made by :meth:`create_or_resume` or :meth:`open`.

    Attributes:
        paths: Where everything of the study lies.
        place: Where its record is.
        objectives: Names of the objectives, accuracy among them.
        sampler_name: Who proposes.
    """

    def __init__(
        self,
        place: Place,
        study: optuna.Study,
        storage: RecordStorage,
        settings: dict[str, Any],
        release: Callable[[], object] | None = None,
    ) -> None:
        self.place = place
        self.paths = place.paths
        self._study = study
        self._storage = storage
        self._settings = settings
        self._release = release
        self._log = TrialLog(storage, study._study_id)
        self._window = Window(storage, study, self._log, tuple(settings["objectives"]))
        self._noted: dict[str, str] = {}
        self._seen: Callable[[TrialRecord], TrialRecord] | None = None
        self.objectives: tuple[str, ...] = tuple(settings["objectives"])
        self.sampler_name: str = settings["sampler"]

    # -- opening -----------------------------------------------------------------------------

    @classmethod
    def create_or_resume(
        cls, config: StudyConfig, paths: StudyPaths, *, fresh: bool = False, lease_s: float = LEASE_S
    ) -> StudyStore:
        """Open the study for the one driver that writes it; make it if there is none.

        Trials that a killed run left running are told to have failed with the kind ``lost``.

        Args:
            config: Settings; those of an existing study must be the same but for the budget.
            paths: The study's paths.
            fresh: Move an existing study aside, to ``<name>.1`` and so on, and begin anew.
            lease_s: Seconds after which a driver that does not answer loses a study in PostgreSQL.

        Raises:
            UsageError: If a setting differs from the study's; shows which.
            StorageError: If another driver has the study, or it cannot be read or written.
        """
        if fresh:
            set_study_aside(Place.of(paths, config.storage), lease_s)
        opened = open_for_writing(Place.for_writing(paths, config.storage), config.identity(), lease_s)
        try:
            store = cls(opened.place, opened.study, opened.storage, opened.settings, opened.release)
            with read_faults(opened.place):
                store._reap()
                # Not before it could be read: the copy that it replaces may be the only sound one.
                if opened.place.database is None:
                    keep_copy(paths)
            discard_unfinished(paths)
        except BaseException:
            opened.release()
            raise
        return store

    @classmethod
    def open(cls, name: str, storage: str | None = None) -> StudyStore:
        """Open an existing study for reading.

        Args:
            name: Name of the study.
            storage: Where its record is, if not where its folder says.

        Raises:
            UsageError: If there is none of this name; the message holds near matches.
            StorageError: If it cannot be read.
        """
        opened = open_for_reading(Place.of(StudyPaths.of(name), storage))
        return cls(opened.place, opened.study, opened.storage, opened.settings)

    def release(self) -> None:
        """Let another driver have the study; the record stays readable."""
        if self._release is not None:
            self._release()
            self._release = None

    def as_seen(
        self, seen: Callable[[TrialRecord], TrialRecord], settings: dict[str, Any], paths: StudyPaths
    ) -> StudyStore:
        """Return the study for reading, with its records as ``seen`` makes them, and other settings and paths."""
        other = StudyStore(replace(self.place, paths=paths), self._study, self._storage, settings)
        other._log = self._log
        other._seen = seen
        return other

    # -- trials ------------------------------------------------------------------------------

    def ask(self, params: dict[str, Any] | None = None) -> optuna.Trial:
        """Return a new trial.

        Args:
            params: What its suggestions are; None lets the sampler choose. Empty is for a recipe that the space does
                not hold.
        """
        drawn = counted(self.records())
        # Anew for every trial: the state of a sampler dies with its process.
        sampler = make_sampler(self.sampler_name, int(self._settings.get("seed", 0)), drawn)
        self._study.sampler = sampler
        with storage_faults(self.place):
            # Not by Study.enqueue_trial and Study.ask, which look for waiting trials through all of a study's.
            fixed = {"fixed_params": params} if params else {}
            states = optuna.trial.TrialState
            template = optuna.trial.create_trial(state=states.RUNNING, system_attrs=fixed)
            trial = optuna.Trial(
                self._window.study(), self._study._storage.create_new_trial(self._study._study_id, template)
            )
            # NSGA-II ignores an enqueued trial as a parent unless its relative parameters were asked for; TPE would
            # look through the study for parameters that are given.
            if params is None or (params and isinstance(sampler, optuna.samplers.NSGAIISampler)):
                _ = trial.relative_params
            return trial

    def begin(self, trial: optuna.Trial, plan: Plan) -> None:
        """Record what a trial is going to evaluate, before it does."""
        with storage_faults(self.place):
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
        with storage_faults(self.place):
            text = decode.result_text(measurement, train_steps, duration_s, repeat_of, ended_s)
            self._end(
                trial, optuna.trial.TrialState.COMPLETE, {decode.RESULT: text}, self._values(measurement)
            )

    def fail(
        self, trial: optuna.Trial, kind: str, reason: str, *, duration_s: float, ended_s: float = 0.0
    ) -> None:
        """Record a failed trial with its reason; it never enters a front."""
        with storage_faults(self.place):
            text = decode.failure_text(kind, reason, duration_s, ended_s)
            self._end(trial, optuna.trial.TrialState.FAIL, {decode.FAILURE: text})

    def _end(
        self,
        trial: optuna.Trial,
        state: optuna.trial.TrialState,
        attributes: dict[str, str],
        values: Sequence[float] = (),
    ) -> None:
        # As Study.tell, which reads the trial twice and writes what it ends with in steps of their own.
        told = None if not values else list(values)
        self._study.sampler.after_trial(self._study, trial._cached_frozen_trial, state, told)
        self._storage.finish(trial._trial_id, state, attributes, values)

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
        with storage_faults(self.place):
            # Without parameters, so that no sampler takes the long training for what a trial reaches.
            trial = optuna.trial.create_trial(
                values=self._values(measurement),
                user_attrs={
                    decode.PLAN: plan.text(),
                    decode.RESULT: decode.result_text(measurement, train_steps, duration_s, None, ended_s),
                },
            )
            added = self._study._storage.create_new_trial(self._study._study_id, trial)
            return int(self._study._storage.get_trial(added).number)

    def records(self) -> list[TrialRecord]:
        """Return every trial in the order of its number."""
        with read_faults(self.place):
            found = self._log.records()
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
        left = [row for row in self._log.rows() if not row.state.is_finished()]
        for row in left:
            waited = row.state == states.WAITING
            if waited:  # as earlier versions queued their trials
                self._storage.set_trial_state_values(row.id, states.RUNNING)
            reason = "the run was killed before this trial began" if waited else "the run was killed"
            self._storage.set_trial_user_attr(
                row.id, decode.FAILURE, decode.failure_text("lost", reason, 0.0)
            )
            self._storage.set_trial_state_values(row.id, states.FAIL)

    # -- the study's own attributes ------------------------------------------------------------

    def note(self, key: str, value: str) -> None:
        """Keep a short text with the study; one that this driver noted already is not written again."""
        if self._noted.get(key) == value:
            return
        with storage_faults(self.place):
            self._study.set_user_attr(f"note:{key}", seal_line(value))
        self._noted[key] = value

    def notes(self) -> dict[str, str]:
        """Return all notes by key."""
        with read_faults(self.place):
            attributes = self._study.user_attrs.items()
        notes = {
            key.removeprefix("note:"): str(value) for key, value in attributes if key.startswith("note:")
        }
        try:
            return {key: unseal_line(value) for key, value in notes.items()}
        except ValueError as error:
            raise StorageError(
                f"the record of study {self.paths.name!r} ({str(self.place)!r}) is damaged: a note: {error}",
                "run the same search again, which goes on from a copy, or set the study aside with --fresh",
            ) from error

    def settings(self) -> dict[str, Any]:
        """Return the settings that the study was made with."""
        return dict(self._settings)

    def _own(self, key: str, default: Any, read: Callable[[Any], _T]) -> _T:
        with read_faults(self.place):
            return read(unseal_value(self._study.user_attrs.get(key, default)))

    def _set_own(self, key: str, value: object) -> None:
        self._study.set_user_attr(key, seal_value(value))

    @property
    def spent_s(self) -> float:
        """Seconds that all runs of the study used."""
        return self._own("spent_s", 0.0, _seconds)

    def set_spent(self, seconds: float) -> None:
        """Record the seconds used so far, from which a resumed run counts on."""
        with storage_faults(self.place):
            self._set_own("spent_s", float(seconds))

    @property
    def ended_rounds_s(self) -> list[float]:
        """Seconds spent on the study by the end of each final phase; a larger budget adds one."""
        return self._own("ended_rounds_s", [], lambda rounds: [_seconds(each) for each in rounds])

    @property
    def round(self) -> int:
        """Number of the final phase that is under way or comes next, from 1."""
        return len(self.ended_rounds_s) + 1

    @property
    def ended_budget(self) -> str:
        """The budget that the last final phase ended; empty before the first."""
        return self._own("ended_budget", "", str)

    def end_round(self, spent_s: float, budget: str) -> None:
        """Record that the final phase is over; the study is then done until a larger budget continues it."""
        with storage_faults(self.place):
            self._set_own("ended_budget", budget)
            reached("round:budget")
            # The one write that ends the round: the phase follows from it.
            self._set_own("ended_rounds_s", [*self.ended_rounds_s, float(spent_s)])

    @property
    def phase(self) -> str:
        """How far the study is: ``search``, ``final`` or ``done``."""
        name, _, round_of = self._own("phase", "search", str).partition(":")
        return "done" if round_of.isdigit() and int(round_of) < self.round else name

    @phase.setter
    def phase(self, phase: str) -> None:
        with storage_faults(self.place):
            self._set_own("phase", f"{phase}:{self.round}")


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} are no seconds")
    return seconds
