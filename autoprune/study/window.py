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
from autoprune.study.trial_log import TrialLog

# More of them make proposals slow, not better.
MOST = 1000
# How NSGA-II names the parents of a generation among the study's attributes; it looks for them among the trials.
_PARENTS = "NSGAIISampler:parent:"


class Window:
    """Keeps the latest trials of a study, those on its fronts, and the parents of NSGA-II's latest generation.

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
        latest = range(max(0, len(records) - self._most), len(records))
        wanted = set(latest)
        if latest.start:
            wanted |= self._fronts.numbers() | self._parents()
        self._trials = {number: trial for number, trial in self._trials.items() if number in wanted}
        unread = {n for n in wanted if n not in self._trials or not self._trials[n].state.is_finished()}
        newer = {n for n in unread if n >= latest.start}
        # What is missing at the end is read as a range, however much it is; the few others by their numbers.
        above = min(newer, default=len(records)) - 1
        for trial in self._read(unread, self._log.id_of(above)):
            if trial.number in wanted:
                self._trials[trial.number] = trial
        return [self._trials[number] for number in sorted(self._trials)]

    def _read(self, numbers: set[int], above: int) -> list[FrozenTrial]:
        if not numbers:
            return []
        ids = {self._log.id_of(number) for number in numbers}
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
