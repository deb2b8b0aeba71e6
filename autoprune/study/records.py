"""TrialRecord: one trial as the study remembers it. Torch-free."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict

from autoprune.measure.record import Measurement
from autoprune.space.recipe import Recipe

State = Literal["complete", "failed", "running"]
Fidelity = Literal["search", "final"]


class TrialRecord(BaseModel):
    """One trial.

    Attributes:
        number: Number in the study; 0 is the dense network.
        state: Whether it finished.
        fidelity: ``search`` for the brief recovery, ``final`` for the long one with the report split.
        rung: Training rung of a search trial, from 1; 0 for a final one and for a screen that failed.
        origin: Who proposed it: ``dense``, ``baseline``, the sampler's or the arm's name, or ``final``.
        label: For people, such as ``int8`` or ``uniform 0.50 int8``; empty for proposals.
        parent: Trial whose recipe a final trial continued; None otherwise.
        started_from: Trial whose recovered network was trained on or cut further; None where it was the dense one.
        round: Final phase that a final trial belongs to, from 1: a larger budget adds one; 0 otherwise.
        variant: What tells a final trial from the one of its parent's own recipe: ``bits4`` for the same network in
            fewer bits; empty for that one, and for all others.
        repeat_of: Earlier trial with the same artifact, whose measurement this one has; None otherwise.
        screened: Capability after closed-form recovery alone, lost against the dense network on the same examples
            (see :mod:`autoprune.study.screens`); None where it was not screened.
        weights: What the sampler over the solver's weights chose for it; empty for what others proposed, and where it
            was screened, which its screen tells.
        recipe: The whole candidate; None only for a trial lost before it had one.
        measurement: What was measured; None unless ``complete``.
        failure_kind: Kind of failure (see ``TrialError``); empty unless ``failed``.
        failure_reason: One line; empty unless ``failed``.
        train_steps: Gradient steps spent in this line, the parent's included.
        duration_s: Seconds that the trial took.
        ended_s: Seconds of the study that were spent when it was recorded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    state: State
    fidelity: Fidelity = "search"
    rung: int = 1
    origin: str = ""
    label: str = ""
    parent: int | None = None
    started_from: int | None = None
    round: int = 0
    variant: str = ""
    repeat_of: int | None = None
    screened: float | None = None
    weights: dict[str, float] = {}
    recipe: Recipe | None = None
    measurement: Measurement | None = None
    failure_kind: str = ""
    failure_reason: str = ""
    train_steps: int = 0
    duration_s: float = 0.0
    ended_s: float = 0.0

    @cached_property
    def prunes(self) -> bool:
        """Whether its recipe removes anything or trains integers; asked of all trials after each one."""
        return self.recipe is not None and self.recipe.prunes

    @property
    def is_repeat(self) -> bool:
        """Whether it has the measurement of an earlier trial of the same network."""
        return self.repeat_of is not None

    @property
    def is_trained(self) -> bool:
        """Whether it is a finished search trial of a network that was cut, and no repeat."""
        return self.is_measured_search and self.prunes

    @cached_property
    def cuts(self) -> Hashable:
        """What is cut and how it is ranked: alike for trials of one network, however long each was trained."""
        if self.recipe is None:
            return None
        own = frozenset(self.recipe.groups.items()), frozenset(self.recipe.criterion.items())
        return (*own, self.recipe.schedule)

    @property
    def is_measured_search(self) -> bool:
        """Whether it is a finished trial of the search, and no repeat of an earlier one."""
        return (
            self.state == "complete"
            and self.fidelity == "search"
            and self.repeat_of is None
            and self.measurement is not None
        )


def is_given(record: TrialRecord, sampler_name: str) -> bool:
    """Return whether a search did not choose a trial; the default one trains uniform recipes only if they are good.

    Args:
        record: A trial of search fidelity.
        sampler_name: The study's sampler.
    """
    if record.origin == "baseline" and sampler_name == "auto":
        return not record.prunes
    return record.origin in ("dense", "baseline")


def superseded(records: Sequence[TrialRecord]) -> set[int]:
    """Return the trials whose very recipe went on to a higher rung, which counts instead of them."""
    trained = [r for r in records if r.is_trained]
    highest: dict[Hashable, int] = {}
    for record in trained:
        if record.rung > 1:
            highest[record.cuts] = max(record.rung, highest.get(record.cuts, 0))
    return {r.number for r in trained if r.rung < highest.get(r.cuts, 0)} if highest else set()
