"""Optuna's samplers as this engine uses them."""

from __future__ import annotations

import hashlib
import warnings

import optuna

from autoprune.errors import UsageError


def make_sampler(name: str, seed: int, trials: int) -> optuna.samplers.BaseSampler:
    """Return the sampler ``name``.

    TPE is multivariate with grouped conditional parameters: the choices of a search space are conditional, and
    one multivariate ask costs a fifth of the independent one at 60 dimensions.

    Args:
        name: ``tpe``, ``nsga2`` or ``random``. Under ``auto`` and ``grid`` the driver proposes itself; TPE helps out
            where a network cannot be profiled.
        seed: Seed of the study.
        trials: Trials that the study already has; a resumed run draws anew from both.

    Raises:
        UsageError: If the name is another.
    """
    mixed = int.from_bytes(hashlib.sha256(f"{seed}:{trials}".encode()).digest()[:4], "big")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name in ("tpe", "auto", "grid"):
            return optuna.samplers.TPESampler(multivariate=True, group=True, seed=mixed)
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=20, seed=mixed)
        if name == "random":
            return optuna.samplers.RandomSampler(seed=mixed)
    raise UsageError(f"sampler {name!r} is unknown; allowed: auto, tpe, nsga2, random, grid")
