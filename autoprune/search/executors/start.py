"""Executors by a study's settings, and trials as a driver hands them to one."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from autoprune.errors import TrialError
from autoprune.naming import StudyPaths
from autoprune.search.bench import Bench
from autoprune.search.budget import Timekeeper
from autoprune.search.executors.contract import CRASHED, WORKER_LOST, Executor, Reference, Request, Setup
from autoprune.search.executors.limits import RequestLimits
from autoprune.search.executors.local import LocalExecutor, seats
from autoprune.search.executors.ray import RayExecutor
from autoprune.search.executors.work import Given
from autoprune.search.interrupt import Interrupt
from autoprune.search.outcome import Outcome
from autoprune.space.recipe import Recipe
from autoprune.study.records import TrialRecord
from autoprune.study.retries import MAX_RETRIES
from autoprune.workloads.shipment import Shipment, ship
from autoprune.workloads.workload import Workload

_LOOK_S = 0.2
_SCREEN_TRIES = MAX_RETRIES + 1


@contextmanager
def started_executor(
    setup: Setup,
    workload: Workload,
    given: Workload | None,
    keeper: Timekeeper,
    interrupt: Interrupt,
    *,
    paths: StudyPaths,
) -> Iterator[Executor | None]:
    """Run a study's workers for the length of the block; None where its trials run in the driver's own process.

    Args:
        setup: What workers build their bench from.
        workload: The dense network, trained, and its data.
        given: The workload of a user's own objects as it was given; None where model and data have names.
        keeper: The budget.
        interrupt: Whether the user asked to end; trainings are then told to.
        paths: Where the study lies.
    """
    execution = setup.config.execution
    limits = RequestLimits(lambda: keeper.left_s, execution.trial_limit_s)

    if execution.engine == "local" and execution.workers is None:
        yield None
        return
    if execution.engine == "local":
        executor: LocalExecutor | RayExecutor = _local(
            setup, ship(workload, setup.config, given=given), limits
        )
        outer: Executor = executor
    else:
        from autoprune.search.executors.ray_start import start_ray

        executor, outer = start_ray(setup, workload, given, limits, paths)
    with running(executor, interrupt):
        yield outer


@contextmanager
def running(executor: LocalExecutor | RayExecutor, interrupt: Interrupt) -> Iterator[None]:
    """Keep an executor's workers for the length of the block; tell them when the user asks to end."""
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(interrupt, over, executor.ask_to_end), daemon=True)
    watch.start()
    try:
        executor.start()
        yield
    finally:
        over.set()
        executor.close()


def _local(setup: Setup, shipment: Shipment, limits: RequestLimits) -> LocalExecutor:
    # Of those that this process may use: the names in its own variable, which may be other numbers or UUIDs.
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [word.strip() for word in named.split(",") if word.strip()]
    gpus = (names or [str(number) for number in range(torch.cuda.device_count())])[
        : torch.cuda.device_count()
    ]
    return LocalExecutor(Given(setup, shipment), seats(setup.config.execution.workers or 1, gpus), limits)


def _watch(interrupt: Interrupt, over: threading.Event, ask_to_end: Callable[[], None]) -> None:
    """Pass on to the workers that the user asked to end."""
    while not over.wait(_LOOK_S):
        if interrupt():
            ask_to_end()
            return


class WorkerTrials:
    """Trials and screens as a driver asks for them, done by workers.

    Args:
        executor: Who has the workers.
        bench: The driver's, which gets the workers' timings.
        paths: Where the study lies.
    """

    def __init__(self, executor: Executor, bench: Bench, paths: StudyPaths) -> None:
        self.executor = executor
        self.bench = bench
        self.paths = paths

    def run(self, recipe: Recipe, folder: Path, start: Path | None, number: int) -> Outcome:
        """Evaluate a recipe in a worker; see :func:`~autoprune.search.trial.run_trial`."""
        token = self.executor.next_token()
        request = Request(token, "trial", f"trial {number}", recipe, folder, start)
        reply = self.executor.run(request)
        self.bench.timings.add(reply.timings)
        if reply.outcome is None:
            raise ValueError("the reply to a trial holds no outcome")
        return reply.outcome

    def screen(self, recipe: Recipe, examples: int | None) -> float:
        """Return the capability of a recipe after closed-form recovery alone; tried again where a worker is lost."""
        for left in reversed(range(_SCREEN_TRIES)):
            request = Request(self.executor.next_token(), "screen", "screen", recipe, examples=examples)
            try:
                score = self.executor.run(request).score
            except TrialError as error:
                if error.kind == WORKER_LOST and not left:
                    raise TrialError(CRASHED, f"{error.reason}; tried {_SCREEN_TRIES} times") from error
                if error.kind != WORKER_LOST:
                    raise
                continue
            return math.nan if score is None else score
        raise AssertionError("the last try returns or raises")

    def adopt_dense(self, record: TrialRecord) -> None:
        """Take the dense trial's artifact as the reference, here and in all workers."""
        folder = self.paths.artifact(record.number)
        self.bench.adopt_dense(folder, record)
        if record.measurement is not None:
            self.executor.adopt_dense(Reference(folder, record.measurement))
