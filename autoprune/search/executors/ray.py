"""Workers on a Ray cluster: Ray Tune keeps as many as are wanted, wherever there is room."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from autoprune.errors import TrialError, WorkerError, first_line
from autoprune.execution import Execution
from autoprune.search.events import WorkerState
from autoprune.search.executors.contract import HUNG, INTERRUPTED, Reference, Reply, Request
from autoprune.search.executors.limits import RequestLimits
from autoprune.search.executors.ray_start import NAMESPACE
from autoprune.search.executors.seating import Seating
from autoprune.search.executors.worker import serve_bench

# Seconds without a sign of life after which a worker counts as lost; its late reply is refused.
LEASE_S = 60.0
_COLLECT_S = 1.0
_LOOK_S = 0.2
_CLOSE_S = 20.0
_MEASURERS_S = 120.0
# A worker that nobody hears of for so long, and no other that is ready, end the search.
_NOBODY_S = 900.0
_GO_ON = "the finished trials are kept; run the same command again"
_LOUD = ("ray.tune", "ray.tune.execution.tune_controller", "ray.tune.tune", "ray.air")
_log = logging.getLogger(__name__)


class RayExecutor:
    """Runs requests on a Ray cluster that :func:`connect` connected to.

    Args:
        given: What workers are made of.
        execution: Where trials run.
        name: Name of the study.
        storage: Folder or URL that all nodes reach, for Ray's own files.
        limits: How long requests may take.
        resource: Resource that nodes offer which measure; None measures where the trial runs.
        started_here: Whether Ray is to be shut down with this.
        serve: Makes what answers requests in the worker.
        lease_s: Seconds without a sign of life after which a worker is given up.
    """

    def __init__(
        self,
        given: Any,
        execution: Execution,
        name: str,
        storage: str,
        limits: RequestLimits,
        *,
        resource: str | None,
        started_here: bool,
        serve: Callable[[Any], Callable[[Any, Any], Any]] = serve_bench,
        lease_s: float = LEASE_S,
    ) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from autoprune.search.executors.ray_worker import Desk

        self._execution, self._storage = execution, storage
        self._limits, self._resource = limits, resource
        self._started_here, self._serve = started_here, serve
        self.size = execution.workers or self._room()
        self._tokens = itertools.count()
        self._seating = Seating(self.size, lease_s, self._dismiss, self._fail)
        self._failure: WorkerError | None = None
        self._ended = threading.Event()
        self._ending = threading.Event()
        self._desk_name = f"desk-{name}-{secrets.token_hex(4)}"
        # On the driver's own node: any other may be lost without the search.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        desk = ray.remote(Desk).options(
            name=self._desk_name, num_cpus=0, max_concurrency=4096, scheduling_strategy=here
        )
        self._desk = desk.remote([ray.put(given)])
        self._measurers: list[Any] = []
        self._tuner: threading.Thread | None = None

    def _room(self) -> int:
        """Return how many trials fit into the cluster as it is now."""
        import ray

        total = ray.cluster_resources()
        fit = [total.get("CPU", 0.0) / self._execution.cpus]
        if self._execution.gpus:
            fit.append(total.get("GPU", 0.0) / self._execution.gpus)
        return max(1, int(min(fit)))

    def start(self) -> None:
        """Let the measuring nodes be found, and workers be started.

        Raises:
            WorkerError: If no node offers the target's device.
        """
        import ray

        from autoprune.search.executors.ray_worker import measure_there

        self._check_room()
        if self._resource is not None:
            self._measurers, int8_bits = self._start_measurers(self._resource)
            ray.get(self._desk.let_measure.remote(self._measurers, int8_bits))
            measure_there(self._measurers, int8_bits)  # the driver's own measurements too
        threading.Thread(target=self._listen, daemon=True).start()
        self._tuner = threading.Thread(target=self._tune, daemon=True)
        self._tuner.start()

    def _check_room(self) -> None:
        import ray

        cpus, gpus = self._execution.cpus, self._execution.gpus
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(n.get("CPU", 0.0) >= cpus and n.get("GPU", 0.0) >= gpus for n in nodes):
            _log.warning(
                "no node has %g processors and %g GPUs free for one trial yet; waiting for one that joins",
                cpus,
                gpus,
            )

    def _start_measurers(self, resource: str) -> tuple[list[Any], dict[str, int]]:
        """Return who measures, and the bits that int8 kernels add up rightly there."""
        import ray

        from autoprune.search.executors.ray_worker import Measurer

        count = int(ray.cluster_resources().get(resource, 0.0))
        if count < 1:
            raise WorkerError(
                f"no node of the cluster offers {resource!r}, where latency would be measured",
                f"start the node that has the target's device with --resources='{{\"{resource}\": 1}}'",
            )
        made = ray.remote(Measurer).options(
            num_cpus=0, resources={resource: 1}, max_restarts=-1, max_task_retries=1
        )
        found = [made.remote() for _ in range(count)]
        taken = WorkerError(
            f"{resource!r} of the cluster is taken: another search measures there",
            "wait for it, or start another node that offers it",
        )
        silent = WorkerError(
            f"a node that offers {resource!r} did not say within {_MEASURERS_S:g} s how its int8 kernels add",
            "see what else it does, or start the cluster without this resource on it",
        )
        hosts = _answers([each.host.remote() for each in found], resource, taken)
        (int8_bits,) = _answers([found[0].int8_bits.remote()], resource, silent)
        kinds = [(host["processor"], host["usable_cores"]) for host in hosts]
        alike = [each for each, kind in zip(found, kinds, strict=True) if kind == kinds[0]]
        for each, kind in zip(found, kinds, strict=True):
            if kind != kinds[0]:
                _log.warning("a measuring node is left out: %s is not %s", kind, kinds[0])
                ray.kill(each)
        return alike, int8_bits

    def _tune(self) -> None:
        """Keep the seats occupied until the desk lets them go."""
        from ray import tune

        from autoprune.search.executors.ray_worker import Seat

        execution = self._execution
        resources: dict[str, float] = {"cpu": execution.cpus}
        if execution.gpus:
            resources["gpu"] = execution.gpus
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(self.size)
        for name in _LOUD:  # a worker that is lost is told by us
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            tune.Tuner(
                tune.with_resources(Seat, resources),
                param_space={
                    "seat": tune.grid_search(list(range(self.size))),
                    "desk": self._desk_name,
                    "namespace": NAMESPACE,
                    "serve": self._serve,
                },
                tune_config=tune.TuneConfig(num_samples=1, max_concurrent_trials=None),
                run_config=tune.RunConfig(
                    name=f"ray-{self._desk_name}",
                    storage_path=self._storage,
                    failure_config=tune.FailureConfig(max_failures=-1),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    verbose=0,
                ),
            ).fit()
        except Exception as error:  # whatever Ray raises ends the study in order
            if not self._ended.is_set():
                self._fail(WorkerError(f"Ray Tune ended: {first_line(error)}", _GO_ON))
        else:
            if not self._ended.is_set():
                self._fail(WorkerError("Ray Tune let its workers go", _GO_ON))

    # -- requests ----------------------------------------------------------------------------

    def adopt_dense(self, reference: Reference) -> None:
        """Tell the workers what candidates are measured against."""
        import ray

        ray.get(self._desk.refer.remote(replace(reference, folder=reference.folder.absolute())))

    def next_token(self) -> int:
        """Return a number that no other request has."""
        return next(self._tokens)

    def run(self, request: Request) -> Reply:
        """Lay a request on the desk and wait for what comes of it; see :class:`Executor`."""
        import ray

        waiting = self._seating.wait_for(request.token, request.name)
        limit_s: float | None = None
        laid_s = time.monotonic()
        try:
            ray.get(self._desk.lay.remote(_anywhere(request)))
            while True:
                with suppress(queue.Empty):
                    answer = waiting.answers.get(timeout=_LOOK_S)
                    if isinstance(answer, TrialError):
                        raise answer
                    self._limits.took(request, time.monotonic() - (waiting.taken_s or time.monotonic()))
                    return answer.check()
                if self._failure is not None:
                    raise self._failure
                if self._ended.is_set():
                    raise TrialError(INTERRUPTED, "stopped at once")
                if waiting.taken_s is None:
                    self._check_anybody(request, laid_s)
                    continue
                limit_s = self._limits.of(request) if limit_s is None else limit_s
                if time.monotonic() - waiting.taken_s > limit_s:
                    self._seating.give_up(request.token)
                    raise TrialError(HUNG, f"ran longer than {limit_s:.0f} s")
        except ray.exceptions.RayError as error:
            raise _gone(error) from error
        finally:
            self._seating.forget(request.token)

    def _check_anybody(self, request: Request, laid_s: float) -> None:
        """End the wait for a worker where none is to come.

        Raises:
            TrialError: If the search is to end, or nobody took the request for long.
        """
        import ray

        if self._ending.is_set():
            ray.get(self._desk.withdraw.remote(request.token))
            raise TrialError(INTERRUPTED, "the search was asked to end before a worker was free")
        waited_s = time.monotonic() - max(laid_s, self._seating.last_ready_s)
        if waited_s > _NOBODY_S and not self._seating.is_anybody_ready():
            self._fail(
                WorkerError(
                    f"no worker has been ready for {_NOBODY_S / 60:.0f} minutes",
                    "see `ray status`: trials may want more than any node has; the same command goes on",
                )
            )

    def _dismiss(self, seat: int, node: str) -> None:
        self._desk.dismiss.remote(seat, node)

    # -- what workers say --------------------------------------------------------------------

    def _listen(self) -> None:
        import ray

        while not self._ended.is_set():
            try:
                events = ray.get(self._desk.collect.remote(_COLLECT_S))
            except ray.exceptions.RayError as error:
                self._fail(_gone(error))
                return
            self._seating.hear(events)

    def _fail(self, error: WorkerError) -> None:
        self._failure = self._failure or error

    @property
    def refused(self) -> int:
        """Replies that came after their request was given up."""
        return self._seating.refused

    def states(self) -> tuple[WorkerState, ...]:
        """Return what each worker does now."""
        return self._seating.states()

    # -- ending ------------------------------------------------------------------------------

    def ask_to_end(self) -> None:
        """Let trainings end in order, and begin nothing more."""
        import ray

        self._ending.set()
        with suppress(ray.exceptions.RayError):
            ray.get(self._desk.ask_to_end.remote(at_once=False))

    def stop(self) -> None:
        """End all that runs at once."""
        self._ended.set()

    def close(self) -> None:
        """Let all workers go, and Ray too where it was started here."""
        import ray

        from autoprune.deploy.saturation import also_run_elsewhere
        from autoprune.measure.process import measure_elsewhere

        self._ended.set()
        measure_elsewhere(None)
        also_run_elsewhere({})
        with suppress(ray.exceptions.RayError):
            ray.get(self._desk.ask_to_end.remote(at_once=True), timeout=_CLOSE_S)
        if self._tuner is not None:
            self._tuner.join(_CLOSE_S)
        for actor in (*self._measurers, self._desk):
            with suppress(ray.exceptions.RayError):
                ray.kill(actor)
        if self._started_here:
            ray.shutdown()


def _answers(asked: list[Any], resource: str, late: WorkerError) -> list[dict[str, Any]]:
    """Return what measuring nodes answer.

    Raises:
        WorkerError: If one cannot answer; ``late`` if one does not in time.
    """
    import ray

    try:
        found: list[dict[str, Any]] = ray.get(asked, timeout=_MEASURERS_S)
    except ray.exceptions.GetTimeoutError:
        raise late from None
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        # Ray's own texts begin with who failed and end with why.
        why = (str(cause).strip().splitlines() or [""])[-1].strip()
        raise WorkerError(
            f"a node that offers {resource!r} cannot measure: {type(cause).__name__}: {why:.300}",
            "it needs the packages of this machine: mend it, or start the cluster without this resource on it",
        ) from error
    return found


def _gone(error: Exception) -> WorkerError:
    """Return what ends a search whose cluster cannot be reached any more."""
    cause = first_line(error)[:200]
    return WorkerError(f"the Ray cluster is gone: {cause}", _GO_ON)


def _anywhere(request: Request) -> Request:
    """Return a request whose folders mean the same in whatever folder a worker runs."""
    folder, start, own = (
        None if each is None else each.absolute() for each in (request.folder, request.start, request.own)
    )
    return replace(request, folder=folder, start=start, own=own)
