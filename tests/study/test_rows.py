"""Trials straight from the tables of a file: which are read, in what order, and again only where they may differ."""

from __future__ import annotations

import gc
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import Connection, event

from autoprune.space.recipe import uniform_recipe
from autoprune.study import decode as decoding
from autoprune.study import rows
from autoprune.study.decode import Plan
from autoprune.study.record_storage import RecordStorage
from autoprune.study.records import TrialRecord
from autoprune.study.rows import count_trials, read_rows
from autoprune.study.trial_log import TrialLog, _uncollected
from tests.study.made import GROUPS, open_for_writing


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Two studies in one file: the second has trials 0 and 1 finished, and 2 to 4 running."""
    place = tmp_path_factory.mktemp("made") / "study.db"
    storage = RecordStorage(f"sqlite:///{place}", {}, create=True)
    for name, finished, running in (("other", 1, 1), ("own", 2, 3)):
        study = optuna.create_study(study_name=name, storage=storage)
        for number in range(finished + running):
            trial = study.ask()
            trial.set_user_attr("autoprune:plan", f"plan of {name} {number}")
            trial.set_user_attr("theirs", "not ours")
            if number < finished:
                study.tell(trial, 0.5)
    storage.scoped_session.remove()
    storage.engine.dispose()
    return place.read_bytes()


@pytest.fixture
def storage(made: bytes, tmp_path: Path) -> Iterator[RecordStorage]:
    (tmp_path / "study.db").write_bytes(made)
    storage = RecordStorage(f"sqlite:///{tmp_path / 'study.db'}", {}, create=False)
    yield storage
    storage.engine.dispose()


@pytest.fixture
def link(storage: RecordStorage) -> Iterator[Connection]:
    with storage.engine.connect() as link:
        yield link


def test_rows_are_of_one_study_and_hold_our_texts(link: Connection) -> None:
    found = read_rows(link, 2)
    assert [row.number for row in found] == [0, 1, 2, 3, 4]
    assert [row.state for row in found] == [TrialState.COMPLETE] * 2 + [TrialState.RUNNING] * 3
    assert [row.attributes for row in found] == [{"autoprune:plan": f"plan of own {n}"} for n in range(5)]
    assert [row.id for row in found] == [3, 4, 5, 6, 7]
    assert (count_trials(link, 2), count_trials(link, 1), count_trials(link, 9)) == (5, 2, 0)
    assert read_rows(link, 9) == []


def test_only_newer_trials_and_those_that_are_named_are_read(
    link: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def numbers(**chosen: object) -> list[int]:
        return [row.number for row in read_rows(link, 2, **chosen)]  # type: ignore[arg-type]

    assert numbers(above=5) == [3, 4]
    assert numbers(above=7) == []
    assert numbers(above=0) == [0, 1, 2, 3, 4]
    assert numbers(above=5, also=(3, 4)) == [0, 1, 3, 4]
    assert numbers(above=-1, also=(3,)) == [0, 1, 2, 3, 4]
    # Another study's are not read, whoever names them.
    assert numbers(above=7, also=(1, 5)) == [2]
    assert [row.attributes for row in read_rows(link, 2, above=6)] == [{"autoprune:plan": "plan of own 4"}]
    monkeypatch.setattr(rows, "_MOST_NAMED", 1)
    assert numbers(above=6, also=(3,)) == [0, 4]
    # Too many to name are read with all others.
    assert numbers(above=6, also=(3, 4)) == [0, 1, 2, 3, 4]


def test_few_texts_are_asked_for_by_name_and_many_with_all_others(
    storage: RecordStorage, link: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[int] = []

    def count(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if "value_json" in statement:
            named.append(len(parameters))

    event.listen(storage.engine, "before_cursor_execute", count)
    for most, least in ((4, 0), (5, 5)):
        monkeypatch.setattr(rows, "_MOST_NAMED", most)
        assert len(read_rows(link, 2)) == 5
        # Three keys of ours, beside the trials or their study.
        assert named.pop() == 3 + max(1, least)
    assert read_rows(link, 9) == [] and not named


def test_texts_that_are_no_json_text_come_as_they_are(storage: RecordStorage, tmp_path: Path) -> None:
    for value, text in (("{", "{"), ("7", "7"), ('"a"', "a"), ("[" * 100_000, "[" * 100_000)):
        with closing(sqlite3.connect(tmp_path / "study.db")) as file:
            file.execute(
                "UPDATE trial_user_attributes SET value_json = ? WHERE key = 'autoprune:plan'", (value,)
            )
            file.commit()
        with storage.engine.connect() as link:
            assert read_rows(link, 2)[0].attributes == {"autoprune:plan": text}


def change(tmp_path: Path, statement: str) -> None:
    with closing(sqlite3.connect(tmp_path / "study.db")) as file:
        file.execute(statement)
        file.commit()


def test_finished_trials_are_read_once_and_running_ones_until_they_end(
    storage: RecordStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(tmp_path, "UPDATE trial_user_attributes SET value_json = '\"{}\"' WHERE key = 'autoprune:plan'")
    change(tmp_path, "UPDATE trials SET state = 'FAIL' WHERE state = 'COMPLETE'")
    log = TrialLog(storage, 2)
    assert log.count() == 5
    asked: list[tuple[int, tuple[int, ...]]] = []
    read = log._read

    def noted(above: int, also: tuple[int, ...], known: Collection[int]) -> list[rows.Row]:
        asked.append((above, also))
        assert not known, "none of them has a recipe yet"
        return read(above, also, known)

    monkeypatch.setattr(log, "_read", noted)
    states = ["failed", "failed", "running", "running", "running"]
    assert [record.state for record in log.records()] == states
    change(tmp_path, "UPDATE trials SET state = 'FAIL' WHERE trial_id = 6")
    states[3] = "failed"
    found = log.records()
    assert [(record.number, record.state) for record in found] == list(enumerate(states))
    found.clear()
    assert [record.state for record in log.records()] == states, "what was returned is the caller's own"
    assert asked == [(-1, ()), (7, (5, 6, 7)), (7, (5, 7))]


def test_a_running_trial_whose_recipe_is_known_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(tmp_path / "studies"))
    store = open_for_writing("s", sampler="random")
    asked = [store.ask() for _ in range(3)]
    recipe = uniform_recipe(GROUPS, 0.5, 8)
    decoded: list[int] = []
    decode = decoding.record

    def noted(number: int, *rest: Any) -> TrialRecord:
        decoded.append(number)
        return decode(number, *rest)

    monkeypatch.setattr(decoding, "record", noted)
    assert [r.recipe for r in store.records()] == [None] * 3
    store.begin(asked[1], Plan(recipe, "random"))
    decoded.clear()
    assert [r.recipe for r in store.records()] == [None, recipe, None]
    assert decoded == [0, 1, 2]
    decoded.clear()
    store.records()
    assert decoded == [0, 2], "nothing of a trial changes between its plan and its end"
    store.fail(asked[1], "nan", "the loss became NaN", duration_s=1.0)
    assert [r.state for r in store.records()] == ["running", "failed", "running"]
    store.begin(asked[0], Plan(recipe, "random"))
    store.begin(asked[2], Plan(recipe, "random"))
    store.records()
    decoded.clear()
    assert [r.state for r in store.records()] == ["running", "failed", "running"]
    assert decoded == []
    store.release()


def test_trials_that_came_out_of_their_order_are_all_read_again(
    storage: RecordStorage, tmp_path: Path
) -> None:
    change(tmp_path, "UPDATE trial_user_attributes SET value_json = '\"{}\"' WHERE key = 'autoprune:plan'")
    change(tmp_path, "UPDATE trials SET state = 'FAIL'")
    log = TrialLog(storage, 2)
    # As if trial 1 were not committed yet.
    change(tmp_path, "UPDATE trials SET study_id = 9 WHERE trial_id = 4")
    assert [record.number for record in log.records()] == [0, 2, 3, 4]
    change(tmp_path, "UPDATE trials SET study_id = 2 WHERE trial_id = 4")
    assert [record.number for record in log.records()] == [0, 1, 2, 3, 4]


def test_numbers_and_their_ids_lead_to_each_other(storage: RecordStorage, tmp_path: Path) -> None:
    change(tmp_path, "UPDATE trial_user_attributes SET value_json = '\"{}\"' WHERE key = 'autoprune:plan'")
    change(tmp_path, "UPDATE trials SET state = 'FAIL' WHERE state = 'COMPLETE'")
    log = TrialLog(storage, 2)
    assert (log.last_id(), log.id_of(-1), log.numbers_of([1, 9])) == (-1, -1, set())
    log.records()
    assert [log.id_of(number) for number in range(-1, 5)] == [-1, 3, 4, 5, 6, 7]
    assert log.last_id() == 7
    # Other studies' trials, and those that are not there, have no number.
    assert log.numbers_of([1, 2, 3, 5, 7, 8, 99]) == {0, 2, 4}


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_collected_after_reading_as_before(
    storage: RecordStorage, tmp_path: Path, collects: bool
) -> None:
    change(tmp_path, "UPDATE trial_user_attributes SET value_json = '\"{}\"' WHERE key = 'autoprune:plan'")
    change(tmp_path, "UPDATE trials SET state = 'FAIL' WHERE state = 'COMPLETE'")
    was = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        TrialLog(storage, 2).records()
        assert gc.isenabled() == collects
    finally:
        (gc.enable if was else gc.disable)()


def test_garbage_is_collected_after_several_threads_have_read() -> None:
    was = gc.isenabled()
    try:
        gc.enable()
        first, second = _uncollected(1), _uncollected(1)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not gc.isenabled(), "the other one still reads"
        second.__exit__(None, None, None)
        assert gc.isenabled()
    finally:
        (gc.enable if was else gc.disable)()
