"""What a driver asks of its records before and after each trial, kept up as they come in. Torch-free."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Sequence

from autoprune.search.baselines import effective_key
from autoprune.space.groups import Groups
from autoprune.study.fronts import Fronts
from autoprune.study.records import TrialRecord, is_given
from autoprune.study.retries import CUT_OFF

# Durations that the next trial's is guessed from.
_RECENT = 8


class Ledger:
    """Answers of which each costs what one trial does, not what the study does.

    Args:
        groups: Groups of the model.
        objectives: Names of the objectives.
        sampler_name: Who proposes.

    Attributes:
        fronts: The search's fronts.
        finished: Trials that are over.
        cut_off: How many of them were cut off, and are tried again.
        failures: Failed trials by kind.
        given: The dense network and the baselines that were measured.
    """

    def __init__(self, groups: Groups, objectives: Sequence[str], sampler_name: str) -> None:
        self.fronts = Fronts(objectives)
        self.finished = self.cut_off = 0
        self.failures: Counter[str] = Counter()
        self.given: set[int] = set()
        self._groups = groups
        self._sampler_name = sampler_name
        self._records: Sequence[TrialRecord] = ()
        self._open: list[int] = []
        self._known = 0
        self._proposals = 0
        self._durations: list[tuple[int, float]] = []
        self._first: dict[tuple[str, int], int] = {}

    def take(self, records: Sequence[TrialRecord]) -> None:
        """Take up the study's records as they are now."""
        self._records = records
        looked_at = [*self._open, *range(self._known, len(records))]
        self._known = len(records)
        self._open = [number for number in looked_at if records[number].state == "running"]
        for number in looked_at:
            if records[number].state != "running":
                self._finish(records[number])

    def _finish(self, record: TrialRecord) -> None:
        self.finished += 1
        self.cut_off += record.failure_kind in CUT_OFF
        self._proposals += self._is_proposal(record)
        self.fronts.take(record)
        if record.state == "failed":
            self.failures[record.failure_kind] += 1
            return
        if record.origin in ("dense", "baseline"):
            self.given.add(record.number)
        if record.fidelity != "search":
            return
        if record.duration_s > 0:
            insort(self._durations, (record.number, record.duration_s))
        if record.repeat_of is None and record.recipe is not None:
            key = (effective_key(record.recipe, self._groups), record.rung)
            self._first[key] = min(record.number, self._first.get(key, record.number))

    def running(self) -> list[TrialRecord]:
        """Return the trials that are not over."""
        return [self._records[number] for number in self._open]

    def same_as(self, key: str, rung: int) -> TrialRecord | None:
        """Return the first finished trial of a recipe, by its effective key and its rung; None if there is none."""
        number = self._first.get((key, rung))
        return None if number is None else self._records[number]

    def proposals(self) -> int:
        """Return how many proposals were made, those that run included."""
        return self._proposals + sum(map(self._is_proposal, self.running()))

    def _is_proposal(self, record: TrialRecord) -> bool:
        return (
            record.fidelity == "search"
            and record.rung > 0  # a screen that failed was no trial
            and not is_given(record, self._sampler_name)
            and record.failure_kind not in CUT_OFF
        )

    def durations(self) -> list[float]:
        """Return the seconds of the last few finished trials, in the order of their numbers."""
        return [duration_s for _, duration_s in self._durations[-_RECENT:]]
