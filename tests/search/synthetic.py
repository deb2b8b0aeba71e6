"""A search problem of many groups whose true front is known, and a profile of it that is wrong by a known amount."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import optuna

from autoprune.search.proposals import Proposer, Result
from autoprune.search.solver import Array, Choices, Problem, sweep
from autoprune.search.volume import Volume

KEPT = np.array([1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
BITS = (32, 8)
_POWER = 0.8
_EXPOSURE = 0.35


@dataclass(frozen=True)
class Synthetic:
    """Groups that add up but for a bounded interaction of neighbours, and a noisy profile of them.

    Attributes:
        truth: Tables of what is really lost and what it costs.
        profile: The same costs with losses that are wrong by a lognormal factor for each group.
        coupling: How much deep cuts of neighbouring groups lose together beyond their sum.
    """

    truth: Problem
    profile: Problem
    coupling: float

    @classmethod
    def make(cls, seed: int, groups: int = 60, error: float = 0.7, coupling: float = 0.0) -> Synthetic:
        """Draw a problem.

        Args:
            seed: Seed of everything.
            groups: Number of groups.
            error: Standard deviation of the logarithm of the profile's error.
            coupling: See the class.
        """
        rng = np.random.default_rng(seed)
        loss, wrong, size, latency = [], [], [], []
        bytes_share = rng.dirichlet(np.full(groups, 1.5))
        time_share = rng.dirichlet(np.full(groups, 1.5))
        sensitivity = rng.lognormal(-1.5, 1.0, groups)
        for g in range(groups):
            shape = rng.uniform(1.5, 3.0)
            # Kernels work in blocks: time falls only at some widths.
            steps = np.ceil(KEPT * 4) / 4
            kept_loss = sensitivity[g] * (1 - KEPT) ** shape
            bit_loss = sensitivity[g] * rng.uniform(0.0, 0.02)
            loss.append(np.concatenate([kept_loss, kept_loss + bit_loss]))
            factor = rng.lognormal(0.0, error)
            wrong.append(
                np.concatenate(
                    [kept_loss * factor, kept_loss * factor + bit_loss * rng.lognormal(0.0, error)]
                )
            )
            size.append(bytes_share[g] * np.concatenate([KEPT, KEPT / 4]))
            latency.append(0.9 * time_share[g] * np.concatenate([steps, 0.55 * steps]))
        base = (tuple(size), tuple(latency), (), 0.0, 0.1)
        return cls(Problem(tuple(loss), *base), Problem(tuple(wrong), *base), coupling)

    def values(self, choices: Choices) -> Array:
        """Return capability lost, size and latency of choices, ``(n, 3)``, without any noise."""
        raw = self.truth.evaluate(choices)
        deep = np.stack([loss[choices[:, g]] for g, loss in enumerate(self.truth.loss)], axis=1)
        together = self.coupling * np.sqrt(deep[:, :-1] * deep[:, 1:]).sum(axis=1)
        lost = 0.02 * (raw[:, 0] + together) ** _POWER
        return np.stack([lost, raw[:, 1], raw[:, 2]], axis=1)

    def true_volume(self) -> float:
        """Return the hypervolume of the true front's convex part, which a solver finds exactly without coupling."""
        return Volume(self.values(sweep(self.truth, weights=200, shares=21)) / SCALES).total


SCALES = np.array([0.1, 1.0, 1.0])


def run_auto(problem: Synthetic, evaluations: int, seed: int, *, use_solver: bool = True) -> list[float]:
    """Let the proposer evaluate so many choices and return the hypervolume after each."""
    proposer = Proposer(
        problem.profile, SCALES, ("accuracy", "latency", "size"), seed=seed, use_solver=use_solver
    )
    found, volumes = [], []
    for _ in range(evaluations):
        proposal = proposer.propose()
        assert proposal is not None
        values = problem.values(proposal.choice[None])[0]
        proposer.add(Result(proposal.choice, proposal.arm, values, proposal.weights))
        found.append(values)
        volumes.append(Volume(np.array(found) / SCALES).total)
    return volumes


def run_optuna(problem: Synthetic, evaluations: int, sampler: optuna.samplers.BaseSampler) -> list[float]:
    """Let an Optuna sampler choose every group's width and bits, blind, and return the hypervolume after each."""
    study = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
    found, volumes = [], []
    for _ in range(evaluations):
        trial = study.ask()
        row = []
        for g in range(len(problem.truth.loss)):
            width = trial.suggest_int(f"width{g}", 0, len(KEPT) - 1)
            row.append(width + len(KEPT) * trial.suggest_int(f"bits{g}", 0, 1))
        values = problem.values(np.array([row]))[0]
        study.tell(trial, [float(v) for v in values])
        found.append(values)
        volumes.append(Volume(np.array(found) / SCALES).total)
    return volumes


SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(multivariate=True, seed=seed),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(population_size=20, seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
