"""Intervals and percentiles against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.measure.stats import (
    indistinguishable,
    median_ratio_interval,
    percentile_or_none,
    spread,
    wilson_interval,
)


def test_wilson_interval_of_a_known_share() -> None:
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662.
    low, high = wilson_interval(81, 263)
    assert [low, high] == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson_interval(10, 10)[1] == 1.0
    assert wilson_interval(0, 10)[0] == 0.0


def test_the_interval_of_the_median_holds_it_and_narrows() -> None:
    generator = np.random.default_rng(3)
    few, many = generator.lognormal(0, 0.1, 15), generator.lognormal(0, 0.1, 400)
    widths = []
    for ratios in (few, many):
        middle, (low, high) = median_ratio_interval([ratios])
        assert low <= middle <= high
        widths.append(high - low)
    assert widths[1] < widths[0]


def test_equal_models_under_drift_have_an_interval_around_one() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        load = np.where(np.arange(40) < 20, 1.0, 1.5)  # load arrives half-way
        one = load * generator.lognormal(0, 0.03, 40)
        other = load * generator.lognormal(0, 0.03, 40)
        low, high = median_ratio_interval([one / other], resamples=400)[1]
        held += low <= 1.0 <= high
    assert held >= 88


def test_sessions_that_differ_widen_the_interval() -> None:
    generator = np.random.default_rng(1)
    alike = [generator.normal(1.0, 0.001, 9) for _ in range(6)]
    apart = [generator.normal(centre, 0.001, 9) for centre in (0.97, 0.98, 0.99, 1.01, 1.02, 1.03)]
    widths = [high - low for _, (low, high) in (median_ratio_interval(alike), median_ratio_interval(apart))]
    assert widths[1] > 10 * widths[0]


def test_a_percentile_needs_its_samples() -> None:
    assert percentile_or_none(np.arange(89.0), 95) is None
    assert percentile_or_none(np.arange(101.0), 95) == pytest.approx(95.0)
    assert percentile_or_none(np.arange(3.0), 50) == 1.0


def test_spread_and_overlap() -> None:
    assert spread(np.array([1.0, 2.0, 3.0])) == pytest.approx(0.5)
    assert indistinguishable((0.1, 0.3), (0.3, 0.4))
    assert not indistinguishable((0.1, 0.2), (0.3, 0.4))


@pytest.mark.parametrize("sessions", [3, 9])
def test_few_sessions_that_differ_still_give_an_interval_that_holds(sessions: int) -> None:
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(100):
        centres = np.exp(generator.normal(0.0, 0.02, sessions))
        ratios = [centre * generator.lognormal(0.0, 0.005, 9) for centre in centres]
        low, high = median_ratio_interval(ratios, resamples=300)[1]
        held += low <= 1.0 <= high
    assert held >= 88
