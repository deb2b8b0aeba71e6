"""One search with so many workers, and what share of their time was work."""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sleeping
from clockwork import Clockwork

from autoprune.clock import Clock, SystemClock
from autoprune.config import Budget, StudyConfig
from autoprune.execution import Execution
from autoprune.naming import StudyPaths
from autoprune.search.auto import AutoSearch
from autoprune.search.baselines import Baseline
from autoprune.search.budget import Timekeeper
from autoprune.search.driver import Driver
from autoprune.search.events import Progress, WorkerState
from autoprune.search.executors.contract import Executor, Request
from autoprune.search.executors.limits import RequestLimits
from autoprune.search.executors.local import LocalExecutor, seats
from autoprune.search.interrupt import Interrupt
from autoprune.search.outcome import Outcome
from autoprune.space.recipe import Recipe
from autoprune.study.store import StudyStore
from tests.search.fakes import FakeBench, make_options
from tests.study.large import GROUPS, SPACE, fill, measured

# So long at most does a trial run, and
_LIMIT_S = 600.0
# workers start.
_START_S = 300.0
# Share of a processor that a sleeping trial asks Ray for.
_RAY_CPUS = 0.05


class Sleepers:
    """Workers on a simulated clock.

    Args:
        size: How many.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._tokens = itertools.count()

    def adopt_dense(self, reference: object) -> None:
        """Nothing is measured."""

    def next_token(self) -> int:
        """Return a number that no other request has."""
        return next(self._tokens)

    def run(self, request: Request) -> Any:
        """The clock's sleep is the trial."""
        raise NotImplementedError

    def states(self) -> tuple[WorkerState, ...]:
        """Return as many states as real workers have."""
        return tuple(WorkerState(f"worker {n}", "here", "idle", 0.0, 1.0) for n in range(self.size))

    def stop(self) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """Nothing runs."""


@dataclass
class Trials:
    """Trials that sleep, and when they did.

    Attributes:
        clock: Whose seconds count.
        seconds: What a trial takes; baselines take none, and are not counted.
        executor: Who really sleeps; None for the simulated clock.
        work: Begin and end of every trial's sleep.
        phase: The driver's.
        from_s: When the driver began to propose.
    """

    clock: Clock
    seconds: float
    executor: Executor | None = None
    work: list[tuple[float, float]] = field(default_factory=list)
    phase: str = "baselines"
    from_s: float = 0.0

    def hear(self, progress: Progress) -> None:
        """Take note of how far the search is."""
        if progress.phase == "baselines":
            self.from_s = self.clock.monotonic()
        self.phase = progress.phase

    def __call__(self, recipe: Recipe, folder: Path, start: Path | None, number: int) -> Outcome:
        """Do a trial; see :data:`~autoprune.search.jobs.TrialFunction`."""
        steps = recipe.recovery.finetune_steps
        outcome = Outcome(measured(recipe, number), steps, steps)
        if self.phase == "baselines":
            (folder / "model.onnx").write_bytes(b"model")
            return outcome
        if isinstance(self.clock, Clockwork):
            self.clock.sleep(self.seconds)
            (folder / "model.onnx").write_bytes(b"model")
        elif self.executor is not None:
            token = self.executor.next_token()
            self.executor.run(Request(token, "trial", f"trial {number}", recipe, folder, start))
        end_s = self.clock.monotonic()
        self.work.append((end_s - self.seconds, end_s))
        return outcome


def one(kind: str, sampler: str, workers: int, each: int, before: int, seconds: float) -> dict[str, Any]:
    """Run one search and return what is told of it.

    Args:
        kind: ``simulated``, ``local`` or ``ray``.
        sampler: Who proposes.
        workers: How many trials run side by side.
        each: Proposals for each worker.
        before: Trials that the study has before.
        seconds: What a trial takes.
    """
    name = "scaling"
    settings = {"model": "fake", "data": "fake", "study": name, "sampler": sampler}
    config = StudyConfig.model_validate({**settings, "auto": {"screening": False}})
    store = StudyStore.create_or_resume(config, StudyPaths.of(name))
    fill(store, before)
    clock: Clock = Clockwork() if kind == "simulated" else SystemClock()
    trials = Trials(clock, seconds)
    begun_s = time.monotonic()
    with started(kind, workers, seconds) as executor:
        trials.executor = executor
        start_s = time.monotonic() - begun_s
        # The first trial of a study that was filled is the dense network, which is no proposal.
        count = max(0, before - 1) + workers * each
        driver = Driver(
            store, SPACE,
            FakeBench(GROUPS, config),  # type: ignore[arg-type]
            Timekeeper(Budget(trials=count), config.final_share, clock),
            Interrupt(), trials.hear, clock,
            run=trials, adopt_dense=lambda record: None, executor=executor,
        )  # fmt: skip
        strategy = default_search(driver, config, clock) if sampler == "auto" else None
        with clock.driving(driver.lanes) if isinstance(clock, Clockwork) else nothing():
            begun_s, cpu_s = time.monotonic(), time.process_time()
            driver.search(lambda: 0.0, strategy)
            real_s, cpu_s = time.monotonic() - begun_s, time.process_time() - cpu_s
        end_s = clock.monotonic()
    store.release()
    return {
        "kind": kind, "sampler": sampler, "workers": workers, "before": before, "trials": len(trials.work),
        "start_s": round(start_s, 2),
        "seconds": round(end_s - trials.from_s, 2),
        **shares(trials.work, workers, trials.from_s, end_s),
        "driver_ms": round(1000 * cpu_s / max(1, len(trials.work)), 1),
        "real_s": round(real_s, 2),
        "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }  # fmt: skip


def shares(
    work: Sequence[tuple[float, float]], workers: int, from_s: float, end_s: float
) -> dict[str, float]:
    """Return which share of the workers' time was work: of all, and of that in which there was work for all of them.

    Args:
        work: Begin and end of every trial.
        workers: How many there are.
        from_s: When the driver began to propose.
        end_s: When its last trial was recorded.
    """
    begins = sorted(begin for begin, _ in work)
    first_s, last_s = begins[min(workers, len(begins)) - 1], begins[-1]
    done_s = sum(max(0.0, min(end, last_s) - max(begin, first_s)) for begin, end in work)
    whole_s = sum(end - begin for begin, end in work)
    return {
        "efficiency": round(whole_s / (workers * (end_s - from_s)), 4),
        "steady": round(done_s / max(workers * (last_s - first_s), 1e-9), 4),
    }


def default_search(driver: Driver, config: StudyConfig, clock: Clock) -> Callable[[Sequence[Baseline]], None]:
    """Return the default search over a made-up profile, every proposal of which is a trial."""

    def screen(recipe: Recipe) -> float:
        raise AssertionError("nothing is screened")

    def strategy(baselines: Sequence[Baseline]) -> None:
        AutoSearch(driver, make_options(driver), screen, config, clock).run(baselines)

    return strategy


@contextmanager
def nothing() -> Iterator[None]:
    """Do nothing for the length of the block."""
    yield


@contextmanager
def started(kind: str, workers: int, seconds: float) -> Iterator[Executor]:
    """Run workers for the length of the block, which begins once all are ready."""
    if kind == "simulated":
        yield Sleepers(workers)
        return
    executor: Any = on_ray(workers, seconds) if kind == "ray" else here(workers, seconds)
    try:
        executor.start()
        if kind == "ray":
            until_s = time.monotonic() + _START_S
            while any(state.doing != "idle" for state in executor.states()):
                if time.monotonic() > until_s:
                    raise TimeoutError(f"of {workers} workers not all are ready")
                time.sleep(0.1)
        else:
            # A worker says that it is ready to whoever has a request for it.
            requests = [Request(executor.next_token(), "screen", "ready", Recipe()) for _ in range(workers)]
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(executor.run, requests))
        yield executor
    finally:
        executor.close()


def here(workers: int, seconds: float) -> LocalExecutor:
    """Return workers of this machine."""
    return LocalExecutor(seconds, seats(workers), RequestLimits(lambda: None, _LIMIT_S), serve=sleeping.serve)


def on_ray(workers: int, seconds: float) -> Any:
    """Return workers of a Ray that is started here."""
    import tempfile

    from autoprune.search.executors.ray import RayExecutor
    from autoprune.search.executors.ray_start import connect

    execution = Execution(engine="ray", workers=workers, cpus_per_trial=_RAY_CPUS)
    started_here = connect(execution, "latency:none")
    return RayExecutor(
        seconds,
        execution,
        "scaling",
        tempfile.mkdtemp(prefix="autoprune-ray-"),
        RequestLimits(lambda: None, _LIMIT_S),
        resource=None,
        started_here=started_here,
        serve=sleeping.serve,
    )
