"""A team of fake workers: threads that sleep for a trial, watch that none does what another does, and fail as told."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

from autoprune.errors import TrialError
from autoprune.search.baselines import effective_key
from autoprune.search.events import WorkerState
from autoprune.search.executors.contract import INTERRUPTED, Reference, Reply, Request
from autoprune.search.outcome import Outcome
from autoprune.space.groups import Groups
from autoprune.space.recipe import Recipe
from tests.study.made import make_measurement

# So long at most do trials wait for each other.
_TOGETHER_S = 20.0


class Team:
    """Stands in for an executor, and for the trials that its workers do.

    Args:
        size: Workers.
        groups: Groups of the model.
        seconds: Returns how long a trial takes, by its number.
        fails: Returns the kind of failure of a trial, by its number and recipe; empty for none.
        together: Trials from this number on wait until all workers have one, once; so that how fast this machine is
            decides nothing.
    """

    def __init__(
        self,
        size: int,
        groups: Groups,
        seconds: Callable[[int], float] = lambda number: 0.002 * (1 + number % 3),
        fails: Callable[[int, Recipe], str] = lambda number, recipe: "",
        together: int | None = None,
    ) -> None:
        self.size = size
        self.groups = groups
        self.seconds = seconds
        self.fails = fails
        self.begun: list[str] = []
        self.seen: list[Recipe] = []
        self.doubled: list[str] = []
        self.together = together
        self.all_at_once = threading.Event()
        self.stopped = threading.Event()
        self._running: set[str] = set()
        self._lock = threading.Lock()
        self._tokens = itertools.count()

    def trial(self, recipe: Recipe, folder: Path, start: Path | None, number: int) -> Outcome:
        """Do a trial; see :data:`~autoprune.search.jobs.TrialFunction`."""
        key = f"{effective_key(recipe, self.groups)} {recipe.recovery.finetune_steps}"
        with self._lock:
            if key in self._running:
                self.doubled.append(key)
            self._running.add(key)
            self.begun.append(key)
            self.seen.append(recipe)
            if len(self._running) == self.size and self._waits(number):
                self.all_at_once.set()
        try:
            if self._waits(number):
                self.all_at_once.wait(_TOGETHER_S)
            if self.stopped.wait(self.seconds(number)):
                raise TrialError(INTERRUPTED, "stopped at once")
            kind = self.fails(number, recipe)
            if kind:
                raise TrialError(kind, "as told")
            if start is not None and not (start / "model.onnx").is_file():
                raise TrialError("raised", "the network to start from is gone")
            (folder / "model.onnx").write_bytes(b"model")
        finally:
            with self._lock:
                self._running.discard(key)
        steps = recipe.recovery.finetune_steps
        return Outcome(make_measurement(recipe, self.groups), steps, steps)

    def _waits(self, number: int) -> bool:
        return self.together is not None and number >= self.together

    def screen(self, recipe: Recipe) -> float:
        """Return what a recipe loses at a screen."""
        time.sleep(0.002)
        return 3 * (0.9 - make_measurement(recipe, self.groups).search.value)

    def running(self) -> set[str]:
        """Return the networks that are being evaluated."""
        with self._lock:
            return {key.rpartition(" ")[0] for key in self._running}

    # -- what a driver asks of an executor -----------------------------------------------------

    def adopt_dense(self, reference: Reference) -> None:
        """Nothing is measured."""

    def run(self, request: Request) -> Reply:
        """The driver has its trials done by :meth:`trial`."""
        raise AssertionError("not asked for")

    def next_token(self) -> int:
        """Return a number that no other request has."""
        return next(self._tokens)

    def states(self) -> tuple[WorkerState, ...]:
        """Return what each worker does, in short."""
        return tuple(WorkerState(f"worker {n}", "here", "idle", 0.0, 1.0) for n in range(self.size))

    def stop(self) -> None:
        """End all trials at once."""
        self.stopped.set()

    def close(self) -> None:
        """There are no processes."""
