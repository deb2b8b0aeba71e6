"""How a trial lies in Optuna's attributes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna

from autoprune.errors import StorageError
from autoprune.measure.record import Measurement
from autoprune.space.recipe import Recipe
from autoprune.study.integrity import seal, unseal
from autoprune.study.records import Fidelity, TrialRecord

PLAN = "autoprune:plan"
RESULT = "autoprune:result"
FAILURE = "autoprune:failure"


@dataclass(frozen=True)
class Plan:
    """What a trial is to evaluate; the fields are those of :class:`TrialRecord`."""

    recipe: Recipe
    origin: str
    label: str = ""
    fidelity: Fidelity = "search"
    rung: int = 1
    parent: int | None = None
    started_from: int | None = None
    round: int = 0
    variant: str = ""
    screened: float | None = None

    def text(self) -> str:
        """Return the plan as one attribute."""
        return seal({**vars(self), "recipe": self.recipe.content()})


def result_text(
    measurement: Measurement,
    train_steps: int,
    duration_s: float,
    repeat_of: int | None = None,
    ended_s: float = 0.0,
) -> str:
    """Return what a finished trial gave, as one attribute."""
    content = {
        "measurement": measurement.model_dump(mode="json"),
        "train_steps": train_steps,
        "repeat_of": repeat_of,
        "duration_s": duration_s,
        "ended_s": ended_s,
    }
    return seal(content)


def failure_text(kind: str, reason: str, duration_s: float, ended_s: float = 0.0) -> str:
    """Return why a trial failed, as one attribute."""
    content = {"failure_kind": kind, "failure_reason": reason, "duration_s": duration_s, "ended_s": ended_s}
    return seal(content)


def record(number: int, state: optuna.trial.TrialState, attributes: Mapping[str, str]) -> TrialRecord:
    """Return a trial as a record.

    Args:
        number: Its number in the study.
        state: Its state.
        attributes: Its texts by their keys.

    Raises:
        StorageError: If the texts are not what this version wrote; names the trial.
    """
    try:
        values: dict[str, Any] = unseal(attributes.get(PLAN, "{}"))
        if state == optuna.trial.TrialState.COMPLETE:
            values |= {"state": "complete"} | unseal(attributes[RESULT])
        elif state.is_finished():
            failure = attributes.get(FAILURE) or failure_text("raised", "no reason was recorded", 0.0)
            values |= {"state": "failed"} | unseal(failure)
        else:
            values |= {"state": "running"}
        return TrialRecord.model_validate({**values, "number": number})
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise StorageError(
            f"trial {number} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0][:300]}",
            "the study's database is damaged, or another version of autoprune wrote it: the same search again checks "
            "it and goes on from its copy; --fresh sets the study aside",
        ) from error
