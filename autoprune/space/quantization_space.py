"""What a search space may hold for the making of integer weights."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Self

import optuna
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from autoprune.space.choices import Parameters, choice_params, suggest_choice
from autoprune.space.quantization import Quantization, Rounding, ScaleMethod


def _listed(value: object) -> object:
    return [value] if isinstance(value, str | bool | int | float) else value


_Scales = Annotated[tuple[ScaleMethod, ...], Field(min_length=1)]
_Roundings = Annotated[tuple[Rounding, ...], Field(min_length=1)]
_Switches = Annotated[tuple[bool, ...], Field(min_length=1)]
_Percents = Annotated[tuple[float, ...], Field(min_length=1)]
_Shares = Annotated[tuple[float, ...], Field(min_length=1)]
_PREFIX = "quantization:"


class QuantizationSpace(BaseModel):
    """Choices for every setting of :class:`~autoprune.space.quantization.Quantization`, each one value or a list.

    Attributes:
        scale: ``minmax``, ``percentile``, ``mse``.
        percentile: For the scale of that name; means nothing to the others.
        rounding: ``nearest``, ``gptq``, ``adaptive``.
        bias_correction: Whether biases are corrected.
        aware: Shares of the fine-tuning that know of integers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: Annotated[_Scales, BeforeValidator(_listed, json_schema_input_type=ScaleMethod | _Scales)] = (
        "minmax",
    )
    percentile: Annotated[_Percents, BeforeValidator(_listed, json_schema_input_type=float | _Percents)] = (
        99.9,
    )
    rounding: Annotated[
        _Roundings, BeforeValidator(_listed, json_schema_input_type=Rounding | _Roundings)
    ] = ("nearest",)
    bias_correction: Annotated[
        _Switches, BeforeValidator(_listed, json_schema_input_type=bool | _Switches)
    ] = (False,)

    aware: Annotated[_Shares, BeforeValidator(_listed, json_schema_input_type=float | _Shares)] = (0.0,)

    @model_validator(mode="after")
    def _allowed_and_once(self) -> Self:
        for name in QuantizationSpace.model_fields:
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: a choice is there twice: {list(values)}")
            for value in values:
                Quantization.model_validate({name: value})
        return self

    def default(self) -> Quantization:
        """Return what every first choice makes."""
        return self._made({name: getattr(self, name)[0] for name in QuantizationSpace.model_fields})

    def every(self) -> list[Quantization]:
        """Return those that differ."""
        names = list(QuantizationSpace.model_fields)
        values = itertools.product(*(getattr(self, name) for name in names))
        return list(dict.fromkeys(self._made(dict(zip(names, each, strict=True))) for each in values))

    def suggest(self, trial: optuna.trial.BaseTrial) -> Quantization:
        """Let ``trial`` choose ``quantization:scale`` and so on; the percentile only where it means something."""
        chosen: dict[str, Any] = {}
        for name in QuantizationSpace.model_fields:
            if name != "percentile" or chosen["scale"] == "percentile":
                chosen[name] = suggest_choice(trial, f"{_PREFIX}{name}", getattr(self, name))
        return self._made(chosen)

    def params_of(self, made: Quantization) -> Parameters | None:
        """Return the parameters with which :meth:`suggest` gives ``made``; None if it lies outside."""
        found: Parameters = {}
        for name in QuantizationSpace.model_fields:
            if name == "percentile" and made.scale != "percentile":
                continue
            params = choice_params(f"{_PREFIX}{name}", getattr(self, name), getattr(made, name))
            if params is None:
                return None
            found |= params
        return found

    def count(self) -> int:
        """Return the number of those that differ."""
        return len(self.every())

    @staticmethod
    def _made(values: dict[str, Any]) -> Quantization:
        kept = {n: v for n, v in values.items() if n != "percentile" or values["scale"] == "percentile"}
        return Quantization.model_validate(kept)
