"""The trials that a sampler learns from: in studies of thousands the latest, and those that count whatever their age.

Optuna's samplers read every trial for each proposal. At 10,000 trials of 43 parameters each that took half a second a
proposal, a quarter of a minute for the first, and a gigabyte of memory. Up to :data:`MOST` trials nothing is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from autoprune.study.fronts import Fronts
from autoprune.study.record_storage import RecordStorage
from autoprune.study.retries import CUT_OFF
from autoprune.study.trial_log import TrialLog

# More of them make proposals slow, not better.
MOST = 1000
# So many are asked for by their numbers; SQLite takes some 30,000 values in one statement.
_FEW = 200
# How NSGA-II names the parents of a generation among the study's attributes; it looks for them among the trials.
_PARENTS = "NSGAIISampler:parent:"


class Window:
    """Keeps the latest finished trials of a study, those on its fronts, and the parents of NSGA-II's latest generation.

    What a kill or a signal cut off is none of them: it is tried again, and a study that was interrupted proposes what
    one does that was not. What runs is none either: it holds nothing to learn from yet.

    Args:
        storage: The study's database.
        study: The study.
        log: Its records.
        objectives: Names of the objectives.
        most: How many of the latest trials.
    """

    def __init__(
        self,
        storage: RecordStorage,
        study: optuna.Study,
        log: TrialLog,
        objectives: tuple[str, ...],
        most: int = MOST,
    ) -> None:
        self._storage = storage
        self._study = study
        self._log = log
        self._most = most
        self._fronts = Fronts(objectives)
        self._open: list[int] = []
        self._known = 0
        self._trials: dict[int, FrozenTrial] = {}

    def study(self) -> optuna.Study:
        """Return the study as a sampler is to see it."""
        view = copy.copy(self._study)
        view._storage = _Seen(self._study._storage, self)  # type: ignore[assignment]
        return view

    def trials(self) -> list[FrozenTrial]:
        """Return the trials in the window, in the order of their numbers."""
        records = self._log.records()
        self._take_fronts(records)
        finished = [r.number for r in records if r.state != "running" and r.failure_kind not in CUT_OFF]
        wanted = set(finished[-self._most :])
        if len(finished) > self._most:
            wanted |= self._fronts.numbers() | self._parents()
        self._trials = {number: trial for number, trial in self._trials.items() if number in wanted}
        for trial in self._read(sorted(wanted - self._trials.keys())):
            if trial.number in wanted:
                self._trials[trial.number] = trial
        return [self._trials[number] for number in sorted(self._trials)]

    def _read(self, numbers: list[int]) -> list[FrozenTrial]:
        """Return trials, few of them by their numbers and many as all from the first of them on."""
        if not numbers:
            return []
        few = len(numbers) <= _FEW
        ids = {self._log.id_of(number) for number in numbers} if few else set()
        above = self._log.last_id() if few else self._log.id_of(numbers[0] - 1)
        return self._storage._get_trials(self._study._study_id, None, ids, above)

    def _take_fronts(self, records: list[Any]) -> None:
        looked_at = [*self._open, *range(self._known, len(records))]
        self._known = len(records)
        self._open = [number for number in looked_at if records[number].state == "running"]
        for number in looked_at:
            if records[number].state != "running":
                self._fronts.take(records[number])

    def _parents(self) -> set[int]:
        attributes = self._storage.get_study_system_attrs(self._study._study_id)
        generations = [int(key.removeprefix(_PARENTS)) for key in attributes if key.startswith(_PARENTS)]
        if not generations:
            return set()
        return self._log.numbers_of(attributes[f"{_PARENTS}{max(generations)}"])


class _Seen:
    """Optuna's storage, of which only the trials in the window are seen at once."""

    def __init__(self, storage: Any, window: Window) -> None:
        self._storage = storage
        self._window = window

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials in the window."""
        found = [trial for trial in self._window.trials() if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)
