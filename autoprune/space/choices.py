"""What a search space may hold for one setting: a value, a list of choices or a range; and its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import optuna
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    Tag,
    ValidationError,
    model_validator,
)

from autoprune.space.recipe import Recovery

# A continuous range counts as this many choices where the size of a space is told.
RANGE_STEPS = 100

Parameters = dict[str, Any]


class IntRange(BaseModel):
    """Whole numbers from ``low`` to ``high``, both included.

    Attributes:
        low: Smallest value; at least 1 if ``log``.
        high: Largest value.
        log: Whether it is sampled on a logarithmic scale.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: StrictInt
    high: StrictInt
    log: StrictBool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_ends(self.low, self.high, self.log)
        return self


class FloatRange(BaseModel):
    """Numbers from ``low`` to ``high``, both included.

    Attributes:
        low: Smallest value; above 0 if ``log``.
        high: Largest value.
        log: Whether it is sampled on a logarithmic scale.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: StrictFloat
    high: StrictFloat
    log: StrictBool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_ends(self.low, self.high, self.log)
        return self


def _check_ends(low: float, high: float, log: bool) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low ({low}) must be below high ({high})")
    if log and low <= 0:
        raise ValueError(f"low ({low}) must be above 0 where log is true")


def _list_or_range(value: object) -> str:
    return "range" if isinstance(value, Mapping | IntRange | FloatRange) else "list"


def _listed(value: object) -> object:
    return [value] if isinstance(value, bool | int | float | str) else value


Schedule = Literal["cosine", "onecycle"]
_Bools = Annotated[tuple[StrictBool, ...], Field(min_length=1)]
_Ints = Annotated[tuple[StrictInt, ...], Field(min_length=1)]
_Floats = Annotated[tuple[StrictFloat, ...], Field(min_length=1)]
_Schedules = Annotated[tuple[Schedule, ...], Field(min_length=1)]

BoolChoices = Annotated[_Bools, BeforeValidator(_listed, json_schema_input_type=StrictBool | _Bools)]
ScheduleChoices = Annotated[
    _Schedules, BeforeValidator(_listed, json_schema_input_type=Schedule | _Schedules)
]
IntChoices = Annotated[
    Annotated[_Ints, Tag("list")] | Annotated[IntRange, Tag("range")],
    Discriminator(_list_or_range),
    BeforeValidator(_listed, json_schema_input_type=StrictInt | _Ints | IntRange),
]
FloatChoices = Annotated[
    Annotated[_Floats, Tag("list")] | Annotated[FloatRange, Tag("range")],
    Discriminator(_list_or_range),
    BeforeValidator(_listed, json_schema_input_type=StrictFloat | _Floats | FloatRange),
]

# Settings of the fine-tuning, which mean nothing without a step; the temperature nothing without distillation.
_TUNED = ("learning_rate", "schedule", "distill", "temperature", "clip_norm", "feature_distill")


class RecoverySpace(BaseModel):
    """Choices for every setting of :class:`~autoprune.space.recipe.Recovery`.

    Each is one value, a list of choices, or for numbers a range ``{low, high, log}``. The first choice is the
    default, which the baselines use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    least_squares: BoolChoices = (True,)
    batchnorm: BoolChoices = (True,)
    finetune_steps: IntChoices = (40,)
    learning_rate: FloatChoices = (0.02,)
    schedule: ScheduleChoices = ("cosine",)
    distill: FloatChoices = (0.9,)
    temperature: FloatChoices = (4.0,)
    clip_norm: FloatChoices = (5.0,)
    feature_distill: FloatChoices = (0.0,)

    @model_validator(mode="after")
    def _within_recovery(self) -> Self:
        for name in RecoverySpace.model_fields:
            choices = getattr(self, name)
            values = (choices.low, choices.high) if isinstance(choices, IntRange | FloatRange) else choices
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: a choice is there twice: {list(values)}")
            for value in values:
                try:
                    Recovery.model_validate({name: value})
                except ValidationError as error:
                    raise ValueError(f"{name} = {value!r}: {error.errors()[0]['msg']}") from None
        return self

    def default(self) -> Recovery:
        """Return the recovery made of every first choice (of a range its middle)."""
        return Recovery(**{name: _first(getattr(self, name)) for name in RecoverySpace.model_fields})

    def suggest(self, trial: optuna.trial.BaseTrial) -> Recovery:
        """Let ``trial`` choose; settings that depend on a choice not taken stay at their defaults."""
        chosen = self.default().model_dump()
        for name in RecoverySpace.model_fields:
            if self._matters(name, chosen):
                chosen[name] = suggest_choice(trial, name, getattr(self, name))
        return Recovery(**chosen)

    def params_of(self, recovery: Recovery) -> Parameters | None:
        """Return the parameters with which :meth:`suggest` gives ``recovery``; None if it lies outside."""
        chosen = recovery.model_dump()
        found: Parameters = {}
        for name in RecoverySpace.model_fields:
            if not self._matters(name, chosen):
                continue
            params = choice_params(name, getattr(self, name), chosen[name])
            if params is None:
                return None
            found |= params
        return found

    def count(self, orders: int = 1) -> int:
        """Return the number of recoveries that differ; a range counts as 100 choices.

        Args:
            orders: Orders of the stages to choose from, which differ only where there is fine-tuning.
        """
        steps = _values(self.finetune_steps)
        without: int = sum(value == 0 for value in steps)
        distill = _values(self.distill)
        plain: int = sum(value == 0 for value in distill)
        distilled = plain + (len(distill) - plain) * len(_values(self.temperature))
        tuned: int = distilled * math.prod(
            len(_values(choices))
            for choices in (self.learning_rate, self.schedule, self.clip_norm, self.feature_distill)
        )
        return (
            len(self.least_squares)
            * len(self.batchnorm)
            * (without + (len(steps) - without) * tuned * orders)
        )

    @staticmethod
    def _matters(name: str, chosen: Mapping[str, Any]) -> bool:
        if name in _TUNED and chosen["finetune_steps"] == 0:
            return False
        return name != "temperature" or chosen["distill"] > 0


def suggest_choice(trial: optuna.trial.BaseTrial, name: str, choices: Any) -> Any:
    """Let ``trial`` choose among ``choices``; a single choice makes no parameter.

    Sorted numbers become an index, so that a sampler can tell that neighbours are alike; names become categories.
    """
    if isinstance(choices, IntRange):
        return trial.suggest_int(name, choices.low, choices.high, log=choices.log)
    if isinstance(choices, FloatRange):
        return trial.suggest_float(name, choices.low, choices.high, log=choices.log)
    if len(choices) == 1:
        return choices[0]
    if _is_ordered(choices):
        index = trial.suggest_int(name, 0, len(choices) - 1)
        return sorted(choices)[index]
    return trial.suggest_categorical(name, list(choices))


def choice_params(name: str, choices: Any, value: Any) -> Parameters | None:
    """Return the parameters with which :func:`suggest_choice` gives ``value``; None if it lies outside."""
    if isinstance(choices, IntRange | FloatRange):
        return {name: value} if choices.low <= value <= choices.high else None
    if value not in choices:
        return None
    if len(choices) == 1:
        return {}
    return {name: sorted(choices).index(value) if _is_ordered(choices) else value}


def _is_ordered(choices: tuple[Any, ...]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in choices)


def _first(choices: Any) -> Any:
    if isinstance(choices, IntRange):
        middle = math.sqrt(choices.low * choices.high) if choices.log else (choices.low + choices.high) / 2
        return int(middle)
    if isinstance(choices, FloatRange):
        return math.sqrt(choices.low * choices.high) if choices.log else (choices.low + choices.high) / 2
    return choices[0]


def _values(choices: Any) -> list[Any]:
    """Return the choices themselves; of a wide range as many values as it counts for, among them its ends."""
    if isinstance(choices, IntRange) and choices.high - choices.low < RANGE_STEPS:
        return list(range(choices.low, choices.high + 1))
    if isinstance(choices, IntRange | FloatRange):
        return [choices.low] + [choices.high] * (RANGE_STEPS - 1)
    return list(choices)
