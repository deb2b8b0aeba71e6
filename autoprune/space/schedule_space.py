"""Choices of a search space for the schedule of pruning, and their parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Any, Self

import optuna
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from autoprune.space.choices import (
    RANGE_STEPS,
    FloatChoices,
    FloatRange,
    IntChoices,
    IntRange,
    Parameters,
    choice_params,
    suggest_choice,
)
from autoprune.space.schedule import SETTINGS_OF, TRAINED, Schedule, ScheduleKind

_Kinds = Annotated[tuple[ScheduleKind, ...], Field(min_length=1)]
_PREFIX = "schedules:"


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class ScheduleSpace(BaseModel):
    """Choices for every setting of :class:`~autoprune.space.schedule.Schedule`.

    Each is one value, a list of choices, or for numbers a range ``{low, high, log}``. The first choice is the
    default, which the baselines use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Annotated[_Kinds, BeforeValidator(_listed, json_schema_input_type=ScheduleKind | _Kinds)] = (
        "one_shot",
    )
    rounds: IntChoices = (3,)
    strength: FloatChoices = (0.05,)
    sparse_steps: FloatChoices = (0.5,)

    @model_validator(mode="after")
    def _within_schedule(self) -> Self:
        for name in ScheduleSpace.model_fields:
            values = _ends(getattr(self, name))
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: a choice is there twice: {list(values)}")
            for value in values:
                try:
                    Schedule.model_validate({name: value})
                except ValidationError as error:
                    raise ValueError(f"{name} = {value!r}: {error.errors()[0]['msg']}") from None
        return self

    def default(self) -> Schedule:
        """Return the schedule made of every first choice (of a range its lower end)."""
        kind = self.kind[0]
        return Schedule(kind=kind, **{name: _ends(getattr(self, name))[0] for name in SETTINGS_OF[kind]})

    def fewest_steps_after(self, finetune_steps: int) -> int:
        """Return the fewest steps that any of these schedules takes after its last cut."""
        longest = max(_ends(self.sparse_steps))
        return min(
            Schedule(kind=kind, sparse_steps=longest).steps_after(finetune_steps) for kind in self.kind
        )

    def suggest(self, trial: optuna.trial.BaseTrial) -> Schedule:
        """Let ``trial`` choose; settings that mean nothing to the kind stay at their defaults."""
        kind: ScheduleKind = suggest_choice(trial, f"{_PREFIX}kind", self.kind)
        chosen = {
            name: suggest_choice(trial, f"{_PREFIX}{name}", getattr(self, name)) for name in SETTINGS_OF[kind]
        }
        return Schedule(kind=kind, **chosen)

    def params_of(self, schedule: Schedule) -> Parameters | None:
        """Return the parameters with which :meth:`suggest` gives ``schedule``; None if it lies outside."""
        found: Parameters = {}
        for name in ("kind", *SETTINGS_OF[schedule.kind]):
            params = choice_params(f"{_PREFIX}{name}", getattr(self, name), getattr(schedule, name))
            if params is None:
                return None
            found |= params
        return found

    def count(self) -> int:
        """Return the number of schedules that differ; a range counts as 100 choices, one of few numbers as those."""
        return sum(math.prod(_count(getattr(self, name)) for name in SETTINGS_OF[kind]) for kind in self.kind)

    def each(self) -> Iterator[Schedule]:
        """Yield every schedule of the space; of a range its two ends."""
        for kind in self.kind:
            names = SETTINGS_OF[kind]
            for values in itertools.product(*(_ends(getattr(self, name)) for name in names)):
                yield Schedule(kind=kind, **dict(zip(names, values, strict=True)))

    def needs_steps(self) -> str:
        """Return the first kind that prunes by training; empty if there is none."""
        return next((kind for kind in self.kind if kind in TRAINED), "")


def _ends(choices: Any) -> tuple[Any, ...]:
    return (choices.low, choices.high) if isinstance(choices, IntRange | FloatRange) else tuple(choices)


def _count(choices: Any) -> int:
    if isinstance(choices, IntRange):
        return min(RANGE_STEPS, choices.high - choices.low + 1)
    return RANGE_STEPS if isinstance(choices, FloatRange) else len(choices)
