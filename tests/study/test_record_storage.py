"""Optuna's database as our storage writes it: few transactions, each done once, and Optuna's own readers read it."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError, PendingRollbackError

from autoprune.study.lease import Lease
from autoprune.study.record_storage import RecordStorage, is_passing

CHOSEN = {"ratio": 0.25, "rung": 3, "criterion": "l2"}


@pytest.fixture
def storage(tmp_path: Path) -> RecordStorage:
    made = RecordStorage(f"sqlite:///{tmp_path}/study.db", {}, create=True)
    optuna.create_study(storage=made, study_name="s", directions=["minimize"] * 3)
    return made


def study_of(storage: RecordStorage) -> optuna.Study:
    return optuna.load_study(study_name="s", storage=storage)


def read(tmp_path: Path) -> list[optuna.trial.FrozenTrial]:
    """Return the trials as Optuna's own storage reads them."""
    return optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db").trials


def begin(storage: RecordStorage) -> optuna.Trial:
    trial = study_of(storage).ask()
    trial.suggest_float("ratio", 0.25, 0.25 + 1e-12)
    trial.suggest_int("rung", 3, 3)
    trial.suggest_categorical("criterion", ["l2"])
    return trial


def commits_of(storage: RecordStorage, action: Callable[[], object]) -> int:
    """Return how many transactions that write an action commits."""
    found: list[str] = []
    storage.scoped_session.remove()
    listener = lambda link, cursor, statement, *_: found.append(statement.split()[0])  # noqa: E731
    event.listen(storage.engine, "before_cursor_execute", listener)
    ended: list[int] = []
    committed = lambda link: ended.append(len(found))  # noqa: E731
    event.listen(storage.engine, "commit", committed)
    try:
        action()
    finally:
        event.remove(storage.engine, "before_cursor_execute", listener)
        event.remove(storage.engine, "commit", committed)
    writes = [place for place, word in enumerate(found) if word in ("INSERT", "UPDATE")]
    assert writes and max(writes) < max(ended), "not all was committed"
    return len({next(end for end in ended if end > place) for place in writes})


@pytest.mark.parametrize(
    "write",
    [
        lambda storage, trial: storage.set_trial_user_attr(trial._trial_id, "plan", {"a": [1]}),
        lambda storage, trial: storage.set_trial_system_attr(trial._trial_id, "plan", {"a": [1]}),
        lambda storage, trial: storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0, 2.0, 3.0]),
        lambda storage, trial: storage.finish(trial._trial_id, TrialState.FAIL, {"reason": "why", "kind": "nan"}),
    ],
    ids=["user attribute", "system attribute", "state", "end"],
)  # fmt: skip
def test_what_a_sampler_chose_is_written_with_whatever_comes_next(
    write: Callable[[RecordStorage, optuna.Trial], object], storage: RecordStorage, tmp_path: Path
) -> None:
    trial = begin(storage)
    assert read(tmp_path)[0].params == {}
    write(storage, trial)
    (found,) = read(tmp_path)
    assert {**found.params, "ratio": round(found.params["ratio"], 9)} == CHOSEN
    assert [type(found.distributions[name]) for name in CHOSEN] == [
        FloatDistribution, IntDistribution, CategoricalDistribution,
    ]  # fmt: skip
    attributes = {**found.user_attrs, **found.system_attrs}
    expected = {
        TrialState.RUNNING: {"plan": {"a": [1]}},
        TrialState.COMPLETE: {"autoprune:params": 3},
        TrialState.FAIL: {"autoprune:params": 3, "reason": "why", "kind": "nan"},
    }
    assert attributes == expected[found.state]
    again = storage.get_trial(trial._trial_id)
    assert (again.params, again.user_attrs, again.state) == (found.params, found.user_attrs, found.state)
    if found.state == TrialState.RUNNING:
        storage.finish(trial._trial_id, TrialState.FAIL, {"a": "1", "b": "2"})
    assert len(read(tmp_path)[0].params) == 3  # not written a second time


@pytest.mark.parametrize(
    "values", [(0.1, 2.0, 3.0), (math.inf, -math.inf, 1e300), ()], ids=["numbers", "infinities", "none"]
)
def test_a_trial_ends_in_one_transaction(
    values: tuple[float, ...], storage: RecordStorage, tmp_path: Path
) -> None:
    trial = begin(storage)
    storage.set_trial_user_attr(trial._trial_id, "plan", 1)
    state = TrialState.COMPLETE if values else TrialState.FAIL
    count = commits_of(
        storage,
        lambda: storage.finish(trial._trial_id, state, {"result": '{"x": 1}', "why": '"so"'}, values),
    )
    assert count == 1
    (found,) = read(tmp_path)
    assert (found.state, found.values, found.number) == (state, list(values) or None, 0)
    assert {name: found.user_attrs[name] for name in ("result", "why")} == {
        "result": '{"x": 1}', "why": '"so"',
    }  # fmt: skip
    assert found.datetime_complete is not None
    with pytest.raises(RuntimeError, match="can not be updated"):
        storage.finish(trial._trial_id, state, {}, values)


def fail_first(times: int, error: Exception) -> Callable[[], int]:
    """Return a call that fails so many times."""
    left = [times]

    def call() -> int:
        if left[0]:
            left[0] -= 1
            raise error
        return 7

    return call


LOCKED = OperationalError("UPDATE", {}, Exception("database is locked"))


def test_a_locked_database_is_waited_for_and_no_longer_than_patience(
    storage: RecordStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        now[0] += seconds
        waited.append(seconds)

    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: now[0])
    monkeypatch.setattr("autoprune.study.record_storage.time", clock)
    storage.patience_s = 60.0
    assert storage.patiently(fail_first(3, LOCKED)) == 7
    assert len(waited) == 3
    assert waited[0] < waited[2]
    with pytest.raises(OperationalError, match="locked"):
        storage.patiently(fail_first(10_000, LOCKED))
    assert 60.0 <= now[0] - sum(waited[:3]) < 66.0
    assert max(waited) < 4.5
    waited.clear()
    with pytest.raises(OperationalError, match="no such table"):
        storage.patiently(fail_first(1, OperationalError("", {}, Exception("no such table: trials"))))
    storage.patience_s = 0.0
    with pytest.raises(OperationalError, match="locked"):
        storage.patiently(fail_first(1, LOCKED))
    assert waited == []


class Receipts:
    """A lease that knows which writes landed.

    Attributes:
        asked: The receipts that were asked for.
    """

    def __init__(self, *, landed: bool) -> None:
        self._landed = landed
        self.asked: list[str] = []

    def landed(self, receipt: str) -> bool:
        self.asked.append(receipt)
        return self._landed


@pytest.mark.parametrize(("landed", "result"), [(None, 7), (False, 7), (True, 9)])
def test_a_write_whose_acknowledgement_was_lost_is_not_done_again(
    landed: bool | None, result: int, storage: RecordStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(sleep=lambda seconds: None, monotonic=lambda: 0.0)
    monkeypatch.setattr("autoprune.study.record_storage.time", clock)
    storage.patience_s = 60.0
    lease = None if landed is None else Receipts(landed=landed)
    storage.lease = cast(Lease, lease)
    assert storage.once(fail_first(0, LOCKED), lambda: 9) == 7
    assert lease is None or lease.asked == []
    assert storage.once(fail_first(1, LOCKED), lambda: 9) == result
    if lease is not None:
        (receipt,) = lease.asked
        assert len(receipt) == 32
    assert storage.scoped_session().info == {}


class Fault(Exception):
    """What a driver of PostgreSQL raises.

    Args:
        said: Its text.
        state: Its code.
    """

    def __init__(self, said: str, state: str | None = None) -> None:
        super().__init__(said)
        self.sqlstate = state


@pytest.mark.parametrize(
    ("state", "passes"),
    [
        ("08006", True), ("57P01", True), ("57P03", True), ("53300", True), ("40P01", True), ("40001", True),
        ("55P03", True), ("57014", False), ("28P01", False), ("42P01", False), ("53100", False),
    ],
)  # fmt: skip
def test_what_passes_is_known_by_its_code(state: str, passes: bool) -> None:
    error = OperationalError("", {}, Fault("", state))
    assert is_passing(error) == passes
    wrapped = optuna.exceptions.StorageInternalError("a fault")
    wrapped.__cause__ = error
    assert is_passing(wrapped) == passes


@pytest.mark.parametrize(
    ("name", "said", "passes"),
    [
        ("OperationalError", "connection refused", True),
        ("ConnectionTimeout", "connection timeout expired", True),
        ("OperationalError", "FATAL: password authentication failed", False),
        ("OperationalError", 'FATAL: database "x" does not exist', False),
        ("OperationalError", "fe_sendauth: no password supplied", False),
        ("InterfaceError", "connection refused", False),
    ],
)
def test_without_a_code_what_the_driver_says_counts(name: str, said: str, passes: bool) -> None:
    kind = type(name, (Fault,), {"__module__": "psycopg.errors"})
    assert is_passing(OperationalError("", {}, kind(said))) == passes


def test_other_faults_do_not_pass() -> None:
    assert not is_passing(ValueError("database is locked"))
    assert not is_passing(optuna.exceptions.StorageInternalError("database is locked"))
    assert is_passing(OperationalError("", {}, Exception("database table is locked")))
    assert not is_passing(OperationalError("", {}, Exception("disk I/O error")))
    assert is_passing(PendingRollbackError("the connection broke"))


def test_braces_in_a_path_are_kept(tmp_path: Path) -> None:
    (tmp_path / "{a}").mkdir()
    made = RecordStorage(f"sqlite:///{tmp_path}/{{a}}/study.db", {}, create=True)
    with made.engine.connect() as link:
        assert link.execute(text("SELECT count(*) FROM studies")).scalar() == 0
    assert (tmp_path / "{a}" / "study.db").is_file()


def test_who_reads_makes_no_tables(tmp_path: Path) -> None:
    with pytest.raises(optuna.exceptions.StorageInternalError):
        RecordStorage(f"sqlite:///{tmp_path}/empty.db", {}, create=False)
    with closing(sqlite3.connect(tmp_path / "empty.db")) as link:
        assert link.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
