"""What a sampler cannot search, refused before anything runs. Torch-free."""

from __future__ import annotations

from autoprune.errors import UsageError
from autoprune.space.choices import FloatRange
from autoprune.space.search_space import SearchSpace


def auto_cannot(space: SearchSpace) -> list[str]:
    """Return what the default search cannot do with a space, one line for each setting; empty where it can do all.

    Its proposals are a width, a criterion and a bit-width for each group, and its predictions know nothing else.
    """
    found: list[str] = []
    ranks = [space.rank_ratios, *(o.rank_ratios for o in space.overrides if o.rank_ratios is not None)]
    if any(choices != (0.0,) for choices in ranks):
        named = next(choices for choices in ranks if choices != (0.0,))
        found.append(f"rank_ratios = {list(named)}; allowed: [0.0]")
    if space.orders != ("prune-tune-quantize",):
        found.append(f"orders = {list(space.orders)}; allowed: ['prune-tune-quantize']")
    weights = space.recovery.feature_distill
    if isinstance(weights, FloatRange) or len(weights) > 1:
        shown = weights.model_dump() if isinstance(weights, FloatRange) else list(weights)
        found.append(f"recovery.feature_distill = {shown}; allowed: a single value")
    return found


def check_sampler(sampler: str, space: SearchSpace) -> None:
    """Refuse a space that the study's sampler cannot search.

    Raises:
        UsageError: If the sampler is ``auto`` and the space has choices that it does not know; names all of them.
    """
    if sampler == "auto" and (faults := auto_cannot(space)):
        raise UsageError(
            "the default sampler (auto) cannot search this space: " + "; ".join(faults),
            "search it with --sampler tpe (or nsga2, random, grid), or leave these choices out",
        )


def compares_features(space: SearchSpace) -> bool:
    """Return whether any recipe of a space may ask for distillation on features."""
    weights = space.recovery.feature_distill
    return isinstance(weights, FloatRange) or any(weight > 0 for weight in weights)
