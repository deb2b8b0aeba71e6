"""The executor of a crew on Ray, and what its workers do: labour, artifacts handed over, measurements elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autoprune.measure.process import run_worker
from autoprune.naming import StudyPaths
from autoprune.search.executors.contract import Reference, Reply, Request
from autoprune.search.executors.exchange import Exchange, Mark, MirroredExecutor
from autoprune.study.mirror import Mirror
from tests.faults import labour
from tests.faults.labour import Labour

RESOURCE = "latency:cpu"


@dataclass(frozen=True)
class Seated:
    """What workers on Ray are told.

    Attributes:
        labour: As workers of this machine are.
        exchange: How artifacts pass.
        measures: Whether each trial is measured.
    """

    labour: Labour
    exchange: Exchange
    measures: bool


def serve(given: Seated) -> Callable[[Any, Callable[[], bool]], Reply | None]:
    """Return what does the requests of a study."""
    given.exchange.check()
    answer = labour.serve(given.labour)

    def exchanged(request: Any, stopped: Callable[[], bool]) -> Reply | None:
        if isinstance(request, Reference):
            given.exchange.reference(request)
            return None
        with given.exchange.request(request) as own:
            reply = answer(own, stopped)
            if reply is not None and reply.failure is None:
                if given.measures:
                    measure(own)
                given.exchange.hand_over(own, request)
            return reply

    return exchanged


def measure(request: Request) -> None:
    """Let the measuring process run where measurements are done, with the model's file, and measure nothing."""
    assert request.folder is not None
    job = {"kind": "session", "target": {}, "jobs": [], "model": str(request.folder / labour.MODEL)}
    assert run_worker(job, 60.0) == {"results": []}


def make(shift: Any, given: Labour, config: Any, paths: StudyPaths) -> tuple[Any, Any]:
    """Return the executor on Ray, and the one to give requests to."""
    from autoprune.search.executors.limits import RequestLimits
    from autoprune.search.executors.ray import RayExecutor
    from autoprune.search.executors.ray_start import connect

    assert not connect(config.execution, RESOURCE)
    mirror = None if shift.artifacts is None else Mirror(shift.artifacts, paths.name)
    # A worker that is to exchange artifacts finds another content in the mark.
    mark = Mark.leave(paths) if mirror is None else Mark(Mark.leave(paths).path, "what-is-not-there")
    executor = RayExecutor(
        Seated(given, Exchange(mark, mirror), shift.measures),
        config.execution,
        paths.name,
        shift.artifacts or str(paths.root),
        RequestLimits(lambda: None, shift.limit_s),
        resource=RESOURCE if shift.measures else None,
        started_here=False,
        serve=serve,
        lease_s=shift.worker_lease_s,
    )
    return executor, executor if mirror is None else MirroredExecutor(executor, mirror, mark)
