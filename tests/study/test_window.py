"""The trials that samplers learn from in studies of thousands."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import optuna
import pytest

from autoprune.study import window
from autoprune.study.decode import Plan
from autoprune.study.front import front_numbers
from autoprune.study.store import StudyStore
from autoprune.study.window import Window
from tests.study.large import GROUPS, SPACE, fill, measured
from tests.study.made import open_for_writing


@pytest.fixture(autouse=True)
def studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(tmp_path))


def seen_by(store: StudyStore, most: int) -> Window:
    return Window(store._storage, store._study, store._log, store.objectives, most)


def propose(store: StudyStore, number: int) -> optuna.Trial:
    """Let the sampler choose and record one more trial."""
    trial = store.ask()
    recipe = SPACE.suggest(trial, GROUPS)
    store.begin(trial, Plan(recipe, store.sampler_name))
    store.complete(trial, measured(recipe, number), train_steps=40, duration_s=12.0)
    return trial


def test_a_small_study_is_seen_whole() -> None:
    store = open_for_writing("s")
    fill(store, 20)
    seen, whole = seen_by(store, 20).study(), store._study.get_trials()
    assert seen.get_trials() == whole
    assert seen.get_trials(states=[optuna.trial.TrialState.RUNNING]) == []
    assert seen.study_name == store._study.study_name


def test_of_a_large_one_the_latest_and_the_front_are_seen() -> None:
    store = open_for_writing("s")
    fill(store, 60)
    small = seen_by(store, 10)
    front = front_numbers(store.records(), store.objectives)
    assert front - set(range(50, 60))  # some of it is old
    assert [t.number for t in small.trials()] == sorted(front | set(range(50, 60)))
    whole = {t.number: t for t in store._study.get_trials()}
    assert all(whole[t.number] == t for t in small.trials())


def test_what_comes_later_is_seen_and_what_was_beaten_is_forgotten() -> None:
    store = open_for_writing("s", sampler="random")
    fill(store, 60)
    small = seen_by(store, 10)
    small.trials()
    running = store.ask()
    assert all(t.state.is_finished() for t in small.trials())  # what runs holds nothing to learn from
    recipe = SPACE.suggest(running, GROUPS)
    store.begin(running, Plan(recipe, "random"))
    store.complete(running, measured(recipe, 60), train_steps=40, duration_s=12.0)
    for number in range(61, 75):
        propose(store, number)
    front = front_numbers(store.records(), store.objectives)
    assert [t.number for t in small.trials()] == sorted(front | set(range(65, 75)))


def test_what_was_cut_off_takes_nobodys_place() -> None:
    store = open_for_writing("s", sampler="random")
    for number in range(30):
        propose(store, number)
    before = [t.params for t in seen_by(store, 10).trials()]
    for kind in ("lost", "interrupted", "worker-lost"):
        trial = store.ask()
        store.begin(trial, Plan(SPACE.suggest(trial, GROUPS), "random"))
        store.fail(trial, kind, "a test", duration_s=1.0)
    assert [t.params for t in seen_by(store, 10).trials()] == before


@pytest.mark.parametrize("few", [0, 200])
def test_each_trial_is_read_once_whatever_runs(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "_FEW", few)
    store = open_for_writing("s", sampler="random")
    fill(store, 30)
    seen, read = seen_by(store, 20), []
    old = store.ask()  # runs while all others come and go
    recipe = SPACE.suggest(old, GROUPS)
    store.begin(old, Plan(recipe, "random"))
    ask = store._storage._get_trials

    def counted(*arguments: Any) -> list[optuna.trial.FrozenTrial]:
        found = ask(*arguments)
        read.append(len(found))
        return found

    monkeypatch.setattr(store._storage, "_get_trials", counted)
    front = front_numbers(store.records(), store.objectives)
    assert [t.number for t in seen.trials()] == sorted(front | set(range(10, 30)))
    read.clear()
    for number in range(31, 36):
        propose(store, number)
        assert [t.number for t in seen.trials()][-1] == number
    assert read == [1] * 5
    store.complete(old, measured(recipe, 30), train_steps=40, duration_s=12.0)
    assert [t.number for t in seen.trials()][-6:] == list(range(30, 36))


def test_who_asks_for_trials_may_change_its_own_alone() -> None:
    store = open_for_writing("s")
    fill(store, 5)
    seen = seen_by(store, 20).study()
    seen.get_trials()[0].user_attrs["changed"] = True
    assert "changed" not in seen.get_trials(deepcopy=False)[0].user_attrs


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_proposals_are_the_same_where_nothing_is_left_out(
    sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    for name, plain in (("a", True), ("b", False)):
        store = open_for_writing(name, sampler=sampler)
        if plain:
            monkeypatch.setattr(store._window, "study", lambda store=store: copy.copy(store._study))
        # Enough for both to learn from them: NSGA-II draws its first 20 blindly.
        drawn.append([propose(store, number).params for number in range(48)])
    assert drawn[0] == drawn[1]


def test_the_parents_of_a_generation_are_seen_however_old_they_are() -> None:
    store = open_for_writing("s", sampler="nsga2")
    store._window = seen_by(store, 25)
    parents: set[int] = set()
    for number in range(90):  # four generations of 20
        propose(store, number)
        attributes = store._storage.get_study_system_attrs(store._study._study_id)
        generations = [int(key.rpartition(":")[2]) for key in attributes if ":parent:" in key]
        if generations:
            ids = attributes[f"NSGAIISampler:parent:{max(generations)}"]
            parents = store._log.numbers_of(ids)
            assert len(parents) == len(ids)
            assert parents <= {t.number for t in store._window.trials()}
    assert min(parents) < 90 - 25


def test_a_recipe_outside_of_the_space_asks_no_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_for_writing("s")
    fill(store, 20)

    def look(*arguments: object) -> None:
        raise AssertionError("the sampler looked at the study")

    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_relative", look)
    trial = store.ask({})
    assert trial.params == {}
