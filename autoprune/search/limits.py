"""What the default search cannot search, told before anything runs. Torch-free."""

from __future__ import annotations

from autoprune.errors import UsageError
from autoprune.space.search_space import SearchSpace


def auto_cannot(space: SearchSpace) -> list[str]:
    """Return one line for each setting of a space that the default search cannot work with.

    It proposes a width, a criterion and bits for each group from a profile of single groups, starts networks from
    trained ones, and does nothing else.
    """
    found: list[str] = []
    if space.rankings != ("group",):
        found.append(f"rankings = {list(space.rankings)}: which units go has to depend on one group alone")
    if space.schedules.kind != ("one_shot",):
        found.append(f"schedules.kind = {list(space.schedules.kind)}: it prunes by one_shot alone")
    if any(space.every_sparsity):
        found.append(f"sparsities holds {sorted(space.every_sparsity)}: it masks no single weights")
    return found


def check_sampler(sampler: str, space: SearchSpace) -> None:
    """Refuse a space that the default search cannot search.

    Args:
        sampler: Who proposes; only ``auto`` has limits.
        space: What may be tried.

    Raises:
        UsageError: With every setting that it cannot search, and the samplers that can.
    """
    faults = auto_cannot(space) if sampler == "auto" else []
    if faults:
        raise UsageError(
            "\n  ".join(["the default search (--sampler auto) cannot search this space:", *faults]),
            "search it with --sampler tpe (or nsga2, random, grid), or leave these settings out",
        )
