"""The arm of weights: an Optuna sampler over the few numbers that steer the solver."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
import optuna

from autoprune.search.solver import Array, Choices, Problem, solve, weight_range
from autoprune.search.volume import counted_axes

_STAGES = 4


def weight_distributions(objectives: Sequence[str]) -> dict[str, optuna.distributions.BaseDistribution]:
    """Return what the sampler chooses: weight, trade, trust in small losses, and factors of the network's stages."""
    real = optuna.distributions.FloatDistribution
    found: dict[str, optuna.distributions.BaseDistribution] = {
        "weight": real(0.0, 1.0),  # a share of the range of weights, which moves with the predicted costs
        "caution": real(-2.0, 1.0),
    }
    if {"size", "latency"} <= set(objectives):
        found["latency_share"] = real(0.0, 1.0)
    found |= {f"stage{stage}": real(-0.7, 0.7) for stage in range(_STAGES)}
    return found


class _Told(optuna.trial.FrozenTrial):
    """A finished trial of which a storage may keep a shallow copy: a deep one of each costs more than the sampler."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Told:
        return copy.copy(self)


def told_study(
    told: Sequence[tuple[dict[str, float], Array]], objectives: Sequence[str], seed: int
) -> optuna.Study:
    """Return a study in memory that knows earlier choices and their outcomes.

    Args:
        told: Choices and what they came to: capability lost, size and latency on the scale of the volume, ``(3,)``.
        objectives: Objectives of the search.
        seed: Seed of the sampler.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(multivariate=True, seed=seed)
    axes = int(counted_axes(objectives).sum())
    study = optuna.create_study(directions=["minimize"] * axes, sampler=sampler)
    now, distributions = datetime.now(), weight_distributions(objectives)
    for weights, values in told:
        study.add_trial(
            _Told(
                number=-1,
                trial_id=-1,
                state=optuna.trial.TrialState.COMPLETE,
                value=None,
                values=counted(values, objectives),
                datetime_start=now,
                datetime_complete=now,
                params=dict(weights),
                distributions=distributions,
                user_attrs={},
                system_attrs={},
                intermediate_values={},
            )
        )
    return study


def counted(values: Array, objectives: Sequence[str]) -> list[float]:
    """Return those of capability lost, size and latency that are objectives."""
    return [float(value) for value in values[counted_axes(objectives) > 0]]


def solve_weighted(
    corrected: Problem, plain: Problem, weights: dict[str, float], objectives: Sequence[str]
) -> Choices:
    """Return the solution for what the sampler chose, ``(groups,)``.

    Args:
        corrected: The problem as the results correct it.
        plain: The problem as the profile gave it.
        weights: See :func:`weight_distributions`.
        objectives: Objectives of the search.
    """
    groups = len(corrected.loss)
    stage = np.arange(groups) * _STAGES // max(1, groups)
    loss = []
    for index, (own, before) in enumerate(zip(corrected.loss, plain.loss, strict=True)):
        factor = 10.0 ** weights[f"stage{stage[index]}"]
        loss.append(own * factor + (10.0 ** weights["caution"]) * 1e-3 * (before > 0))
    low, high = weight_range(plain)
    total = 10.0 ** (low + (high - low) * weights["weight"])
    share = weights.get("latency_share", 1.0 if "latency" in objectives else 0.0)
    problem = corrected.with_losses(loss)
    found: Choices = solve(problem, np.array([total * (1 - share)]), np.array([total * share]))[0]
    return found
