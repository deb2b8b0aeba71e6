"""What a worker does: requests done on a bench of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from autoprune.deploy.runtime import Artifact
from autoprune.errors import StorageError, TrialError
from autoprune.measure.quiet import training, working
from autoprune.search.bench import Bench, as_groups_say
from autoprune.search.executors.contract import Reference, Reply, Request, Setup
from autoprune.search.executors.exchange import Exchange
from autoprune.search.long_training import train_long
from autoprune.search.timings import Timings
from autoprune.search.trial import failures_as_trial_errors, run_trial
from autoprune.workloads.shipment import Shipment
from autoprune.workloads.shipping import load_shipped
from autoprune.workloads.workload import Workload


@dataclass(frozen=True)
class Given:
    """What a worker is made of.

    Attributes:
        setup: What its bench is built from.
        shipment: The driver's workload.
        exchange: How it reaches artifacts; None where it works in the driver's own folder.
        archive: Brings the archive of the data, for nodes that lack it; None where it is not shipped.
    """

    setup: Setup
    shipment: Shipment
    exchange: Exchange | None = None
    archive: Callable[[], bytes | Path] | None = None


def serve(given: Given) -> Callable[[Any, Callable[[], bool]], Reply | None]:
    """Return what does the requests of a study."""
    exchange = given.exchange
    if exchange is not None:
        exchange.check()
    prepare = partial(as_groups_say, groups=given.setup.groups)
    workload = load_shipped(given.shipment, prepare=prepare, archive=given.archive)
    bench = build_bench(given.setup, workload)

    def answer(request: Any, stopped: Callable[[], bool]) -> Reply | None:
        if isinstance(request, Reference):
            adopt(bench, request if exchange is None else exchange.reference(request))
            return None
        if exchange is None:
            return do(bench, request, stopped)
        try:
            with exchange.request(request) as own:
                reply = do(bench, own, stopped)
                if reply.failure is None and reply.fault is None:
                    exchange.hand_over(own, request)
                return reply
        except (StorageError, OSError) as error:
            return Reply(request.token, fault=str(error))

    return answer


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
        with training(stopped) as deadline:
            reply = _done(bench, request, deadline)
    except TrialError as error:
        reply = Reply(request.token, failure=(error.kind, error.reason))
    except OSError as error:
        reply = Reply(request.token, fault=str(error))
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
