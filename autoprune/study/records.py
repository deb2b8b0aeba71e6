"""TrialRecord: one trial as the study remembers it. Torch-free."""

from __future__ import annotations

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
        origin: Who proposed it: ``dense``, ``baseline``, the sampler's name, or ``final``.
        label: For people, such as ``int8`` or ``uniform 0.50 int8``; empty for proposals.
        parent: Trial whose recipe and weights a final trial continued; None otherwise.
        round: Final phase that a final trial belongs to, from 1: a larger budget adds one; 0 otherwise.
        repeat_of: Earlier trial with the same artifact, whose measurement this one has; None otherwise.
        recipe: The whole candidate; None only for a trial lost before it had one.
        measurement: What was measured; None unless ``complete``.
        failure_kind: Kind of failure (see ``TrialError``); empty unless ``failed``.
        failure_reason: One line; empty unless ``failed``.
        train_steps: Gradient steps spent in this line, the parent's included.
        duration_s: Seconds that the trial took.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    state: State
    fidelity: Fidelity = "search"
    origin: str = ""
    label: str = ""
    parent: int | None = None
    round: int = 0
    repeat_of: int | None = None
    recipe: Recipe | None = None
    measurement: Measurement | None = None
    failure_kind: str = ""
    failure_reason: str = ""
    train_steps: int = 0
    duration_s: float = 0.0
