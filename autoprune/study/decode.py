"""How a trial lies in Optuna's attributes, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import optuna

from autoprune.errors import StorageError
from autoprune.measure.record import Measurement
from autoprune.space.recipe import Recipe
from autoprune.study.integrity import seal_line, unseal_line
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
    weights: Mapping[str, float] = field(default_factory=dict)

    def text(self) -> str:
        """Return the plan as one attribute."""
        return seal_line(
            json.dumps({**vars(self), "recipe": self.recipe.content(), "weights": dict(self.weights)})
        )


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
    return seal_line(json.dumps(content))


def failure_text(kind: str, reason: str, duration_s: float, ended_s: float = 0.0) -> str:
    """Return why a trial failed, as one attribute."""
    content = {"failure_kind": kind, "failure_reason": reason, "duration_s": duration_s, "ended_s": ended_s}
    return seal_line(json.dumps(content))


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
        plan, rest, told = unseal_line(attributes.get(PLAN, "{}")), "{}", "running"
        if state == optuna.trial.TrialState.COMPLETE:
            rest, told = unseal_line(attributes[RESULT]), "complete"
        elif state.is_finished():
            failure = attributes.get(FAILURE) or failure_text("raised", "no reason was recorded", 0.0)
            rest, told = unseal_line(failure), "failed"
        # Read in one step, which takes a quarter of the time of objects in between; of names twice the last counts.
        own = f'"number": {number}, "state": "{told}"'
        found = TrialRecord.model_validate_json(f"{{{_inner(plan)}{_inner(rest)}{own}}}")
        if told == "complete" and found.measurement is None:
            raise ValueError("it is complete and holds no measurement")
        return found
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise StorageError(
            f"trial {number} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0][:300]}",
            "the study's database is damaged, or another version of autoprune wrote it: the same search again checks "
            "it and goes on from its copy; --fresh sets the study aside",
        ) from error


def _inner(text: str) -> str:
    """Return what stands between the braces of an object, ending in a comma if that is anything."""
    text = text.strip()
    if not (text.startswith("{") and text.endswith("}")):
        raise ValueError(f"{text[:40]!r} is no object")
    inner = text[1:-1].strip()
    return f"{inner}, " if inner else ""
