"""The pool of a default search: every recipe that it looked at, and how far each has come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from autoprune.search.candidates import Candidate, as_timed
from autoprune.search.options import Options
from autoprune.search.severity import severity
from autoprune.search.solver import Choices
from autoprune.space.groups import Groups
from autoprune.study.records import TrialRecord, is_given
from autoprune.study.screens import Screen

# Trained recipes after which the predictions of latency are corrected again.
_CORRECT_EVERY = 3
# In large studies after a tenth more, by those that were looked at last: four slopes are fitted.
_CORRECT_SHARE, _CORRECT_BY = 10, 200


class Pool:
    """Candidates by what their recipes come to: choices that cut and quantize alike are one.

    Args:
        options: Options of every group and their predicted costs.
        dense: Capability of the dense network on the search split.
        lowest: The rung that every candidate goes through.
        rungs: Number of rungs.
    """

    def __init__(self, options: Options, dense: float, lowest: int, rungs: int) -> None:
        self.options = options
        self.candidates: dict[bytes, Candidate] = {}
        self._dense = dense
        self._lowest = lowest
        self._rungs = rungs
        self._prunes = any(kept < o.group.size for o in options.of for kept in o.kept)
        self._corrected_by = 0
        self._reserved: set[bytes] = set()

    def __contains__(self, choice: Choices) -> bool:
        return self.key(choice) in self.candidates or self.key(choice) in self._reserved

    def reserve(self, choice: Choices) -> None:
        """Hold a place for a choice that is being looked at, so that it is not looked at twice."""
        self._reserved.add(self.key(choice))

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.candidates.values())

    def key(self, choice: Choices) -> bytes:
        """Return what choices of the same network have in common."""
        return self.options.canonical(choice).tobytes()

    def get(self, choice: Choices) -> Candidate | None:
        """Return the candidate of a choice; None where there is none yet."""
        return self.candidates.get(self.key(choice))

    def __getitem__(self, choice: Choices) -> Candidate:
        return self.candidates[self.key(choice)]

    def put(self, choice: Choices, candidate: Candidate) -> None:
        """Take up a candidate under the choice that it comes from."""
        self._reserved.discard(self.key(choice))
        self.candidates[self.key(choice)] = candidate

    # -- rungs -------------------------------------------------------------------------------

    def counts(self, candidate: Candidate) -> bool:
        """Return whether a candidate is one that trainings are for; where nothing can be cut, all are."""
        return candidate.prunes or not self._prunes

    def count(self, rung: int) -> int:
        """Return how many candidates that count have a result of ``rung``; all that were screened do."""
        return sum(c.reaches(rung) and (rung == 0 or self.counts(c)) for c in self)

    def waiting(self, rung: int) -> list[Candidate]:
        """Return the candidates of ``rung`` that may be taken to the next one."""
        return [
            c for c in self
            if rung in c.lost and not c.reaches(rung + 1) and (rung == 0 or self.counts(c))
        ]  # fmt: skip

    def promoted(self, rung: int) -> list[Candidate]:
        """Return the candidates of ``rung`` that were taken to the next one."""
        return [c for c in self if rung in c.lost and c.reaches(rung + 1)]

    # -- results -----------------------------------------------------------------------------

    def note(self, candidate: Candidate, record: TrialRecord) -> None:
        """Take up what a trial measured; one that failed changes nothing."""
        measured = record.measurement
        if record.state != "complete" or measured is None:
            return
        candidate.trials[record.rung] = record
        candidate.lost[record.rung] = severity(self._dense - measured.search.value, self._dense)
        candidate.costs = (measured.size_ratio, measured.latency.ratio)

    def screened(self, screen: Screen) -> Candidate:
        """Return the candidate of a screen; it is not taken up yet."""
        return Candidate(
            screen.recipe,
            screen.arm,
            screen.label,
            (screen.size_ratio, screen.latency_ratio),
            {0: severity(screen.lost, self._dense)},
            screened=screen.lost,
        )

    def untrained(self, records: Sequence[TrialRecord]) -> Iterator[tuple[Choices, Candidate]]:
        """Yield what needs no training, the dense network and int8 alone, with a result of every rung."""
        for record in records:
            measured = record.measurement
            if not record.is_measured_search or measured is None or record.recipe is None:
                continue
            if not is_given(record, "auto"):
                continue
            lost = severity(max(0.0, self._dense - measured.search.value), self._dense)
            yield (
                self.options.encode(record.recipe),
                Candidate(
                    record.recipe,
                    record.origin,
                    record.label,
                    (measured.size_ratio, measured.latency.ratio),
                    dict.fromkeys(range(self._lowest, self._rungs), lost),
                    dict.fromkeys(range(1, self._rungs), record),
                ),
            )

    # -- costs -------------------------------------------------------------------------------

    def correct_costs(self, groups: Groups) -> bool:
        """Fit the predictions of latency to the trials too, once there are some more; return whether that was done."""
        trained = [c for c in self if c.trials]
        if len(trained) < self._corrected_by + max(_CORRECT_EVERY, self._corrected_by // _CORRECT_SHARE):
            return False
        self._corrected_by = len(trained)
        self.options = self.options.corrected([as_timed(c, groups) for c in trained[-_CORRECT_BY:]])
        for key, candidate in self.candidates.items():
            if not candidate.trials:
                candidate.costs = self.options.predicted_costs(np.frombuffer(key, dtype=np.int64))
        return True
