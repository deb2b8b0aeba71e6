"""Loss model: the capability that a recipe will lose, from the profile's losses and from the results so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# The severity grows about like this power of the added losses, until results say otherwise: 1.1 to 1.4 in divergences
# of a ResNet-20.
_POWER = 1.15
_POWERS = (0.4, 1.8)
# A loss in capability below this is noise on some hundreds of examples.
_FLOOR = 0.002
# How much one group's factor may be changed, and strengths of the pull towards 1 that are tried.
_FACTORS = (0.25, 4.0)
_RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0)
_LEAST_RESULTS = 8
# The correction has to better the error on results left out by this much, or it is not used.
_LEAST_GAIN = 0.95


@dataclass(frozen=True)
class LossModel:
    r"""Capability lost, :math:`A (\sum_g a_g s_g)^p`, with :math:`s_g` the profile's loss of the group's option.

    Attributes:
        scale: ``A``.
        power: ``p``.
        factors: ``a``, one for each group; ones unless they predict results that were left out better.
        error: Root mean square relative error of the sum on results that were left out, without factors; NaN before
            there are enough.
        corrected_error: The same with the best factors, used or not.
    """

    scale: float
    power: float
    factors: Array
    error: float = float("nan")
    corrected_error: float = float("nan")

    @property
    def is_corrected(self) -> bool:
        """Whether the results changed the groups' factors."""
        return bool((self.factors != 1.0).any())

    def lost(self, total: Array) -> Array:
        """Return the capability lost for sums of corrected losses."""
        lost: Array = self.scale * np.maximum(total, 0.0) ** self.power
        return lost

    def total(self, lost: float) -> float:
        """Return the sum of corrected losses that loses this much capability."""
        return float((lost / self.scale) ** (1.0 / self.power))

    @classmethod
    def fit(cls, losses: Array, lost: Array) -> LossModel:
        """Fit to results of one fidelity.

        Args:
            losses: The profile's loss of each group's option, ``(n, groups)``.
            lost: Capability lost against the dense network, ``(n,)``.
        """
        groups = losses.shape[1]
        total = losses.sum(axis=1)
        use = total > 0
        losses, total, lost = losses[use], total[use], np.maximum(lost[use], _FLOOR)
        if len(lost) < 2:
            scale = float(lost[0] / total[0] ** _POWER) if len(lost) else 1.0
            return cls(scale, _POWER, np.ones(groups))
        scale, power = _fit_power(total, lost)
        wanted = (lost / scale) ** (1 / power)
        if len(lost) < _LEAST_RESULTS:
            return cls(scale, power, np.ones(groups))
        # Relative residuals of the sum; with factors 1 + d they are rest - rows @ d.
        rows = losses / wanted[:, None]
        rest = 1.0 - rows.sum(axis=1)
        plain = float(np.mean(_bounded(rest)))
        best, change = np.inf, np.zeros(groups)
        for ridge in _RIDGES:
            error, found = _ridge(rows, rest, ridge)
            if error < best:
                best, change = error, found
        better = best < _LEAST_GAIN * plain
        factors = np.clip(1.0 + change, *_FACTORS) if better else np.ones(groups)
        return cls(scale, power, factors, float(np.sqrt(plain)), float(np.sqrt(best)))


def _fit_power(total: Array, lost: Array) -> tuple[float, float]:
    """Fit a line in logarithms whose slope is pulled towards the usual power."""
    x, y = np.log(total), np.log(lost)
    middle_x, middle_y = x.mean(), y.mean()
    spread = float(((x - middle_x) ** 2).sum())
    slope = (float(((x - middle_x) * (y - middle_y)).sum()) + _POWER) / (spread + 1.0)
    power = float(np.clip(slope, *_POWERS))
    return float(np.exp(middle_y - power * middle_x)), power


def _ridge(rows: Array, rest: Array, ridge: float) -> tuple[float, Array]:
    """Return the mean square error on each row left out in turn, and the solution with all of them."""
    inverse = np.linalg.inv(rows.T @ rows + ridge * np.eye(rows.shape[1]))
    change = inverse @ rows.T @ rest
    leverage = np.einsum("ij,jk,ik->i", rows, inverse, rows)
    left_out = (rest - rows @ change) / np.maximum(1.0 - leverage, 1e-6)
    return float(np.mean(_bounded(left_out))), change


def _bounded(errors: Array) -> Array:
    """Square errors, none counting for more than being wrong altogether, so that one result does not decide."""
    squares: Array = np.minimum(errors**2, 1.0)
    return squares
