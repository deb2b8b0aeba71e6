"""Statistics of measurements: intervals, paired ratios, percentiles that have enough samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoprune.measure.record import Interval

# Samples from which a percentile is stable at 99 % confidence, by MLPerf LoadGen's early-stopping rule.
_SAMPLES_NEEDED = {90: 44, 95: 90, 99: 459}


def wilson_interval(successes: float, total: int, z: float = 1.96) -> Interval:
    """Return the Wilson score interval of a binomial share.

    Args:
        successes: Number of successes, 0 to ``total``.
        total: Number of trials, at least 1.
        z: Quantile of the normal distribution; 1.96 for 95 %.
    """
    share = successes / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def median_ratio_interval(
    sessions: Sequence[NDArray[np.float64]], seed: int = 0, resamples: int = 2000
) -> tuple[float, Interval]:
    """Return the centre of paired ratios and its 95 % interval over sessions.

    Rounds of one session share its memory layout, so they are not independent: what counts is each session's median.
    The centre is the median of these, the interval lies between two of them, by the sign test: the second smallest and
    the second largest of nine. It holds whatever the distribution, also where a load makes some sessions much noisier
    than others, if each is as likely to be too high as too low: the two of a pair are timed in random order. A burst
    that spoils one session does not widen it. No two of nine make 95 % exactly; these hold in 96.1 % of all cases.

    Fewer than six sessions cannot be so many cases; they have the mean of the logarithms and Student's interval. One
    session alone has the median of its ratios and a bootstrap interval over its rounds, which knows nothing of what
    another session would find.

    Args:
        sessions: For each session one ratio a round, ``(n,)``, n at least 1.
        seed: Seed of the resampling.
        resamples: Number of bootstrap samples.
    """
    if len(sessions) == 1:
        return _within_session(sessions[0], seed, resamples)
    medians = np.sort([np.median(np.log(ratios)) for ratios in sessions])
    outside = _outside(len(medians))
    if outside:
        middle, low, high = float(np.median(medians)), float(medians[outside - 1]), float(medians[-outside])
    else:
        from scipy.special import stdtrit  # the measuring process imports this file and never comes here

        middle = float(medians.mean())
        error = float(medians.std(ddof=1)) / math.sqrt(len(medians))
        half = float(stdtrit(len(medians) - 1, 0.975)) * error
        low, high = middle - half, middle + half
    return math.exp(middle), (math.exp(low), math.exp(high))


def _outside(count: int) -> int:
    """Return which of so many sorted numbers, from either end, bounds a 95 % interval of the median; 0 if none does."""
    outside, lower = 0, 0.5**count
    while lower <= 0.025:  # the share of cases in which so few or fewer lie below the median
        outside += 1
        lower += math.comb(count, outside) * 0.5**count
    return outside


def _within_session(ratios: NDArray[np.float64], seed: int, resamples: int) -> tuple[float, Interval]:
    generator = np.random.default_rng(seed)
    drawn = np.median(generator.choice(ratios, (resamples, len(ratios))), axis=1)
    middle = float(np.median(ratios))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return middle, (float(low), float(high))


def percentile_or_none(samples: NDArray[np.float64], percent: int) -> float | None:
    """Return a percentile, or None where there are too few samples for it.

    Args:
        samples: Timings, ``(n,)``.
        percent: 50, 90, 95 or 99.
    """
    if len(samples) < _SAMPLES_NEEDED.get(percent, 1):
        return None
    return float(np.percentile(samples, percent))


def spread(samples: NDArray[np.float64]) -> float:
    """Return the interquartile range as a share of the median."""
    low, middle, high = np.percentile(samples, [25, 50, 75])
    return float((high - low) / middle)


def indistinguishable(one: Interval, other: Interval) -> bool:
    """Return whether two intervals overlap, so that no order between the two values is shown."""
    return one[0] <= other[1] and other[0] <= one[1]


def trimmed_mean(samples: NDArray[np.float64], share: float = 0.2) -> float:
    """Return the mean without the largest samples, which interruptions by other processes made.

    Unlike the median it resolves more finely than the clock ticks.

    Args:
        samples: At least one.
        share: Share of the samples that is left out, in ``[0, 1)``.
    """
    return float(np.sort(samples)[: max(1, round(len(samples) * (1 - share)))].mean())
