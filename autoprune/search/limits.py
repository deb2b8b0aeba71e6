"""What the default search cannot search, told before anything runs. Torch-free."""

from __future__ import annotations

from autoprune.errors import UsageError
from autoprune.space.search_space import SearchSpace


def auto_cannot(space: SearchSpace) -> list[str]:
    """Return one line for each setting of a space that the default search cannot work with.

    It proposes a width, a criterion and bits for each group from a profile of single groups, and nothing else.
    """
    found = []
    if space.rankings != ("group",):
        found.append(
            f"rankings = {list(space.rankings)}: which units go has to depend on one group alone; allowed: ['group']"
        )
    return found


def check_sampler(sampler: str, space: SearchSpace) -> None:
    """Refuse a space that the sampler cannot search.

    Args:
        sampler: Name of the sampler.
        space: What is to be searched.

    Raises:
        UsageError: With a line for each setting.
    """
    faults = auto_cannot(space) if sampler == "auto" else []
    if faults:
        raise UsageError(
            "\n  ".join(["the default search (sampler auto) cannot search this space:", *faults]),
            "choose a plain sampler, --sampler tpe, or leave these settings out of the space",
        )
