"""Ray as a search starts or joins it, and what its workers are given."""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoprune.errors import UsageError, WorkerError
from autoprune.execution import Execution
from autoprune.naming import StudyPaths
from autoprune.search.executors.contract import Executor, Setup
from autoprune.search.executors.exchange import Exchange, Mark, MirroredExecutor
from autoprune.search.executors.limits import RequestLimits
from autoprune.search.executors.work import Given
from autoprune.study.mirror import Mirror
from autoprune.workloads.packing import DataPack, archive_bytes, pack_data
from autoprune.workloads.shipment import ship, shipped_data_word
from autoprune.workloads.workload import Workload

if TYPE_CHECKING:
    from autoprune.search.executors.ray import RayExecutor

NAMESPACE = "autoprune"
# Memory of the object store of a Ray that is started here; it holds the workload.
_STORE_BYTES = 1_000_000_000
_log = logging.getLogger(__name__)


def start_ray(
    setup: Setup,
    workload: Workload,
    given: Workload | None,
    limits: RequestLimits,
    paths: StudyPaths,
) -> tuple[RayExecutor, Executor]:
    """Connect to Ray and make the executor of a study.

    Args:
        setup: What workers build their bench from.
        workload: The dense network, trained, and its data.
        given: The workload of a user's own objects as it was given; None where model and data have names.
        limits: How long requests may take.
        paths: Where the study lies.

    Returns:
        The executor on Ray, which is to be started and closed, and the one to give requests to.

    Raises:
        WorkerError: If the cluster cannot be reached.
        UsageError: If the shared storage cannot be used.
    """
    from autoprune.search.executors.ray import RayExecutor

    config = setup.config
    execution = config.execution
    mirror = None if execution.artifacts is None else Mirror(execution.artifacts, paths.name)
    resource = f"latency:{config.target.device}"
    started_here = connect(execution, resource)
    import ray
    from ray import cloudpickle

    pack = None if execution.address is None else _pack(setup, workload)
    shipment = ship(workload, config, given=given, pack=pack, dumps=cloudpickle.dumps)
    archive = None
    if pack is not None:
        archive = Archive([ray.put(archive_bytes(pack, shipped_data_word(config)))])
    mark = Mark.leave(paths)
    made_of = Given(setup, shipment, Exchange(mark, mirror), archive)
    executor = RayExecutor(
        made_of,
        execution,
        paths.name,
        execution.artifacts or str(paths.root.absolute()),
        limits,
        resource=resource,
        started_here=started_here,
    )
    return executor, executor if mirror is None else MirroredExecutor(executor, mirror, mark)


def _pack(setup: Setup, workload: Workload) -> DataPack | None:
    """Return what of the data is shipped to nodes that lack it; nothing where it is too large."""
    try:
        return pack_data(shipped_data_word(setup.config), workload.data.fingerprint)
    except UsageError as error:
        _log.warning("data is not shipped: %s", error.message)
        return None


@dataclass(frozen=True)
class Archive:
    """The archive of the data, fetched by nodes that lack it.

    Attributes:
        where: Ray's reference to it, in a list, so that it is fetched only when called for.
    """

    where: list[Any]

    def __call__(self) -> bytes:
        """Return its content."""
        import ray

        content: bytes = ray.get(self.where[0])
        return content


def connect(execution: Execution, resource: str) -> bool:
    """Start Ray here, or join the cluster that the settings name.

    Ray that is started here listens on the loopback address and lets in who has its token, which is made for this run.

    Args:
        execution: Where trials run.
        resource: Resource of nodes that measure; this machine offers it where Ray is started here.

    Returns:
        Whether Ray was started here.

    Raises:
        WorkerError: If the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "0")
    # Tune writes what nobody reads, for every trial of its own.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # Its new output writes to the standard output, which is ours.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    here = execution.address is None
    if here:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # By this alone Ray takes the loopback address for the node's own: it replaces an explicit 127.0.0.1.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    elif os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        _log.warning(
            "joining a Ray cluster without token authentication: whoever reaches its ports can run code on it; "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH on every node"
        )
    import ray

    try:
        if here:
            ray.init(
                address="local",
                resources={resource: 1},
                include_dashboard=False,
                object_store_memory=_STORE_BYTES,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
            )
        else:
            ray.init(
                address=execution.address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # Ray raises whatever its layers raise
        where = "Ray cannot be started" if here else f"the Ray cluster {execution.address!r} cannot be joined"
        raise WorkerError(
            f"{where}: {str(error).strip().splitlines()[0][:300]}",
            "see `ray status` there; token, version of Ray and Python have to be the cluster's",
        ) from error
    return here
