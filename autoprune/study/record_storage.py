"""Optuna's database, with each write done exactly once whatever breaks in between, and few transactions a trial."""

from __future__ import annotations

import copy
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar, cast

import optuna
from optuna.distributions import BaseDistribution, check_distribution_compatibility, distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from sqlalchemy import event, insert
from sqlalchemy.exc import DBAPIError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.orm import Session

from autoprune.study.lease import Lease

# So long a database may be away, as one that is restarted is, before a search ends.
PATIENCE_S = 60.0
_LONGEST_WAIT_S = 3.0
_RECEIPT, _TRIAL = "autoprune receipt", "autoprune trial"
_FAULTS = (SQLAlchemyError, optuna.exceptions.StorageInternalError)
# By PostgreSQL's five-letter codes: connections (08), shutdowns (57P0…), too many connections, deadlocks.
_PASSING = ("08", "57P01", "57P02", "57P03", "57P05", "53300", "40001", "40P01", "55P03")
_T = TypeVar("_T")


class RecordStorage(RDBStorage):
    """The database of one study.

    Calls are repeated for :data:`PATIENCE_S` while the database is away or locked. A write that was committed although
    its acknowledgement was lost is known by its receipt and not done again.

    Parameters that a sampler chose are kept until the next attribute of their trial and written with it: 60 parameters
    are one transaction instead of 60. A trial that is killed before has no recipe in either case.

    Attributes:
        lease: Proved within each write; None for SQLite, whose file one process holds locked, and for readers.
        patience_s: Seconds for which calls are repeated.
    """

    lease: Lease | None = None
    patience_s: float = 0.0

    def __init__(self, url: str, engine_kwargs: dict[str, Any], *, create: bool) -> None:
        self._waiting: dict[int, list[dict[str, Any]]] = {}
        self._made: dict[int, optuna.trial.FrozenTrial] = {}
        # Optuna fills braces in a URL as those of a template.
        super().__init__(
            url.replace("{", "{{").replace("}", "}}"), engine_kwargs, skip_table_creation=not create
        )
        event.listen(self.scoped_session, "before_commit", self._before_commit)

    # -- exactly once ------------------------------------------------------------------------

    def patiently(self, call: Callable[[], _T]) -> _T:
        """Return what ``call`` returns, repeated while the database is away; only for what may be done twice."""
        waits = _waits(self.patience_s)
        while True:
            try:
                return call()
            except _FAULTS as error:
                if not is_passing(error) or (wait_s := next(waits, None)) is None:
                    raise
                time.sleep(wait_s)

    def once(self, call: Callable[[], _T], landed: Callable[[], _T]) -> _T:
        """Return what a write returns, done once.

        Args:
            call: Writes, in one transaction of Optuna's session.
            landed: Gives the result of an attempt that was committed without being acknowledged.
        """
        info = self.scoped_session().info
        info[_RECEIPT] = uuid.uuid4().hex
        tried = False

        def attempt() -> _T:
            nonlocal tried
            if tried and self.lease is not None and self.lease.landed(info[_RECEIPT]):
                return landed()
            tried = True
            return call()

        try:
            return self.patiently(attempt)
        finally:
            info.pop(_RECEIPT, None)
            info.pop(_TRIAL, None)

    def _before_commit(self, session: Session) -> None:
        receipt = session.info.get(_RECEIPT)
        if receipt is not None and self.lease is not None:
            session.flush()
            self.lease.prove(session, receipt, session.info.get(_TRIAL))

    # -- trials ------------------------------------------------------------------------------

    def _create_new_trial(
        self, study_id: int, template_trial: optuna.trial.FrozenTrial | None = None
    ) -> optuna.trial.FrozenTrial:
        create = super()._create_new_trial
        # Optuna repeats this itself too; _get_prepared_new_trial finds what an earlier attempt made in both cases.
        info = self.scoped_session().info
        info[_RECEIPT] = uuid.uuid4().hex
        try:
            made = self.patiently(lambda: create(study_id, template_trial))
            # Who makes a trial reads it next, in seven statements.
            self._made = {made._trial_id: copy.deepcopy(made)}
            return made
        finally:
            info.pop(_RECEIPT, None)
            info.pop(_TRIAL, None)

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: optuna.trial.FrozenTrial | None, session: Session
    ) -> models.TrialModel:
        receipt = session.info.get(_RECEIPT)
        made = self.lease.made(session, receipt) if self.lease is not None and receipt else None
        trial = session.get(models.TrialModel, made) if made is not None else None
        if trial is None:
            trial = super()._get_prepared_new_trial(study_id, template_trial, session)
        session.info[_TRIAL] = trial.trial_id
        return trial

    def _set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None,
    ) -> None:
        if previous_distribution is not None:
            check_distribution_compatibility(previous_distribution, distribution)
        self._waiting.setdefault(trial_id, []).append(
            {
                "trial_id": trial_id,
                "param_name": param_name,
                "param_value": param_value_internal,
                "distribution_json": distribution_to_json(distribution),
            }
        )

    def _set_trial_attr_without_commit(
        self, session: Session, model_cls: Any, trial_id: int, key: str, value: Any
    ) -> None:
        if rows := self._waiting.get(trial_id):
            session.execute(insert(models.TrialParamModel), rows)
        super()._set_trial_attr_without_commit(session, model_cls, trial_id, key, value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set an attribute, and write the parameters that wait for it."""
        write = super().set_trial_user_attr
        self.once(lambda: write(trial_id, key, value), lambda: None)
        self._waiting.pop(trial_id, None)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set an attribute, and write the parameters that wait for it."""
        write = super().set_trial_system_attr
        self.once(lambda: write(trial_id, key, value), lambda: None)
        self._waiting.pop(trial_id, None)

    def finish(
        self,
        trial_id: int,
        state: optuna.trial.TrialState,
        attributes: Mapping[str, str],
        values: Sequence[float] = (),
    ) -> None:
        """End a trial with its last attributes and its values in one transaction.

        Parameters that still wait, as none do of a trial whose plan was written, are written in one before it.
        """
        self._write_waiting(trial_id)

        def write() -> None:
            with _create_scoped_session(self.scoped_session) as session:
                trial = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
                self.check_trial_is_updatable(trial_id, cast(optuna.trial.TrialState, trial.state))
                for key, value in attributes.items():
                    self._set_trial_attr_without_commit(
                        session, models.TrialUserAttributeModel, trial_id, key, value
                    )
                if values:  # it had none before, and Optuna would look for each
                    session.execute(insert(models.TrialValueModel), _value_rows(trial_id, values))
                trial.state = state
                trial.datetime_complete = datetime.now()

        self.once(write, lambda: None)

    def get_trial(self, trial_id: int) -> optuna.trial.FrozenTrial:
        """Return a trial; one that was just made as it was made."""
        made = self._made.pop(trial_id, None)
        read = super().get_trial
        return made if made is not None else self.patiently(lambda: read(trial_id))

    def set_trial_state_values(
        self, trial_id: int, state: optuna.trial.TrialState, values: Any = None
    ) -> bool:
        """Set the state, after the parameters that wait for it."""
        self._write_waiting(trial_id)
        write = super().set_trial_state_values
        return self.once(lambda: write(trial_id, state, values), lambda: True)

    def _write_waiting(self, trial_id: int) -> None:
        if rows := self._waiting.get(trial_id):
            self.set_trial_system_attr(trial_id, "autoprune:params", len(rows))


def _value_rows(trial_id: int, values: Sequence[float]) -> list[dict[str, Any]]:
    stored = (models.TrialValueModel.value_to_stored_repr(value) for value in values)
    return [
        {"trial_id": trial_id, "objective": objective, "value": value, "value_type": kind}
        for objective, (value, kind) in enumerate(stored)
    ]


def is_passing(error: BaseException) -> bool:
    """Return whether a fault of the database passes: it is away, restarts, or is locked by another process."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    if isinstance(cause, PendingRollbackError):  # Optuna went on in a session whose connection had broken
        return True
    if not isinstance(cause, DBAPIError):
        return False
    origin = cause.orig
    state = getattr(origin, "sqlstate", None)
    if state is not None:
        return str(state).startswith(_PASSING)
    if type(origin).__module__.startswith("psycopg"):
        text = str(origin)
        refused = "authentication" in text or "does not exist" in text or "no password" in text
        return type(origin).__name__ in ("OperationalError", "ConnectionTimeout") and not refused
    return "database is locked" in str(origin) or "database table is locked" in str(origin)


def _waits(patience_s: float) -> Iterator[float]:
    """Yield pauses that grow, until their sum is what a caller waits for."""
    begun_s, wait_s = time.monotonic(), 0.05
    while time.monotonic() - begun_s < patience_s:
        yield wait_s * (0.5 + random.random())  # noqa: S311 (so that drivers do not come back all at once)
        wait_s = min(_LONGEST_WAIT_S, 2 * wait_s)


def _reading(name: str) -> Callable[..., Any]:
    read = getattr(RDBStorage, name)

    def call(self: RecordStorage, *args: Any, **kwargs: Any) -> Any:
        return self.patiently(lambda: read(self, *args, **kwargs))

    return call


def _writing(name: str) -> Callable[..., Any]:
    write = getattr(RDBStorage, name)

    def call(self: RecordStorage, *args: Any, **kwargs: Any) -> Any:
        return self.once(lambda: write(self, *args, **kwargs), lambda: None)

    return call


for _name in (
    "get_study_id_from_name", "get_study_name_from_id", "get_study_directions", "get_study_user_attrs",
    "get_study_system_attrs", "get_all_studies", "_get_trials", "get_trial_id_from_study_id_trial_number",
    "create_new_study",
):  # fmt: skip
    setattr(RecordStorage, _name, _reading(_name))
for _name in ("set_study_user_attr", "set_study_system_attr", "set_trial_intermediate_value", "delete_study"):
    setattr(RecordStorage, _name, _writing(_name))
