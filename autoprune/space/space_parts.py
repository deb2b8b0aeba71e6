"""Parts of a search space: choices, overrides, baselines and rungs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    WithJsonSchema,
    field_validator,
)

from autoprune.space.quantization import Bits
from autoprune.space.recipe import (
    Order,
    Ranking,
)

GroupType = Literal["conv", "linear"]
Ratio = Annotated[StrictFloat, Field(ge=0.0, le=1.0)]
Ratios = Annotated[tuple[Ratio, ...], Field(min_length=1)]
Shares = Annotated[tuple[Annotated[StrictFloat, Field(ge=0.0, lt=1.0)], ...], Field(min_length=1)]
Orders = Annotated[tuple[Order, ...], Field(min_length=1)]
BitChoices = Annotated[tuple[Bits, ...], Field(min_length=1)]
CriterionChoices = Annotated[tuple[str, ...], Field(min_length=1)]
RankingChoices = Annotated[tuple[Ranking, ...], Field(min_length=1)]


AUTO = "auto"
_USUAL_WIDTH = 8


def _width(value: object) -> object:
    if value == AUTO:
        return _USUAL_WIDTH
    if isinstance(value, str):
        raise ValueError(f"allowed: a whole number from 1 to 1024, or {AUTO}")
    return value


Width = Annotated[
    StrictInt,
    Field(ge=1, le=1024),
    BeforeValidator(_width),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1, "maximum": 1024}, {"const": AUTO}]}),
]


def each_once(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    if values is not None and len(set(values)) != len(values):
        raise ValueError(f"a choice is there twice: {list(values)}")
    return values


class Override(BaseModel):
    """Other choices for some groups; of several that match a group, the last one that names a setting wins.

    Attributes:
        groups: Group name or pattern with ``*``, ``?`` and ``[...]``.
        ratios: Shares removed, each in ``[0, 1]``; None leaves the space's.
        bits: Bit-widths; None leaves the space's.
        sparsities: Shares of single weights that become zero, each in ``[0, 1)``; None leaves the space's.
        rank_ratios: Shares of the rank removed, each in ``[0, 1)``; None leaves the space's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    groups: Annotated[str, Field(min_length=1, max_length=300)]
    ratios: Ratios | None = None
    bits: BitChoices | None = None
    sparsities: Shares | None = None
    rank_ratios: Shares | None = None

    _once = field_validator("ratios", "bits", "sparsities", "rank_ratios")(each_once)


class BaselineSpace(BaseModel):
    """Points that are measured before anything is searched.

    Attributes:
        ratios: Shares that are removed from all groups alike, each in ``(0, 1)``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratios: tuple[Annotated[StrictFloat, Field(gt=0.0, lt=1.0)], ...] = (0.15, 0.3, 0.5, 0.7)

    _once = field_validator("ratios")(each_once)


class Rung(BaseModel):
    """One fidelity of the default search, from the cheapest on; only results of one rung are compared.

    Attributes:
        steps: Gradient steps that a recipe has taken by the end of this rung; 0 is the screen, which comes first and
            runs the network after closed-form recovery, without exporting it.
        examples: Most examples of the search split that are scored; all of them if not given. Only for the screen:
            what is exported is scored on all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Annotated[StrictInt, Field(ge=0, le=1_000_000)]
    examples: Annotated[StrictInt, Field(ge=10)] | None = None
