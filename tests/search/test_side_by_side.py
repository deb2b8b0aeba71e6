"""A driver with several workers: nothing is done twice, budgets and records are kept, and whatever happens it ends."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoprune.clock import SystemClock
from autoprune.config import Budget, StudyConfig
from autoprune.errors import TooManyFailuresError
from autoprune.search.auto import AutoSearch
from autoprune.search.baselines import Baseline, effective_key, grid_recipes
from autoprune.search.executors.contract import CRASHED, WORKER_LOST
from autoprune.search.lanes import Lanes
from autoprune.search.proposals import Proposer, Result
from autoprune.space.groups import Groups
from autoprune.space.recipe import Recipe
from autoprune.study.records import TrialRecord, is_given
from autoprune.study.screens import read_screens
from tests.search.fakes import Scene, make_groups, make_options, make_scene
from tests.search.synthetic import SCALES, Synthetic
from tests.search.team import Team
from tests.search.test_auto import FakeScreen

WORKERS = 8
# After the dense network and the baselines.
FIRST = 4
# Enough groups that a sampler draws a recipe twice only if it does not know what it drew.
GROUPS = make_groups((32, 64, 64, 32, 48, 96, 64, 32))


@pytest.fixture(autouse=True)
def few_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no matter of these tests."""
    (tmp_path / "space.yaml").write_text("baselines: {ratios: [0.5]}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def config(name: str, sampler: str, **fields: object) -> StudyConfig:
    made = {
        "model": "fake",
        "data": "fake",
        "study": name,
        "space": "space.yaml",
        "sampler": sampler,
        **fields,
    }
    return StudyConfig.model_validate(made)


def make_team_scene(
    name: str, team: Team, *, sampler: str = "tpe", budget: Budget | None = None, **others: Any
) -> Scene:
    return make_scene(
        name,
        budget=budget or Budget(trials=20),
        config=config(name, sampler),
        groups=team.groups,
        executor=team,
        run=team.trial,
        **others,
    )


def run(scene: Scene, screen: Callable[[Recipe], float] | None = None) -> list[TrialRecord]:
    """Run a scene's search in time, the default one with ``screen``; return the records."""

    def strategy(baselines: Sequence[Baseline]) -> None:
        assert screen is not None
        search = AutoSearch(
            scene.driver, make_options(scene.driver), screen, scene.driver.bench.config, scene.driver.clock
        )
        search.run(baselines)

    raised: list[BaseException] = []

    def work() -> None:
        try:
            scene.driver.search(lambda: 0.0, strategy if screen is not None else None)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60.0)
    assert not thread.is_alive(), "the search does not end"
    records = scene.store.records()
    scene.store.release()
    assert [r.number for r in records] == list(range(len(records)))
    assert not [r.number for r in records if r.state == "running"]
    if raised:
        raise raised[0]
    return records


def proposed(records: Sequence[TrialRecord], sampler: str) -> list[TrialRecord]:
    return [r for r in records if r.origin == sampler]


def same_as_running(scene: Scene, team: Team) -> list[str]:
    """Watch what begins; return the networks that were proposed while they ran."""
    found: list[str] = []
    listener = scene.driver.listener

    def listen(progress: Any) -> None:
        if progress.message.endswith("begins"):
            record = scene.driver.records[int(progress.message.split()[1])]
            assert record.recipe is not None
            key = effective_key(record.recipe, team.groups)
            if key in team.running() and record.origin not in ("dense", "baseline"):
                found.append(key)
        listener(progress)

    scene.driver.listener = listen
    return found


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_samplers_make_as_many_proposals_as_asked_and_none_of_what_runs(sampler: str) -> None:
    team = Team(WORKERS, GROUPS, together=FIRST)
    scene = make_team_scene(sampler, team, sampler=sampler)
    again = same_as_running(scene, team)
    records = run(scene)
    assert len(proposed(records, sampler)) == 20
    assert all(r.state == "complete" for r in records)
    assert team.all_at_once.is_set()
    assert again == []
    assert team.doubled == []
    assert len(team.begun) == len(set(team.begun)) == sum(not r.is_repeat for r in records)


def test_a_grid_is_tried_once_each() -> None:
    groups = make_groups()
    team = Team(WORKERS, groups, together=FIRST)
    scene = make_team_scene("grid", team, sampler="grid", budget=Budget(trials=10_000))
    planned = {
        effective_key(recipe, groups)
        for recipe in grid_recipes(scene.driver.space, groups, scene.driver.bench.config.seed)
    }
    records = run(scene)
    assert team.all_at_once.is_set()
    assert team.doubled == []
    assert len(team.begun) == len(set(team.begun))
    tried = [effective_key(r.recipe, groups) for r in proposed(records, "grid") if r.recipe]
    assert set(tried) == planned
    assert len(tried) == len(grid_recipes(scene.driver.space, groups, 0))


def test_a_space_so_small_that_what_runs_is_drawn_again_repeats_and_evaluates_once(tmp_path: Path) -> None:
    space = tmp_path / "small.yaml"
    space.write_text("ratios: [0.0, 0.5]\nbits: [32]\n", encoding="utf-8")
    groups = make_groups((32, 64))
    team = Team(WORKERS, groups)
    scene = make_scene(
        "small",
        budget=Budget(trials=40),
        config=config("small", "random", space=str(space)),
        groups=groups,
        executor=team,
        run=team.trial,
    )
    records = run(scene)
    assert len(proposed(records, "random")) == 40
    assert team.doubled == []
    assert len(team.begun) == len(set(team.begun))
    assert any(r.is_repeat for r in records)
    firsts = {r.number: r for r in records if not r.is_repeat}
    for record in records:
        if record.repeat_of is not None:
            assert record.measurement == firsts[record.repeat_of].measurement


def test_the_default_search_looks_at_nothing_twice_and_trains_each_network_once_a_rung() -> None:
    team = Team(4, GROUPS, together=2)
    scene = make_team_scene("auto", team, sampler="auto", budget=Budget(trials=16))
    again = same_as_running(scene, team)
    records = run(scene, team.screen)
    assert sum(not is_given(r, "auto") for r in records) == 16
    assert all(r.state == "complete" and not r.is_repeat for r in records)
    assert again == []
    assert team.doubled == []
    assert team.all_at_once.is_set()
    screens = [effective_key(s.recipe, GROUPS) for s in read_screens(scene.store.paths)]
    assert len(screens) > 16
    assert len(screens) == len(set(screens))
    by_rung = Counter((effective_key(r.recipe, GROUPS), r.rung) for r in records if r.recipe)
    assert set(by_rung.values()) == {1}


@pytest.mark.parametrize("use_solver", [True, False])
def test_proposals_side_by_side_differ_and_go_on_from_each_other_s_results(use_solver: bool) -> None:
    problem = Synthetic.make(0)
    proposer = Proposer(
        problem.profile, SCALES, ("accuracy", "latency", "size"), seed=0, use_solver=use_solver
    )
    lanes = Lanes(WORKERS)
    running: list[bytes] = []
    found: list[bytes] = []
    doubled: list[bytes] = []

    def step() -> bool:
        if len(found) >= 96:
            return False
        proposal = proposer.propose()
        assert proposal is not None
        key = proposal.choice.tobytes()
        doubled.extend([key] * (key in running))
        running.append(key)
        found.append(key)
        proposer.reserve(proposal.choice)
        with lanes.waiting():
            threading.Event().wait(0.002)
        running.remove(key)
        values = problem.values(proposal.choice[None])[0]
        proposer.add(Result(proposal.choice, proposal.arm, values, proposal.weights))
        return True

    lanes.run(step)
    assert doubled == []
    assert len(set(found)) == len(found) == 96
    assert len(proposer.results) == 96
    assert np.isfinite(proposer.axes.total)


def test_a_budget_of_time_is_kept() -> None:
    team = Team(WORKERS, GROUPS, seconds=lambda number: 0.05)
    scene = make_team_scene("time", team, sampler="random", budget=Budget(seconds=8.0), clock=SystemClock())
    records = run(scene)
    assert all(r.state == "complete" for r in records)
    share_s = 8.0 * (1 - scene.driver.bench.config.final_share)
    # None began that was not expected to end in time, and none was kept from it while there was time.
    assert max(r.ended_s - r.duration_s for r in records) <= share_s
    assert max(r.ended_s + 2 * r.duration_s for r in records) > share_s


def test_a_trial_whose_workers_are_lost_is_tried_three_times_and_then_counts() -> None:
    fatal: list[str] = []

    def fails(number: int, recipe: Recipe) -> str:
        key = effective_key(recipe, GROUPS)
        if number in (10, 11):
            fatal.append(key)
        return WORKER_LOST if key in fatal else ""

    team = Team(WORKERS, GROUPS, fails=fails)
    records = run(make_team_scene("crashed", team, sampler="random"))
    kinds = Counter((effective_key(r.recipe, GROUPS), r.failure_kind) for r in records if r.recipe)
    assert len(fatal) == 2
    for key in fatal:
        assert kinds[key, WORKER_LOST] == 2
        assert kinds[key, CRASHED] == 1
    assert sum(r.state == "failed" for r in records) == 6
    # Tries that a lost worker ended are no proposals.
    assert len(proposed(records, "random")) == 20 + 4


def test_a_worker_that_is_lost_once_costs_one_trial() -> None:
    team = Team(WORKERS, GROUPS, fails=lambda number, recipe: WORKER_LOST if number % 7 == 3 else "")
    records = run(make_team_scene("once", team, sampler="random"))
    lost = [r for r in records if r.failure_kind == WORKER_LOST]
    assert lost
    done = {effective_key(r.recipe, GROUPS) for r in records if r.state == "complete" and r.recipe}
    assert all(r.recipe and effective_key(r.recipe, GROUPS) in done for r in lost if r.number % 7 == 3)
    assert sum(r.state == "complete" for r in proposed(records, "random")) == 20


@pytest.mark.parametrize("workers", [2, WORKERS, 32])
def test_a_storm_of_failures_ends_the_search(workers: int) -> None:
    team = Team(workers, GROUPS, fails=lambda number, recipe: "nan" if number > 4 else "")
    scene = make_team_scene("storm", team, sampler="random", budget=Budget(trials=400))
    with pytest.raises(TooManyFailuresError, match="10 trials in a row failed alike"):
        run(scene)
    assert len(team.begun) < 5 + 10 + 3 * workers
    assert {r.failure_kind for r in scene.driver.records if r.state == "failed"} <= {"nan", "interrupted"}


def test_failures_among_successes_are_no_storm() -> None:
    team = Team(WORKERS, GROUPS, fails=lambda number, recipe: "nan" if number % 2 else "")
    records = run(make_team_scene("half", team, sampler="random", budget=Budget(trials=30)))
    assert sum(r.failure_kind == "nan" for r in records) > 10


def test_an_interruption_ends_in_order_and_the_next_run_goes_on() -> None:
    team = Team(WORKERS, GROUPS)
    scene = make_team_scene("ended", team, sampler="random")
    begun = threading.Event()

    def fails(number: int, recipe: Recipe) -> str:
        if number >= 16:
            scene.driver.interrupt.requested = True
            begun.set()
        return ""

    team.fails = fails
    records = run(scene)
    assert begun.is_set()
    assert 16 < len(records) <= 16 + 2 * WORKERS
    assert all(r.state == "complete" for r in records)
    again = Team(WORKERS, GROUPS)
    records = run(make_team_scene("ended", again, sampler="random"))
    assert len(proposed(records, "random")) == 20
    assert not set(team.begun) & set(again.begun)


def test_a_failure_of_the_storage_ends_all_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    team = Team(WORKERS, GROUPS, seconds=lambda number: 0.01 if number < 9 else 30.0)
    scene = make_team_scene("storage", team)
    complete = scene.store.complete

    def fail(trial: Any, *args: Any, **kwargs: Any) -> None:
        if trial.number == 8:
            raise OSError("the disk is full")
        complete(trial, *args, **kwargs)

    monkeypatch.setattr(scene.store, "complete", fail)
    raised: list[BaseException] = []

    def work() -> None:
        try:
            scene.driver.search(lambda: 0.0)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20.0)
    assert not thread.is_alive()
    assert "the disk is full" in str(raised[0])
    assert team.stopped.is_set()
    scene.store.release()


def test_the_network_that_a_running_trial_starts_from_is_not_discarded() -> None:
    """Others finish meanwhile and dominate it."""
    team = Team(WORKERS, GROUPS, seconds=lambda number: 0.03 if number % 4 == 0 else 0.002)
    slow = team.trial

    def trial(recipe: Recipe, folder: Path, start: Path | None, number: int) -> Any:
        outcome = slow(recipe, folder, start, number)
        assert start is None or (start / "model.onnx").is_file(), "discarded while it was in use"
        return outcome

    scene = make_scene(
        "starts",
        budget=Budget(trials=16),
        config=config("starts", "auto", front_points=2),
        groups=GROUPS,
        executor=team,
        run=trial,
    )
    records = run(scene, team.screen)
    assert any(r.started_from is not None for r in records)
    assert [r.failure_reason for r in records if r.state == "failed"] == []


def test_what_a_trial_wrote_is_kept_from_others_until_it_is_recorded() -> None:
    """While it is brought to where it is shared, others finish and discard what is on no front."""
    team = Team(WORKERS, GROUPS)
    scene = make_team_scene("shared", team, sampler="random")
    place = scene.driver.paths.artifact
    gone: list[str] = []

    class Shelf:
        def put(self, folder: Path) -> None:
            threading.Event().wait(0.3)
            if not (folder / "model.onnx").is_file():
                gone.append(folder.name)

        def tidy(self) -> None:
            """Nothing is elsewhere."""

    scene.driver.shelf = Shelf()  # type: ignore[assignment]
    records = run(scene)
    assert gone == []
    front = [r.number for r in records if place(r.number).is_dir()]
    assert front


@pytest.mark.parametrize("sampler", ["auto", "tpe"])
def test_one_worker_does_what_the_driver_alone_does(sampler: str) -> None:
    def found(name: str, groups: Groups, executor: Team | None) -> list[TrialRecord]:
        scene = make_scene(
            name,
            budget=Budget(trials=12),
            config=config(name, sampler),
            groups=groups,
            executor=executor,
            duration_s=5.0,
        )
        return run(scene, FakeScreen(scene) if sampler == "auto" else None)

    alone = found("alone", GROUPS, None)
    beside = found("beside", GROUPS, Team(1, GROUPS))
    assert len(alone) >= 12
    assert beside == alone
