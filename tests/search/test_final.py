"""Which networks the final phase trains, for how long, and what each starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from autoprune.clock import FakeClock
from autoprune.compress.pipeline import Compressed
from autoprune.config import Budget, StudyConfig
from autoprune.measure.figures import FULL_RUN
from autoprune.search.budget import CLOSING_S
from autoprune.search.final import FinalPhase, Networks, choose_number
from autoprune.search.jobs import Job
from autoprune.space.recipe import Recipe, Recovery, uniform_recipe
from autoprune.study.artifacts import commit_folder
from autoprune.study.records import TrialRecord
from tests.search.fakes import FakeBench, make_scene


def networks(count: int) -> Networks:
    return [[TrialRecord(number=number, state="complete")] for number in range(count)]


def test_of_numbers_that_promise_about_the_same_the_largest_is_taken() -> None:
    assert len(choose_number([(0.235, networks(3)), (0.24, networks(2)), (0.1, networks(1))], [])) == 3
    assert len(choose_number([(0.2, networks(3)), (0.24, networks(2)), (0.235, networks(1))], [])) == 2
    assert choose_number([], []) == []


def test_a_choice_that_covers_nothing_is_taken_where_it_promises_clearly_more() -> None:
    covering = [(0.195, networks(3)), (0.2, networks(2))]
    assert len(choose_number(covering, [(0.21, networks(1))])) == 3
    assert len(choose_number(covering, [(0.23, networks(1)), (0.1, networks(4))])) == 1
    assert len(choose_number([], [(0.01, networks(1))])) == 1


@pytest.fixture
def phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FinalPhase:
    """Return the final phase of a study of four nested networks, of which nothing was trained yet."""
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(tmp_path / "studies"))
    return made()


def made(**fields: object) -> FinalPhase:
    config = StudyConfig.model_validate(
        {"model": "fake", "data": "fake", "study": "s", "sampler": "auto", **fields}
    )
    scene = make_scene("s", budget=Budget(seconds=600.0), config=config)
    scene.driver.trial(Job(Recipe(), "dense", "dense"))
    for ratio in (0.25, 0.4, 0.5, 0.7):
        recipe = uniform_recipe(scene.driver.groups, ratio, 8, recovery=Recovery(finetune_steps=50))
        scene.driver.trial(Job(recipe, "solver"))
    return FinalPhase(scene.driver, FakeBench(scene.driver.groups, config))  # type: ignore[arg-type]


def trained(phase: FinalPhase, number: int, steps: int) -> None:
    """Pretend that a trial's network was recovered by so many steps."""
    recipe = phase.driver.records[number].recipe
    assert recipe is not None
    plan = {name: tuple(range(count)) for name, count in recipe.kept_counts(phase.bench.groups).items()}
    phase.recovery._lines[number] = Compressed(model=nn.Identity(), plan=plan, train_steps=steps, solved=[])


def start_of(phase: FinalPhase, number: int, own_steps: int = 50) -> int | None:
    """Return the trial that a network's final recovery starts from."""
    own = Compressed(model=nn.Identity(), plan={}, train_steps=own_steps, solved=[])
    found = phase.recovery._line_of(phase.driver.records[number], own)
    assert found == phase.recovery.started_from.get(number)
    return found


def test_a_deeper_cut_starts_from_the_best_trained_network_that_it_cuts_further(phase: FinalPhase) -> None:
    assert start_of(phase, 3) is None
    trained(phase, 1, 900)
    trained(phase, 2, 2000)
    trained(phase, 4, 9000)  # smaller, so that nothing of it can be cut to come to the third
    assert start_of(phase, 3) == 2


def test_its_own_training_counts_for_more_than_a_parent_s(phase: FinalPhase) -> None:
    trained(phase, 1, 900)
    assert start_of(phase, 2, own_steps=800) is None
    assert start_of(phase, 3, own_steps=300) == 1


def test_without_lineage_each_network_goes_on_from_its_own_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(tmp_path / "studies"))
    phase = made(auto={"lineage": False})
    trained(phase, 1, 9000)
    assert start_of(phase, 3) is None


def test_what_lost_more_trains_longer_and_eight_times_the_loss_twice_as_long(phase: FinalPhase) -> None:
    needs = phase.recovery.needs([[record] for record in phase.driver.records[1:]])
    assert needs == sorted(needs)
    lost = [0.9 - r.measurement.search.value for r in phase.driver.records[1:] if r.measurement]
    assert needs[-1] / needs[1] == pytest.approx((lost[-1] / lost[1]) ** (1 / 3))


def test_measuring_more_than_latency_fits_into_the_time_that_is_left(phase: FinalPhase) -> None:
    assert phase.points._run_protocol(4, 1) == replace(FULL_RUN, bounded=True)
    phase.bench.workload = SimpleNamespace(  # type: ignore[assignment]
        data=SimpleNamespace(search=range(10), report=SimpleNamespace(examples=10))
    )
    before = phase.reserve_s(4)
    phase.keeper._budget = Budget(seconds=60.0)
    assert before - phase.reserve_s(4) == pytest.approx(4 * (FULL_RUN.limit_s - 0.06 * 60.0 / 4))
    phase.keeper._budget = Budget(seconds=600.0)
    clock = phase.driver.clock
    assert isinstance(clock, FakeClock)
    # The dense network is timed with the four, each for five seconds where no trial has told better.
    left_s = CLOSING_S + 5 * (5.0 + 2.0)
    clock.advance(600.0 - phase.keeper.spent_s - left_s)
    assert phase.points._run_protocol(4, 1).limit_s == pytest.approx(2.0)
    clock.advance(10.0)
    assert phase.points._run_protocol(4, 1).why_not == "the budget left no time for it"


def test_what_an_earlier_run_of_the_phase_trained_comes_first_and_costs_no_time(
    phase: FinalPhase, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = phase.paths.artifacts / "trained"
    folder.mkdir()
    (folder / "weights").write_bytes(b"weights")
    commit_folder(folder, phase.paths.recovered(4, phase.round))
    again = FinalPhase(phase.driver, phase.bench)
    monkeypatch.setattr(again, "reserve_s", lambda artifacts=None: 0.0)
    monkeypatch.setattr(again, "_least_s", lambda networks: 100.0 if networks else 0.0)
    left_s = again.keeper.training_left_s(0.0)
    clock = phase.driver.clock
    assert isinstance(clock, FakeClock)
    clock.advance(left_s - 150.0)  # enough to train one of the others
    found = list(again._affordable(covering=True))
    leaders = [[members[0].number for members in networks] for networks, _ in found]
    assert leaders
    assert all(each[0] == 4 and len(each) == len(set(each)) for each in leaders)
    assert max(map(len, leaders)) == 2
    clock.advance(100.0)  # and for none
    left = [[members[0].number for members in networks] for networks, _ in again._affordable(covering=True)]
    assert left == [[4]]
    slots: list[float] = []
    monkeypatch.setattr(again, "_recovered", lambda record, slot_s: slots.append(slot_s))
    again._recover(found[0][0])
    assert slots[0] == 0.0
    assert slots[1] == pytest.approx(again.keeper.training_left_s(0.0))
