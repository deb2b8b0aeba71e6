"""Replay: what earlier runs of a study screened and trained, taken up as the search did when it came.

What the default search proposes next follows from all that it found and from the order in which that came: where the
volume ended, what the models were fitted to, which arm had gained how much. So a search that goes on takes up every
result in its turn, and under a budget of trials decides as one does that was not interrupted. Under a budget of time
its clocks differ, and with them what it expects of the final training.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from autoprune.errors import StorageError
from autoprune.search.proposals import Proposal
from autoprune.search.solver import Choices
from autoprune.study.records import TrialRecord, is_given
from autoprune.study.retries import CUT_OFF, MAX_RETRIES
from autoprune.study.screens import Screen, read_screens
from autoprune.study.store import StudyStore

if TYPE_CHECKING:
    from autoprune.search.auto import AutoSearch

_ANCHORS = "anchors:"


def replay(search: AutoSearch) -> None:
    """Take up what earlier runs of the search's study screened and trained."""
    records, pool = search.driver.records, search.pool
    rounds = sorted(_rounds(search.driver.store).items(), key=lambda each: int(each[0]))
    waiting = [{pool.key(choice) for choice in row} for _, row in rounds]
    anchors: set[bytes] = set()
    tries: Counter[bytes] = Counter()
    for event in in_order(read_screens(search.driver.paths), records):
        assert event.recipe is not None  # noqa: S101 (in_order leaves out what has none)
        choice = pool.options.encode(event.recipe)
        key = pool.key(choice)
        known = pool.get(choice)
        if isinstance(event, TrialRecord) and known is None and (search.lowest == 0 or event.rung > 1):
            continue
        if isinstance(event, TrialRecord) and event.failure_kind in CUT_OFF:
            tries[key] += 1
            if tries[key] <= MAX_RETRIES:
                continue  # it says nothing of the recipe
        arm = event.arm if isinstance(event, Screen) else event.origin
        if known is None or isinstance(event, Screen):
            begun = next((place for place, each in enumerate(waiting) if key in each), None)
            if begun is not None:
                # They were all solved for at once, before the first of them was looked at.
                anchors, waiting = anchors.union(*waiting[: begun + 1]), waiting[begun + 1 :]
                search.proposer.prepare()
            elif key not in anchors and arm in search.proposer.arms:
                search.proposer.prepare()
        if isinstance(event, Screen):
            search.take_screen(Proposal(choice, arm, event.weights), event)
            continue
        candidate = known or search.candidate(event.recipe, choice, arm, event.label)
        search.trained(candidate, event, records[: event.number + 1])
        if known is None:
            search.look_s.append(event.duration_s)
            search.take(Proposal(choice, arm, event.weights), candidate)


def spent_s(store: StudyStore) -> float:
    """Return the seconds that all runs of a study used, to the end of the last thing that ended before a kill."""
    ended = [record.ended_s for record in store.records()]
    ended += [screen.ended_s for screen in read_screens(store.paths)]
    return max([store.spent_s, *ended])


def in_order(screens: Sequence[Screen], records: Sequence[TrialRecord]) -> Iterator[Screen | TrialRecord]:
    """Yield screens and what was trained in the order in which they ended; trials without a known end last."""
    trials = [
        r
        for r in records
        if r.fidelity == "search"
        and r.rung >= 1
        and r.recipe
        and r.state != "running"
        and not is_given(r, "auto")
    ]
    trials.sort(key=lambda r: (r.ended_s or math.inf, r.number))
    ended: list[tuple[float, Screen | TrialRecord]] = [(r.ended_s or math.inf, r) for r in trials]
    looked: list[tuple[float, Screen | TrialRecord]] = [(screen.ended_s, screen) for screen in screens]
    yield from (event for _, event in heapq.merge(looked, ended, key=lambda pair: pair[0]))


def keep_anchors(store: StudyStore, anchors: Sequence[Choices]) -> None:
    """Note the anchors of this round, which later results would move."""
    store.note(f"{_ANCHORS}{store.round}", json.dumps([row.tolist() for row in anchors]))


def kept_anchors(store: StudyStore) -> list[Choices] | None:
    """Return the anchors that an earlier run of this round noted; None if none did."""
    return _rounds(store).get(str(store.round))


def _rounds(store: StudyStore) -> dict[str, list[Choices]]:
    """Return all anchors that were noted, by round."""
    notes = {
        key.removeprefix(_ANCHORS): text for key, text in store.notes().items() if key.startswith(_ANCHORS)
    }
    try:
        return {
            name: [np.array(row, dtype=np.int64) for row in json.loads(text)] for name, text in notes.items()
        }
    except (ValueError, TypeError) as error:
        raise StorageError(
            f"the record of study {store.paths.name!r} is damaged: its anchors: {error}",
            "run the same search again, which goes on from a copy, or set the study aside with --fresh",
        ) from error
