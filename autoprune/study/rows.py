"""Trials straight from the tables: what our records need, and none of Optuna's objects."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy import Connection, func, or_, select

from autoprune.study.decode import FAILURE, PLAN, RESULT

_TRIALS: Any = models.TrialModel.__table__
_ATTRIBUTES: Any = models.TrialUserAttributeModel.__table__
# SQLite takes some 30,000 values in one statement; more than this are rather read with all others.
_MOST_NAMED = 1000


@dataclass(frozen=True)
class Row:
    """One trial as it lies in the database.

    Attributes:
        id: Its number in the database, which grows from trial to trial.
        number: Its number in the study.
        state: Its state.
        attributes: Texts by key, as :mod:`autoprune.study.decode` wrote them.
    """

    id: int
    number: int
    state: TrialState
    attributes: dict[str, str]


def read_rows(
    link: Connection,
    study_id: int,
    *,
    above: int = -1,
    also: Collection[int] = (),
    known: Collection[int] = (),
) -> list[Row]:
    """Return trials in the order of their numbers.

    Args:
        link: The database.
        study_id: The study's number there.
        above: Only trials with a larger ``id``, and
        also: those with these.
        known: Of these they are left out while they run: nothing of them changes until they end.
    """
    chosen = _TRIALS.c.study_id == study_id
    if above >= 0 and len(also) <= _MOST_NAMED:
        newer = _TRIALS.c.trial_id > above
        chosen &= or_(newer, _TRIALS.c.trial_id.in_(list(also))) if also else newer
    columns = select(_TRIALS.c.trial_id, _TRIALS.c.number, _TRIALS.c.state)
    # The trials first: what they say is finished has all its attributes by then.
    found_trials = link.execute(columns.where(chosen).order_by(_TRIALS.c.number)).all()
    trials = [row for row in found_trials if row[0] not in known or row[2] != TrialState.RUNNING]
    if len(trials) <= _MOST_NAMED:
        chosen = _TRIALS.c.trial_id.in_([row[0] for row in trials])
    texts = (
        select(_ATTRIBUTES.c.trial_id, _ATTRIBUTES.c.key, _ATTRIBUTES.c.value_json)
        .join(_TRIALS, _TRIALS.c.trial_id == _ATTRIBUTES.c.trial_id)
        .where(chosen, _ATTRIBUTES.c.key.in_([PLAN, RESULT, FAILURE]))
    )
    found: dict[int, dict[str, str]] = defaultdict(dict)
    if trials:
        for trial_id, key, value in link.execute(texts):
            found[trial_id][key] = _text(value)
    return [Row(row[0], row[1], row[2], found[row[0]]) for row in trials]


def count_trials(link: Connection, study_id: int) -> int:
    """Return how many trials a study has."""
    counted = select(func.count()).select_from(_TRIALS).where(_TRIALS.c.study_id == study_id)
    return int(link.execute(counted).scalar_one())


def _text(value: str) -> str:
    try:
        text = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return text if isinstance(text, str) else value
