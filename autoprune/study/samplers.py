"""Optuna's samplers as this engine uses them."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence

import optuna

from autoprune.errors import UsageError
from autoprune.study.records import TrialRecord
from autoprune.study.retries import CUT_OFF, MAX_RETRIES


def counted(records: Sequence[TrialRecord]) -> int:
    """Return how many trials an uninterrupted run would have made by now.

    Those that a kill or a signal cut off are tried again and count once, so that a study that was interrupted draws
    what one draws that was not. A recipe that is given up, having been cut off more often than it is tried, counts too:
    else it would be drawn again and again.
    """
    cut_off = Counter(r.recipe.model_dump_json() for r in records if r.failure_kind in CUT_OFF and r.recipe)
    given_up = sum(tries > MAX_RETRIES for tries in cut_off.values())
    return sum(record.failure_kind not in CUT_OFF for record in records) + given_up


def make_sampler(name: str, seed: int, trials: int) -> optuna.samplers.BaseSampler:
    """Return the sampler ``name``.

    TPE is multivariate with grouped conditional parameters: the choices of a search space are conditional, and
    one multivariate ask costs a fifth of the independent one at 60 dimensions.

    Args:
        name: ``tpe``, ``nsga2`` or ``random``. Under ``auto`` and ``grid`` the driver proposes itself; TPE helps out
            where a network cannot be profiled.
        seed: Seed of the study.
        trials: Trials that count, see :func:`counted`; each proposal draws from the seed and their number alone.

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
