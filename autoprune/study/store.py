"""The study's one record: an Optuna study in SQLite, written by one driver."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import optuna
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from autoprune.config import StudyConfig
from autoprune.errors import StorageError, UsageError
from autoprune.measure.record import Measurement
from autoprune.naming import StudyPaths, check_study_name, studies_root, unknown_name
from autoprune.space.recipe import Recipe
from autoprune.study import decode
from autoprune.study.artifacts import discard_unfinished, write_text_atomic
from autoprune.study.records import TrialRecord
from autoprune.study.samplers import make_sampler

SCHEMA = 1
_DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {
    "accuracy": "maximize",
    "latency": "minimize",
    "size": "minimize",
}
METRIC_NAMES = {"accuracy": "accuracy", "latency": "latency_ratio", "size": "size_ratio"}

optuna.logging.set_verbosity(optuna.logging.WARNING)


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
            os.close(_take_lock(paths))
            _move_aside(paths)
        lock = _take_lock(paths)
        try:
            settings = config.identity()
            if paths.settings.exists():
                _check_same(_read_settings(paths), settings, paths)
            else:
                write_text_atomic(paths.settings, _settings_text(settings))
            with storage_faults(paths):
                study = _open_database(paths, settings, create=True)
                store = cls(paths, study, settings, lock)
                store._reap()
                study.sampler = make_sampler(
                    config.sampler, config.seed, len(study.get_trials(deepcopy=False))
                )
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
            known = [entry.name for entry in _study_folders()]
            raise unknown_name("study", name, known, "`autoprune studies` lists the studies here")
        settings = _read_settings(paths)
        with storage_faults(paths):
            return cls(paths, _open_database(paths, settings, create=False), settings, None)

    def release(self) -> None:
        """Let another driver have the study; the record stays readable."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # -- trials ------------------------------------------------------------------------------

    def ask(self, params: dict[str, Any] | None = None) -> optuna.Trial:
        """Return a new trial; with ``params`` its suggestions are those."""
        with storage_faults(self.paths):
            if params:
                self._study.enqueue_trial(params)
            trial = self._study.ask()
            # NSGA-II ignores an enqueued trial as a parent unless its relative parameters were asked for.
            _ = trial.relative_params
            return trial

    def begin(
        self, trial: optuna.Trial, recipe: Recipe, *, origin: str, label: str = "", parent: int | None = None
    ) -> None:
        """Record what a trial is going to evaluate, before it does."""
        with storage_faults(self.paths):
            trial.set_user_attr(decode.PLAN, decode.plan_text(recipe, origin, label, parent, "search"))

    def complete(
        self, trial: optuna.Trial, measurement: Measurement, *, train_steps: int, duration_s: float
    ) -> None:
        """Record a finished trial; once this returns it is never lost."""
        with storage_faults(self.paths):
            trial.set_user_attr(decode.RESULT, decode.result_text(measurement, train_steps, duration_s))
            self._study.tell(trial, self._values(measurement))

    def fail(self, trial: optuna.Trial, kind: str, reason: str, *, duration_s: float) -> None:
        """Record a failed trial with its reason; it never enters a front."""
        with storage_faults(self.paths):
            trial.set_user_attr(decode.FAILURE, decode.failure_text(kind, reason, duration_s))
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
    ) -> int:
        """Record a final trial in one step and return its number; one that is there already is not doubled."""
        for record in self.records():
            if record.fidelity == "final" and record.parent == parent.number:
                return record.number
        with storage_faults(self.paths):
            before = self._study.get_trials(deepcopy=False)[parent.number]
            trial = optuna.trial.create_trial(
                values=self._values(measurement),
                params=before.params,
                distributions=before.distributions,
                user_attrs={
                    decode.PLAN: decode.plan_text(recipe, "final", label, parent.number, "final"),
                    decode.RESULT: decode.result_text(measurement, train_steps, duration_s),
                },
            )
            self._study.add_trial(trial)
            return len(self._study.get_trials(deepcopy=False)) - 1

    def records(self) -> list[TrialRecord]:
        """Return every trial in the order of its number."""
        found = []
        with storage_faults(self.paths):
            trials = self._study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.number not in self._finished:
                record = decode.record(trial)
                if record.state == "running":
                    found.append(record)
                    continue
                self._finished[trial.number] = record
            found.append(self._finished[trial.number])
        return found

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
            self._study.set_user_attr(f"note:{key}", value)

    def notes(self) -> dict[str, str]:
        """Return all notes by key."""
        attributes = self._study.user_attrs.items()
        return {key.removeprefix("note:"): str(value) for key, value in attributes if key.startswith("note:")}

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
    def phase(self) -> str:
        """How far the study is: ``search``, ``final`` or ``done``."""
        return str(self._study.user_attrs.get("phase", "search"))

    @phase.setter
    def phase(self, phase: str) -> None:
        with storage_faults(self.paths):
            self._study.set_user_attr("phase", phase)


def list_studies() -> list[dict[str, Any]]:
    """Return one row for each study here, for people and scripts."""
    rows = []
    for folder in _study_folders():
        try:
            store = StudyStore.open(folder.name)
            records = store.records()
            settings = store.settings()
            rows.append(
                {
                    "study": folder.name,
                    "model": settings["model"],
                    "data": settings["data"],
                    "phase": store.phase,
                    "trials": len(records),
                    "failed": sum(r.state == "failed" for r in records),
                    "final": sum(r.fidelity == "final" for r in records),
                    "spent_s": round(store.spent_s, 1),
                }
            )
        except (StorageError, UsageError) as error:
            row = {"study": folder.name, "model": "", "data": "", "phase": f"unreadable: {error.message}"}
            rows.append({**row, "trials": 0, "failed": 0, "final": 0, "spent_s": 0.0})
    return rows


@contextmanager
def storage_faults(paths: StudyPaths) -> Iterator[None]:
    """Turn faults of the database and the disk into a ``StorageError`` that says what to do."""
    faults = (SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError, OSError)
    try:
        yield
    except faults as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise StorageError(
            f"the record of study {paths.name!r} ({str(paths.database)!r}) cannot be used: {cause}",
            "free space or mend the file's permissions and run the same command again; finished trials are kept. "
            "A damaged file can be set aside with --fresh",
        ) from error


def _open_database(paths: StudyPaths, settings: dict[str, Any], *, create: bool) -> optuna.Study:
    if create:
        # The journal mode is kept in the file; set before Optuna's first connection it holds for all of them.
        with sqlite3.connect(paths.database) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{paths.database}",
            engine_kwargs={"connect_args": {"timeout": 30}},
            skip_table_creation=not create,
        )
        # An acknowledged trial survives a power cut as well as a kill: every commit is flushed.
        event.listen(storage.engine, "connect", lambda link, _: link.execute("PRAGMA synchronous=FULL"))
        if not create:
            return optuna.load_study(study_name=_only_study(storage, paths), storage=storage)
        study = optuna.create_study(
            study_name=settings["study"],
            storage=storage,
            directions=[_DIRECTIONS[name] for name in settings["objectives"]],
            load_if_exists=True,
        )
        study.set_metric_names([METRIC_NAMES[name] for name in settings["objectives"]])
        study.set_user_attr("autoprune_schema", SCHEMA)
        return study


def _only_study(storage: optuna.storages.RDBStorage, paths: StudyPaths) -> str:
    names = optuna.get_all_study_names(storage)
    if len(names) != 1:
        raise StorageError(f"{str(paths.database)!r} holds {len(names)} studies instead of one: {names}")
    return names[0]


def _settings_text(settings: dict[str, Any]) -> str:
    lines = [f"# The settings of this study; `autoprune search -c settings.yaml` takes them. schema {SCHEMA}"]
    # JSON values are YAML values, and survive every reader alike.
    lines += [f"{name}: {json.dumps(value)}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def _read_settings(paths: StudyPaths) -> dict[str, Any]:
    try:
        lines = paths.settings.read_text(encoding="utf-8").splitlines()
        settings = {
            name: json.loads(value)
            for name, _, value in (
                line.partition(": ") for line in lines if line and not line.startswith("#")
            )
        }
        settings["objectives"], settings["sampler"], settings["study"]
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(
            f"{str(paths.settings)!r} cannot be read: {error}",
            "restore the file, or set the study aside with --fresh",
        ) from error
    return settings


def _check_same(before: dict[str, Any], now: dict[str, Any], paths: StudyPaths) -> None:
    names = sorted(set(before) | set(now))
    changed = [f"  {n}: {before.get(n)!r} -> {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]
    if changed:
        raise UsageError(
            "\n".join([f"study {paths.name!r} was made with other settings:", *changed]),
            "use the settings it was made with, another --study NAME, or --fresh to start over (the old study is kept)",
        )


def _take_lock(paths: StudyPaths) -> int:
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(paths.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(
            f"folder {str(paths.root)!r} cannot be written: {error.strerror or error}",
            "choose a writable folder with AUTOPRUNE_STUDIES",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StorageError(
            f"study {paths.name!r} is being run by another process",
            "wait for it, stop it, or use another --study NAME",
        ) from error
    return descriptor


def _move_aside(paths: StudyPaths) -> None:
    number = 1
    while (place := paths.root.with_name(f"{paths.name}.{number}")).exists():
        number += 1
    try:
        paths.root.rename(place)
    except OSError as error:
        raise StorageError(f"{str(paths.root)!r} cannot be moved aside: {error.strerror or error}") from error


def _study_folders() -> list[Path]:
    root = studies_root()
    if not root.is_dir():
        return []
    found = []
    for folder in sorted(root.iterdir()):
        try:
            check_study_name(folder.name)
        except UsageError:
            continue
        if (folder / "study.db").is_file() and (folder / "settings.yaml").is_file():
            found.append(folder)
    return found
