"""What a search space may hold for masks of single weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Self

import optuna
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from autoprune.space.choices import Parameters, choice_params, suggest_choice
from autoprune.space.mask import UNSTRUCTURED, Allocation, Mask, MaskCriterion, Pattern, check_share


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


_Patterns = Annotated[tuple[Pattern, ...], Field(min_length=1)]
_Allocations = Annotated[tuple[Allocation, ...], Field(min_length=1)]
_Criteria = Annotated[tuple[MaskCriterion, ...], Field(min_length=1)]


class MaskSpace(BaseModel):
    """Choices for every setting of :class:`~autoprune.space.mask.Mask`, each one value or a list.

    Attributes:
        pattern: ``unstructured`` or ``N:M``.
        allocation: ``layer``, ``global``, ``erk``, ``lamp``; a pattern ``N:M`` always has ``layer``.
        criterion: How weights are ranked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: Annotated[_Patterns, BeforeValidator(_listed, json_schema_input_type=str | _Patterns)] = (
        UNSTRUCTURED,
    )
    allocation: Annotated[
        _Allocations, BeforeValidator(_listed, json_schema_input_type=Allocation | _Allocations)
    ] = ("layer",)
    criterion: Annotated[
        _Criteria, BeforeValidator(_listed, json_schema_input_type=MaskCriterion | _Criteria)
    ] = ("magnitude",)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name in MaskSpace.model_fields:
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: a choice is there twice: {list(values)}")
        return self

    def check(self, sparsities: Iterable[float], finetune_steps: Iterable[int]) -> None:
        """Refuse choices that cannot go together, before anything is tried.

        Args:
            sparsities: All that a group may get.
            finetune_steps: All that the recovery may get.

        Raises:
            UsageError: If a pattern does not allow one of the sparsities, or ``movement`` may have no step.
        """
        masking = [sparsity for sparsity in sparsities if sparsity > 0]
        for pattern in self.pattern if masking else ():
            for sparsity in masking:
                check_share(pattern, sparsity)
        if masking and "movement" in self.criterion:
            Mask(criterion="movement").check(masking, min(finetune_steps))

    def default(self) -> Mask:
        """Return the mask made of every first choice."""
        return self._made(self.pattern[0], self.allocation[0], self.criterion[0])

    def every(self) -> list[Mask]:
        """Return the masks that differ."""
        found = [self._made(p, a, c) for p in self.pattern for a in self.allocation for c in self.criterion]
        return list(dict.fromkeys(found))

    def suggest(self, trial: optuna.trial.BaseTrial) -> Mask:
        """Let ``trial`` choose ``mask:pattern``, ``mask:allocation`` and ``mask:criterion``."""
        pattern: Any = suggest_choice(trial, "mask:pattern", self.pattern)
        allocation: Any = "layer"
        if pattern == UNSTRUCTURED:
            allocation = suggest_choice(trial, "mask:allocation", self.allocation)
        return self._made(pattern, allocation, suggest_choice(trial, "mask:criterion", self.criterion))

    def params_of(self, mask: Mask) -> Parameters | None:
        """Return the parameters with which :meth:`suggest` gives ``mask``; None if it lies outside."""
        found: Parameters = {}
        for name in MaskSpace.model_fields:
            if name == "allocation" and mask.pattern != UNSTRUCTURED:
                continue
            params = choice_params(f"mask:{name}", getattr(self, name), getattr(mask, name))
            if params is None:
                return None
            found |= params
        return found

    def count(self) -> int:
        """Return the number of masks that differ."""
        return len(self.every())

    @staticmethod
    def _made(pattern: str, allocation: Allocation, criterion: MaskCriterion) -> Mask:
        kept = allocation if pattern == UNSTRUCTURED else "layer"
        return Mask(pattern=pattern, allocation=kept, criterion=criterion)
