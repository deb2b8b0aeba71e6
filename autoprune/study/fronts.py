"""The fronts of a search as its trials come in: what :mod:`autoprune.study.front` computes of all of them at once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from autoprune.study.front import costs, volume_of
from autoprune.study.pareto import non_dominated
from autoprune.study.records import TrialRecord


class Fronts:
    """The members of each rung's front, and the volume of the best one.

    What another point dominates never comes back to a front, so that only members are kept: a trial costs what its
    front is large, not what the study is.

    Args:
        objectives: Names of the objectives.
    """

    def __init__(self, objectives: Sequence[str]) -> None:
        self._objectives = tuple(objectives)
        self._free: list[TrialRecord] = []
        self._trained: dict[int, list[TrialRecord]] = {}
        self._highest: dict[Hashable, int] = {}
        self._dense: TrialRecord | None = None
        self._dense_final: TrialRecord | None = None
        self._volume: float | None = None

    def take(self, record: TrialRecord) -> None:
        """Take up a finished trial; each once, the dense network's before those of its final phase."""
        self._note_dense(record)
        if not record.is_measured_search:
            return
        if not record.is_trained:
            self._free = self._with(self._free, record)
            for rung in self._trained:
                self._trained[rung] = self._with(self._trained[rung], record)
            return
        if record.rung > 1:
            self._highest[record.cuts] = max(record.rung, self._highest.get(record.cuts, 0))
        self._trained[record.rung] = self._with(self._trained.get(record.rung, self._free), record)

    def numbers(self) -> set[int]:
        """Return the trials on the fronts; see :func:`~autoprune.study.front.front_numbers`."""
        members = (r for front in self._fronts() for r in front)
        return {r.number for r in members if not r.is_trained or r.rung >= self._highest.get(r.cuts, 0)}

    def volume(self) -> float:
        """Return the search's hypervolume; see :func:`~autoprune.study.front.study_hypervolume`."""
        dense = self._dense_final or self._dense
        if dense is None or dense.measurement is None:
            return 0.0
        if self._volume is None:
            before = dense.measurement.search.value
            fronts = ([r.measurement for r in front if r.measurement] for front in self._fronts())
            self._volume = max(volume_of(f, self._objectives, before, on_search=True) for f in fronts)
        return self._volume

    def _fronts(self) -> list[list[TrialRecord]]:
        return list(self._trained.values()) or [self._free]

    def _note_dense(self, record: TrialRecord) -> None:
        if record.state != "complete":
            return
        if self._dense is None:
            if record.origin == "dense":
                self._dense, self._volume = record, None
            return
        if record.fidelity == "final" and record.parent == self._dense.number:
            last = self._dense_final
            if last is None or last.number < record.number:
                self._dense_final, self._volume = record, None

    def _with(self, front: list[TrialRecord], record: TrialRecord) -> list[TrialRecord]:
        """Return a front with one more trial, without those that it dominates."""
        members = [*front, record]
        values = np.array(
            [costs(r.measurement, self._objectives, on_search=True) for r in members if r.measurement]
        )
        kept = non_dominated(values)
        if kept[-1]:
            self._volume = None
        return [r for r, on in zip(members, kept, strict=True) if on]
