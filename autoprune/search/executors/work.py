"""What a worker does: requests done on a bench of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from autoprune.deploy.runtime import Artifact
from autoprune.errors import TrialError
from autoprune.measure.quiet import working
from autoprune.search.bench import Bench
from autoprune.search.executors.contract import Reference, Reply, Request, Setup
from autoprune.search.long_training import train_long
from autoprune.search.timings import Timings
from autoprune.search.trial import failures_as_trial_errors, run_trial
from autoprune.workloads.workload import Workload


def build_bench(setup: Setup, workload: Workload) -> Bench:
    """Return a worker's bench, which gives what the driver's would."""
    with working():
        return Bench.build(
            setup.config,
            workload,
            setup.groups,
            gradients=setup.gradients,
            by_gradient=setup.by_gradient,
        )


def adopt(bench: Bench, reference: Reference) -> None:
    """Take the dense network's artifact as what candidates are measured against."""
    measured = reference.measurement
    path = reference.folder / bench.model_file
    bench.dense = Artifact(path, measured.executed, measured.parity_error)


def do(bench: Bench, request: Request, stopped: Callable[[], bool]) -> Reply:
    """Do what is asked and return what came of it; only what a trial cannot be blamed for is raised.

    Args:
        bench: The worker's.
        request: What is asked.
        stopped: Returns whether the driver wants training to end.
    """
    bench.timings = Timings()
    try:
        with working() as gate:

            def deadline() -> bool:
                gate.give_way()
                return stopped()

            reply = _done(bench, request, deadline)
    except TrialError as error:
        reply = Reply(request.token, failure=(error.kind, error.reason))
    except OSError as error:
        reply = Reply(request.token, fault=f"{error}")
    return replace(reply, timings=bench.timings.seconds())


def _done(bench: Bench, request: Request, deadline: Callable[[], bool]) -> Reply:
    if request.kind == "screen":
        with failures_as_trial_errors():
            score = bench.screened(request.recipe, request.examples).value
        return Reply(request.token, score=score)
    if request.folder is None:
        raise ValueError(f"a request of kind {request.kind!r} needs a folder")
    if request.kind == "trial":
        outcome = run_trial(bench, request.recipe, request.folder, deadline=deadline, start=request.start)
        return Reply(request.token, outcome=outcome)
    with failures_as_trial_errors():
        steps = train_long(
            bench,
            request.recipe,
            request.folder,
            own=request.own,
            line=request.start,
            recovery=request.recovery or request.recipe.recovery,
            slot_s=request.slot_s,
            start_step=request.start_step,
            stop=deadline,
        )
    return Reply(request.token, steps=steps)
