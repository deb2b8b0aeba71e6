"""The budget on a fake clock."""

from __future__ import annotations

import pytest

from autoprune.clock import FakeClock
from autoprune.config import Budget
from autoprune.measure.figures import FULL_RUN
from autoprune.search.budget import CLOSING_S, Timekeeper, expected_s


def test_search_and_final_share_the_budget() -> None:
    clock = FakeClock()
    keeper = Timekeeper(Budget(seconds=100.0), 0.6, clock)
    clock.advance(10.0)
    assert keeper.search_left_s() == pytest.approx(30.0)
    assert keeper.training_left_s(20.0) == pytest.approx(70.0 - CLOSING_S)


def test_earlier_runs_count() -> None:
    keeper = Timekeeper(Budget(seconds=100.0), 0.6, FakeClock(), spent_before_s=35.0)
    assert keeper.search_left_s() == pytest.approx(5.0)
    assert keeper.left_s == pytest.approx(65.0)


def test_a_trial_that_would_overrun_is_not_begun() -> None:
    clock = FakeClock()
    keeper = Timekeeper(Budget(seconds=100.0), 0.6, clock)
    clock.advance(25.0)
    assert keeper.fits_search([10.0])
    clock.advance(5.0)
    assert not keeper.fits_search([10.0])
    assert keeper.fits_at_all([10.0], reserve_s=50.0)
    assert not keeper.fits_at_all([10.0], reserve_s=60.0)


def test_final_phase_of_a_trials_budget_follows_the_search() -> None:
    clock = FakeClock()
    keeper = Timekeeper(Budget(trials=5), 0.6, clock)
    clock.advance(40.0)
    assert keeper.left_s is None
    assert keeper.trials_left(3) == 2
    keeper.begin_final()
    assert keeper.training_left_s(1000.0) == pytest.approx(60.0)
    clock.advance(20.0)
    assert keeper.training_left_s(1000.0) == pytest.approx(40.0)


def test_expected_duration_is_cautious_and_recent() -> None:
    assert expected_s([]) == 0.0
    assert expected_s([1000.0, *[10.0] * 8]) == pytest.approx(12.0)


def test_what_a_larger_budget_adds_is_divided_like_the_first() -> None:
    keeper = Timekeeper(Budget(seconds=200.0), 0.6, FakeClock(), spent_before_s=100.0, divided_s=100.0)
    assert keeper.search_left_s() == pytest.approx(40.0)
    assert keeper.training_left_s(20.0) == pytest.approx(80.0 - CLOSING_S)


def test_more_trials_add_training_for_themselves_alone() -> None:
    clock = FakeClock()
    keeper = Timekeeper(Budget(trials=5), 0.6, clock, spent_before_s=100.0, divided_s=100.0)
    clock.advance(40.0)
    keeper.begin_final()
    assert keeper.training_left_s(0.0) == pytest.approx(60.0)


def test_the_final_phase_bears_its_part_of_the_preparations() -> None:
    clock = FakeClock()
    keeper = Timekeeper(Budget(seconds=100.0), 0.6, clock)
    clock.advance(35.0)
    assert keeper.search_left_s() == pytest.approx(5.0)
    assert keeper.wanted_s(0.3) == pytest.approx(0.3 * 65.0 - 5.0)
    keeper.grant(keeper.wanted_s(0.3))
    assert keeper.search_left_s() == pytest.approx(0.3 * 65.0)
    assert keeper.final_s == pytest.approx(60.0 - 14.5)
    assert keeper.left_s == 65.0
    assert keeper.wanted_s(0.3) == pytest.approx(0.0)
    early = Timekeeper(Budget(seconds=100.0), 0.6, FakeClock())
    assert early.wanted_s(0.3) == 0.0
    assert Timekeeper(Budget(trials=5), 0.6, FakeClock()).wanted_s(0.3) == 0.0


def test_what_is_measured_besides_latency_takes_a_small_share_of_the_budget() -> None:
    keeper = Timekeeper(Budget(seconds=100.0), 0.6, FakeClock())
    assert keeper.figures_s(4) == pytest.approx(1.5)
    assert Timekeeper(Budget(seconds=1e5), 0.6, FakeClock()).figures_s(4) == FULL_RUN.limit_s
    assert Timekeeper(Budget(trials=5), 0.6, FakeClock()).figures_s(4) == FULL_RUN.limit_s
