"""Intervals and percentiles against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.measure.stats import (
    indistinguishable,
    median_ratio_interval,
    percentile_or_none,
    spread,
    trimmed_mean,
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


def test_wilson_intervals_stay_within_shares() -> None:
    # For 5 of 5 and 0 of 5 the rounding of the formula itself leaves [0, 1].
    for total in range(1, 60):
        assert 1.0 - 1e-9 <= wilson_interval(total, total)[1] <= 1.0
        assert 0.0 <= wilson_interval(0, total)[0] <= 1e-9
    # All of n: from n / (n + z^2) on.
    assert wilson_interval(4, 4, z=2.0) == pytest.approx((0.5, 1.0))
    assert wilson_interval(0, 4, z=2.0) == pytest.approx((0.0, 0.5))


@pytest.mark.parametrize(
    ("centres", "student"),
    # Quantiles of Student's t at 97.5 % for one degree of freedom less than sessions, from any table.
    [
        ((0.9, 1.1), 12.7062),
        ((0.9, 1.0, 1.2), 4.30265),
        ((0.8, 0.9, 1.0, 1.1), 3.18245),
        ((0.8, 0.9, 1.0, 1.1, 1.3), 2.77645),
    ],
)
def test_few_sessions_have_student_s_interval_of_their_logarithms(
    centres: tuple[float, ...], student: float
) -> None:
    middle, (low, high) = median_ratio_interval([np.full(9, centre) for centre in centres])
    logs = np.log(centres)
    half = student * logs.std(ddof=1) / len(centres) ** 0.5
    assert middle == pytest.approx(np.exp(logs.mean()))
    assert [low, high] == pytest.approx([middle * np.exp(-half), middle * np.exp(half)], rel=1e-5)


def test_one_session_s_interval_is_the_plain_bootstrap_s() -> None:
    middle, interval = median_ratio_interval([np.array([0.8, 1.2])])
    assert middle == pytest.approx(1.0)
    assert interval == pytest.approx((0.8, 1.2))
    middle, interval = median_ratio_interval([np.array([0.7])])
    assert (middle, *interval) == pytest.approx((0.7, 0.7, 0.7))


@pytest.mark.parametrize(("percent", "needed"), [(50, 1), (90, 44), (95, 90), (99, 459)])
def test_a_percentile_has_as_many_samples_as_it_needs_or_is_none(percent: int, needed: int) -> None:
    assert percentile_or_none(np.ones(needed), percent) == 1.0
    assert percentile_or_none(np.ones(needed - 1), percent) is None


def test_intervals_that_touch_or_hold_one_another_are_not_told_apart() -> None:
    apart = [((0.1, 0.2), (0.3, 0.4)), ((0.1, 0.1), (0.2, 0.2))]
    together = [((0.1, 0.3), (0.3, 0.4)), ((0.1, 0.4), (0.2, 0.3)), ((0.1, 0.3), (0.2, 0.4))]
    for one, other in apart:
        assert not indistinguishable(one, other) and not indistinguishable(other, one)
    for one, other in together:
        assert indistinguishable(one, other) and indistinguishable(other, one)


def test_the_trimmed_mean_leaves_out_the_largest_share() -> None:
    assert trimmed_mean(np.array([9.0, 1.0, 5.0, 3.0, 100.0])) == 4.5
    # Of 7 samples 5.6 stay, which are 6.
    assert trimmed_mean(np.array([60.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])) == 3.5
    assert trimmed_mean(np.array([1.0, 3.0, 8.0]), share=0.0) == 4.0
    assert trimmed_mean(np.array([4.0, 2.0]), share=0.9) == 2.0


@pytest.mark.parametrize(
    ("sessions", "place"),
    # From any table of the sign test's 95 % interval of a median: the place, from either end, of what bounds it.
    [(6, 1), (7, 1), (8, 1), (9, 2), (11, 2), (12, 3), (14, 3), (15, 4), (17, 5), (20, 6), (25, 8), (30, 10)],
)  # fmt: skip
def test_sessions_have_the_sign_test_s_interval(sessions: int, place: int) -> None:
    generator = np.random.default_rng(0)
    centres = np.exp(np.linspace(-0.3, 0.2, sessions))
    # Two of five rounds of a session are far off, in no particular order of sessions.
    ratios = [
        centre * np.array([1.0, 9.0, 0.99, 1.01, 8.0]) / 1.01 for centre in generator.permutation(centres)
    ]
    middle, (low, high) = median_ratio_interval(ratios)
    assert middle == pytest.approx(np.exp(-0.05))
    assert (low, high) == pytest.approx((centres[place - 1], centres[-place]))


def test_one_session_s_interval_ends_where_the_exact_bootstrap_does() -> None:
    # The median of 33 draws of 33 numbers is one of the 11 smallest if at least 17 draws are: in 2.35 % of all cases,
    # so that the 12th smallest bounds 95 %, and by symmetry the 22nd.
    numbers = np.random.default_rng(0).permutation(np.arange(1.0, 34.0))
    assert median_ratio_interval([numbers], resamples=100_000) == (17.0, (12.0, 22.0))
