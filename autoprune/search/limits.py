"""What the default search cannot do yet, told before anything runs. Torch-free."""

from __future__ import annotations

from autoprune.errors import UsageError
from autoprune.space.search_space import SearchSpace


def auto_cannot(space: SearchSpace) -> list[str]:
    """Return why the sampler ``auto`` cannot search a space, one line for each setting; empty where it can."""
    reasons = []
    if any(space.every_sparsity):
        reasons.append(
            f"sparsities holds {sorted(space.every_sparsity)}; allowed with --sampler auto: [0.0], everywhere"
        )
    return reasons


def check_sampler(sampler: str, space: SearchSpace) -> None:
    """Refuse a search space that the sampler cannot search.

    Raises:
        UsageError: If the sampler is ``auto`` and the space holds what only the plain samplers search.
    """
    reasons = auto_cannot(space) if sampler == "auto" else []
    if reasons:
        raise UsageError(
            "the sampler 'auto' cannot search this space: " + "; ".join(reasons),
            "--sampler tpe searches everything that a space may hold; so do nsga2, random and grid",
        )
