"""Workers on a Ray that is started here: what they do, lose and refuse; and where Ray listens."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoprune.errors import TrialError, WorkerError
from autoprune.execution import Execution
from autoprune.search.executors.contract import Reply, Request
from autoprune.search.executors.limits import RequestLimits
from autoprune.search.executors.ray import RayExecutor, _answers
from autoprune.search.executors.ray_start import connect
from autoprune.space.recipe import Recipe
from tests.search.executors.serving import serve

RESOURCE = "latency:cpu"
pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Execution]:
    execution = Execution(engine="ray", workers=2, cpus_per_trial=0.5)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
            patch.delenv(name, raising=False)
        assert connect(execution, RESOURCE)
        yield execution
        import ray

        ray.shutdown()


@pytest.fixture(scope="module")
def pair(cluster: Execution, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayExecutor]:
    executor = make_executor(cluster, tmp_path_factory.mktemp("ray"))
    executor.start()
    yield executor
    executor.close()


def make_executor(
    execution: Execution, folder: Path, resource: str | None = None, given: str = ""
) -> RayExecutor:
    return RayExecutor(
        given,
        execution,
        "s",
        str(folder),
        RequestLimits(lambda: None, 60.0),
        resource=resource,
        started_here=False,
        serve=serve,
        lease_s=15.0,
    )


def ask(executor: RayExecutor, name: str) -> Reply:
    return executor.run(Request(executor.next_token(), "screen", name, Recipe()))


def test_ray_listens_on_the_loopback_address_alone_and_asks_for_a_token(cluster: Execution) -> None:
    import ray

    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_seats_do_requests_and_a_lost_worker_costs_one_and_is_replaced(pair: RayExecutor) -> None:
    assert ask(pair, "where").score
    with pytest.raises(TrialError) as caught:
        ask(pair, "kill")
    assert caught.value.kind == "worker-lost"
    assert [ask(pair, "where").score is not None for _ in range(4)] == [True] * 4
    assert sum(state.lost for state in pair.states()) == 1


def test_a_worker_that_was_stopped_past_its_lease_is_ended_when_it_wakes(pair: RayExecutor) -> None:
    lost = sum(state.lost for state in pair.states())
    with pytest.raises(TrialError, match="no sign of life") as caught:
        ask(pair, "stop")
    assert caught.value.kind == "worker-lost"
    pid = int(caught.value.reason.partition(":")[2].split()[0])
    os.kill(pid, signal.SIGCONT)
    # Whatever it asks for now, it gets nothing, and another worker has its seat.
    assert [ask(pair, "where").score != pid for _ in range(6)] == [True] * 6
    deadline = time.monotonic() + 30.0
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(f"/proc/{pid}").exists()
    assert sum(state.lost for state in pair.states()) == lost + 1


def test_failures_of_trials_keep_their_kind(pair: RayExecutor) -> None:
    with pytest.raises(TrialError, match="NaN") as caught:
        ask(pair, "fail")
    assert caught.value.kind == "nan"


def test_without_a_measuring_node_the_search_does_not_begin(cluster: Execution, tmp_path: Path) -> None:
    executor = make_executor(cluster, tmp_path, resource="latency:cuda")
    with pytest.raises(WorkerError, match="no node of the cluster offers 'latency:cuda'") as caught:
        executor.start()
    assert "--resources" in caught.value.hint


def test_why_a_node_cannot_measure_is_told(cluster: Execution, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def broken() -> None:
        raise ModuleNotFoundError("No module named 'it'")

    late = WorkerError("late")
    asked = [ray.remote(broken).options(num_cpus=0.1).remote()]
    with pytest.raises(WorkerError) as caught:
        _answers(asked, RESOURCE, late)
    assert caught.value.message == (
        "a node that offers 'latency:cpu' cannot measure: ModuleNotFoundError: No module named 'it'"
    )
    assert "start the cluster without this resource on it" in caught.value.hint
    monkeypatch.setattr("autoprune.search.executors.ray._MEASURERS_S", 0.2)
    asleep = ray.remote(lambda: time.sleep(5.0)).options(num_cpus=0.1).remote()
    with pytest.raises(WorkerError) as caught:
        _answers([asleep], RESOURCE, late)
    assert caught.value is late


def test_a_worker_that_cannot_start_ends_the_search_with_the_reason(
    cluster: Execution, tmp_path: Path
) -> None:
    executor = make_executor(cluster, tmp_path, given="raise")
    executor.start()
    try:
        with pytest.raises(WorkerError, match="cannot start: RuntimeError: the data is not there"):
            ask(executor, "where")
    finally:
        executor.close()
