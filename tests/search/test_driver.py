"""The driver on synthetic trials: order, budget, resume, failures, interruption."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoprune.config import Budget
from autoprune.errors import TooManyFailuresError
from autoprune.search.baselines import effective_key
from autoprune.search.outcome import Outcome
from autoprune.space.recipe import Recipe, uniform_recipe
from autoprune.study.artifacts import commit_folder, temporary_folder
from autoprune.study.decode import Plan
from tests.search.fakes import Scene, make_scene


@pytest.fixture(autouse=True)
def studies_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(tmp_path / "studies"))
    return tmp_path / "studies"


def run(scene: Scene, reserve_s: float = 0.0) -> None:
    try:
        scene.driver.search(lambda: reserve_s)
    finally:
        scene.store.release()


def test_dense_then_int8_then_uniform_ratios_then_proposals() -> None:
    scene = make_scene("order", budget=Budget(seconds=1000.0))
    run(scene)
    records = scene.store.records()
    assert records[0].origin == "dense"
    assert records[1].label == "int8"
    origins = [r.origin for r in records]
    first_proposal = origins.index("tpe")
    assert set(origins[1:first_proposal]) == {"baseline"}
    assert set(origins[first_proposal:]) == {"tpe"}
    assert {r.label for r in records if r.origin == "baseline"} >= {"uniform 0.5 int8", "uniform 0.5"}


def test_search_ends_before_its_share_of_the_budget() -> None:
    scene = make_scene("budget", budget=Budget(seconds=1000.0))
    run(scene)
    # 60 % belong to the final phase; a trial takes 10 s and the next one is expected to take 12.
    assert 400.0 - 12.0 <= scene.clock.now_s <= 400.0


def test_baselines_come_out_of_a_small_budget_but_not_beyond_it() -> None:
    scene = make_scene("small", budget=Budget(seconds=60.0))
    run(scene, reserve_s=10.0)
    assert scene.clock.now_s <= 50.0
    assert [r.origin for r in scene.store.records()][:2] == ["dense", "baseline"]
    assert "tpe" not in {r.origin for r in scene.store.records()}


def test_budget_of_trials_counts_proposals() -> None:
    scene = make_scene("trials", budget=Budget(trials=5))
    run(scene)
    assert sum(r.origin == "tpe" for r in scene.store.records()) == 5


def test_no_recipe_is_evaluated_twice() -> None:
    scene = make_scene("repeats", budget=Budget(trials=30))
    run(scene)
    keys = [effective_key(recipe, scene.driver.groups) for recipe in scene.trials.seen]
    assert len(keys) == len(set(keys))


def test_resume_adds_to_what_is_there() -> None:
    run(make_scene("again", budget=Budget(trials=3)))
    before = len(make_records("again"))
    scene = make_scene("again", budget=Budget(trials=6))
    run(scene)
    records = scene.store.records()
    assert len(records) == before + 3
    assert sum(r.origin == "dense" for r in records) == 1
    assert len({r.label for r in records if r.origin == "baseline"}) == sum(
        r.origin == "baseline" for r in records
    )
    assert scene.store.spent_s > scene.clock.now_s


def make_records(name: str) -> list[object]:
    from autoprune.study.store import StudyStore

    return list(StudyStore.open(name).records())


def test_a_lost_proposal_is_tried_again() -> None:
    scene = make_scene("lost", budget=Budget(trials=2))
    run(scene)
    scene = make_scene("lost", budget=Budget(trials=4))
    scene.driver._dense()
    trial, recipe = scene.driver._ask(None)
    scene.store.begin(trial, Plan(recipe, "tpe"))
    scene.store.release()
    scene = make_scene("lost", budget=Budget(trials=10))
    run(scene)
    records = scene.store.records()
    assert [r.failure_kind for r in records if r.number == trial.number] == ["lost"]
    key = effective_key(recipe, scene.driver.groups)
    assert any(
        r.state == "complete" and r.recipe is not None and effective_key(r.recipe, scene.driver.groups) == key
        for r in records
    )
    assert all(r.state != "running" for r in records)


def test_ten_failures_alike_end_the_study_with_the_reason() -> None:
    scene = make_scene("failures", budget=Budget(trials=100), fail_from=9)
    with pytest.raises(TooManyFailuresError, match="the loss became NaN"):
        run(scene)
    failed = [r for r in scene.store.records() if r.state == "failed"]
    assert len(failed) == 10
    assert all(r.failure_kind == "nan" and r.measurement is None for r in failed)
    assert scene.events[-1].failures == {"nan": 10}


def test_an_interruption_ends_after_the_running_trial() -> None:
    scene = make_scene("interrupted", budget=Budget(trials=100), interrupt_at=4)
    run(scene)
    records = scene.store.records()
    assert len(records) == 4
    assert all(r.state == "complete" for r in records)


def test_artifacts_of_dominated_proposals_are_discarded() -> None:
    scene = make_scene("artifacts", budget=Budget(trials=20))
    run(scene)
    front = {r.number for r in scene.driver.records if scene.store.paths.artifact(r.number).is_dir()}
    assert 0 in front
    assert len(front) < len(scene.trials.seen)


def test_what_a_killed_trial_started_from_is_kept_until_it_is_tried_again() -> None:
    scene = make_scene("parents", budget=Budget(trials=3))
    scene.driver.search(lambda: 0.0)
    store = scene.store
    dominated = next(
        r.number
        for r in store.records()
        if r.origin == "tpe" and not scene.driver.paths.artifact(r.number).exists()
    )
    folder = scene.driver.paths.artifact(dominated)
    fresh = temporary_folder(scene.driver.paths.artifacts)
    (fresh / "model.onnx").write_bytes(b"model")
    commit_folder(fresh, folder)
    recipe = uniform_recipe(scene.driver.groups, 0.65, 8)
    store.begin(store.ask({}), Plan(recipe, "solver", rung=2, started_from=dominated))
    store.release()
    again = make_scene("parents", budget=Budget(trials=4))
    starts: list[Path | None] = []
    run = again.driver._run

    def noted(recipe: Recipe, place: Path, start: Path | None, number: int) -> Outcome:
        starts.append(start if start is not None and start.is_dir() else None)
        return run(recipe, place, start, number)

    again.driver._run = noted
    again.driver.search(lambda: 0.0)
    assert folder in starts
    assert not again.driver.kept.wanted
    again.store.release()


def test_a_killed_trial_whose_start_is_gone_is_trained_whole() -> None:
    scene = make_scene("whole", budget=Budget(trials=1))
    scene.driver.search(lambda: 0.0)
    store, space = scene.store, scene.driver.space
    recipe = uniform_recipe(scene.driver.groups, 0.65, 8)
    store.begin(store.ask({}), Plan(recipe, "solver", rung=2, started_from=999))
    store.release()
    again = make_scene("whole", budget=Budget(trials=1))
    (job,) = again.driver._unfinished.lost(again.driver.kept.is_sound)
    assert job.started_from is None and job.recipe is not None
    assert job.recipe.recovery.finetune_steps == space.rungs[2].steps
    again.store.release()
