"""Candidates: recipes on their way up the rungs of the default search. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from autoprune.search.profile import Timed
from autoprune.space.groups import Groups
from autoprune.space.recipe import Recipe
from autoprune.study.records import TrialRecord


@dataclass
class Candidate:
    """A recipe on its way up the rungs.

    Attributes:
        recipe: The whole candidate, without training.
        arm: Who proposed it.
        label: For people; empty for proposals.
        costs: Size and latency as shares of the dense network's: predicted, measured once it was exported.
        lost: Severity of the capability lost against the dense network, by rung; 0 is the screen.
        screened: Capability lost at the screen; None if it was not screened.
        trials: Its trials by rung.
        running: Rung that it is being trained for; None while it is not.
    """

    recipe: Recipe
    arm: str
    label: str
    costs: tuple[float, float]
    lost: dict[int, float] = field(default_factory=dict)
    trials: dict[int, TrialRecord] = field(default_factory=dict)
    screened: float | None = None
    running: int | None = None

    @cached_property
    def prunes(self) -> bool:
        """Whether its recipe removes anything; asked of all candidates after each trial."""
        return self.recipe.prunes

    def reaches(self, rung: int) -> bool:
        """Return whether it has a result of ``rung``, or is about to."""
        return rung in self.lost or rung == self.running

    def values(self, rung: int) -> list[float]:
        """Return the severity of what is lost at ``rung``, size and latency."""
        return [self.lost[rung], *self.costs]


def as_timed(candidate: Candidate, groups: Groups) -> Timed:
    """Return a trained candidate as a network whose whole was timed."""
    return Timed(
        kept=candidate.recipe.kept_counts(groups),
        bits={g.name: candidate.recipe.choice(g.name).bits for g in groups.groups},
        latency_ratio=candidate.costs[1],
    )
