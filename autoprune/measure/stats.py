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
    """Return the median of paired ratios and its 95 % bootstrap interval over sessions.

    Rounds of one session share its memory layout, so they are not independent: each resample draws sessions
    first and rounds inside them second [Davison1997]_.

    With few sessions such a bootstrap is too narrow, for it never leaves the sessions' extremes: its deviations, of
    logarithms, are widened by sqrt(m / (m - 1)) and by Student's quantile over the normal one for m sessions.

    .. [Davison1997] Davison, Hinkley: Bootstrap Methods and their Application, 1997, section 3.8.

    Args:
        sessions: For each session one ratio a round, ``(n,)``, n at least 1.
        seed: Seed of the resampling.
        resamples: Number of bootstrap samples.
    """
    generator = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for index in range(resamples):
        chosen = generator.integers(len(sessions), size=len(sessions))
        drawn[index] = np.median(
            np.concatenate([generator.choice(sessions[i], len(sessions[i])) for i in chosen])
        )
    middle = float(np.median(np.concatenate(sessions)))
    deviations = np.log(np.quantile(drawn, [0.025, 0.975]) / middle) * _widening(len(sessions))
    low, high = middle * np.exp(deviations)
    return middle, (min(float(low), middle), max(float(high), middle))


def _widening(sessions: int) -> float:
    from scipy.special import stdtrit  # the measuring process imports this file and never comes here

    if sessions < 2:
        return 1.0
    return float(math.sqrt(sessions / (sessions - 1)) * stdtrit(sessions - 1, 0.975) / 1.959964)


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
