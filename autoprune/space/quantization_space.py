"""What a search space may hold for the making of integer weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Self

import optuna
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from autoprune.space.choices import Parameters, choice_params, suggest_choice
from autoprune.space.quantization import (
    INTEGER_BITS,
    SMOOTHING,
    Activations,
    BlockSize,
    Equalize,
    Half,
    Quantization,
    Rounding,
    ScaleMethod,
)


def _listed(value: object) -> object:
    return [value] if value is None or isinstance(value, str | bool | int | float) else value


def _one_or_list(one: Any, several: Any) -> BeforeValidator:
    return BeforeValidator(_listed, json_schema_input_type=one | several)


_Scales = Annotated[tuple[ScaleMethod, ...], Field(min_length=1)]
_Roundings = Annotated[tuple[Rounding, ...], Field(min_length=1)]
_Switches = Annotated[tuple[bool, ...], Field(min_length=1)]
_Floats = Annotated[tuple[float, ...], Field(min_length=1)]
_Widths = Annotated[tuple[int, ...], Field(min_length=1)]
_Blocks = Annotated[tuple[BlockSize | None, ...], Field(min_length=1)]
_Halves = Annotated[tuple[Half, ...], Field(min_length=1)]
_Inputs = Annotated[tuple[Activations, ...], Field(min_length=1)]
_Equalizations = Annotated[tuple[Equalize, ...], Field(min_length=1)]
_PREFIX = "quantization:"


class QuantizationSpace(BaseModel):
    """Choices for every setting of :class:`~autoprune.space.quantization.Quantization`, each one value or a list.

    Attributes:
        scale: ``minmax``, ``percentile``, ``mse``.
        percentile: For the scale of that name; means nothing to the others.
        rounding: ``nearest``, ``gptq``, ``adaptive``.
        bias_correction: Whether biases are corrected.
        aware: Shares of the fine-tuning that know of integers.
        aware_bits: Largest bit-widths that call for it.
        block_size: ``null`` for one scale for each channel, or 16, 32, 64, 128, 256 weights for each scale.
        half: ``float16``, ``bfloat16``; for weights of 16 bits.
        activations: ``static``, ``dynamic``, ``fp8``.
        equalize: ``none``, ``cross_layer``, ``smooth``, ``both``.
        smooth_alpha: For the forms of equalisation that smooth; means nothing to the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: Annotated[_Scales, _one_or_list(ScaleMethod, _Scales)] = ("minmax",)
    percentile: Annotated[_Floats, _one_or_list(float, _Floats)] = (99.9,)
    rounding: Annotated[_Roundings, _one_or_list(Rounding, _Roundings)] = ("nearest",)
    bias_correction: Annotated[_Switches, _one_or_list(bool, _Switches)] = (False,)
    aware: Annotated[_Floats, _one_or_list(float, _Floats)] = (0.0,)
    aware_bits: Annotated[_Widths, _one_or_list(int, _Widths)] = (INTEGER_BITS,)
    block_size: Annotated[_Blocks, _one_or_list(BlockSize | None, _Blocks)] = (None,)
    half: Annotated[_Halves, _one_or_list(Half, _Halves)] = ("float16",)
    activations: Annotated[_Inputs, _one_or_list(Activations, _Inputs)] = ("static",)
    equalize: Annotated[_Equalizations, _one_or_list(Equalize, _Equalizations)] = ("none",)
    smooth_alpha: Annotated[_Floats, _one_or_list(float, _Floats)] = (0.5,)

    @model_validator(mode="after")
    def _allowed_and_once(self) -> Self:
        for name in QuantizationSpace.model_fields:
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: a choice is there twice: {list(values)}")
            for value in values:
                Quantization.model_validate({name: value})
        if any(self.aware) and self.equalize != ("none",):
            raise ValueError(
                f"equalize {list(self.equalize)} rescales weights that aware {list(self.aware)} has trained on grids; "
                "allowed: aware 0 alone, or equalize none alone"
            )
        return self

    @property
    def blocks(self) -> list[int]:
        """Sizes of blocks that are among the choices."""
        return [size for size in self.block_size if size is not None]

    def default(self) -> Quantization:
        """Return what every first choice makes."""
        first = Quantization.model_validate({name: getattr(self, name)[0] for name in _NAMES})
        return first.of_weights(integers=True, halves=True)

    def every(self, *, integers: bool = True, halves: bool = False) -> list[Quantization]:
        """Return those that differ where there are weights of 2 to 8 bits, or of 16."""
        values = itertools.product(*(getattr(self, name) for name in _NAMES))
        made = (Quantization.model_validate(dict(zip(_NAMES, each, strict=True))) for each in values)
        return list(dict.fromkeys(each.of_weights(integers=integers, halves=halves) for each in made))

    def of_bits(self, bits: int) -> list[Quantization]:
        """Return those that differ where all weights have so many bits."""
        return self.every(integers=bits <= INTEGER_BITS, halves=INTEGER_BITS < bits < 32)

    def suggest(
        self, trial: optuna.trial.BaseTrial, *, integers: bool = True, halves: bool = False
    ) -> Quantization:
        """Let ``trial`` choose ``quantization:scale`` and so on, each only where it means something.

        Args:
            trial: The trial.
            integers: Whether the recipe has weights of 2 to 8 bits.
            halves: Whether it has weights of 16 bits.
        """
        chosen: dict[str, Any] = {}
        for name in _NAMES:
            if _matters(name, chosen, integers, halves):
                chosen[name] = suggest_choice(trial, f"{_PREFIX}{name}", getattr(self, name))
        return Quantization.model_validate(chosen)

    def params_of(
        self, made: Quantization, *, integers: bool = True, halves: bool = False
    ) -> Parameters | None:
        """Return the parameters with which :meth:`suggest` gives ``made``; None if it lies outside."""
        found: Parameters = {}
        chosen = made.model_dump()
        for name in _NAMES:
            if not _matters(name, chosen, integers, halves):
                continue
            params = choice_params(f"{_PREFIX}{name}", getattr(self, name), chosen[name])
            if params is None:
                return None
            found |= params
        return found

    def count(self) -> int:
        """Return the number of those that differ for weights of 2 to 8 bits."""
        return len(self.every())

    def combinations(self, formats: Sequence[tuple[int, int, int]]) -> int:
        """Return the number of ways to give groups their bits and to make what then differs.

        Args:
            formats: For each group, the number of formats with weights of 32 bits, of 16 bits, and of integers.
        """
        plain, halves, integers, all_kinds = (
            math.prod(sum(count[kind] for kind in kinds) for count in formats)
            for kinds in ((0,), (0, 1), (0, 2), (0, 1, 2))
        )
        made, stored = self.count(), len(self.half)
        both = all_kinds - halves - integers + plain
        return plain + (halves - plain) * stored + (integers - plain) * made + both * made * stored

    @property
    def unset(self) -> set[str]:
        """Names of the settings that came after the first studies were recorded, and are as by default."""
        fresh = QuantizationSpace()
        return {name for name in _LATER if getattr(self, name) == getattr(fresh, name)}


# The order of choices: what decides whether another one matters comes before it.
_NAMES = tuple(QuantizationSpace.model_fields)
_LATER = ("aware_bits", "block_size", "half", "activations", "equalize", "smooth_alpha")


def _matters(name: str, chosen: dict[str, Any], integers: bool, halves: bool) -> bool:
    if name == "half":
        return halves
    if name == "percentile":
        return integers and chosen["scale"] == "percentile"
    if name == "aware_bits":
        return integers and chosen["aware"] > 0
    if name == "smooth_alpha":
        return integers and chosen["equalize"] in SMOOTHING
    return integers
