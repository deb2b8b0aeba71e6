"""A cluster of several raylets whose parts die, join late, or are cut off; trials that are measured elsewhere."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from autoprune.search.baselines import effective_key
from tests.faults import labour
from tests.faults.conftest import Tell
from tests.faults.crew import Crew, alive, assert_whole
from tests.faults.harness import Forker, until
from tests.faults.raylets import Raylets, children

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture
def cluster() -> Iterator[Raylets]:
    made = Raylets()
    yield made
    made.close()


@pytest.fixture
def crew(crew_forker: Forker, tmp_path: Path) -> Crew:
    return Crew(crew_forker, tmp_path / "under-fault", "crew")


def join(crew: Crew, cluster: Raylets, **changes: object) -> Crew:
    return crew.prepared(ray=cluster.address, environment=cluster.environment, **changes)


def refused(output: str) -> int:
    return int(json.loads(output.strip().splitlines()[-1])["refused"])


def test_a_worker_and_a_raylet_are_killed_and_a_node_that_joins_late_is_used(
    crew: Crew, cluster: Raylets, tell: Tell
) -> None:
    first, second = cluster.add(), cluster.add()
    run = join(crew, cluster, workers=3, trial_s=0.5, budget="40trials", worker_lease_s=15.0).begin()
    until(lambda: len(crew.told) >= 4)
    assert len(alive(crew.workers)) == 2
    os.kill(alive(crew.workers)[0], signal.SIGKILL)
    until(lambda: len(alive(crew.workers)) == 2)
    own = set(children(second))
    os.kill(second, signal.SIGKILL)
    until(lambda: not alive([pid for pid in crew.workers if pid in own]), 60.0)
    third = cluster.add(cpus=2)
    until(lambda: len(set(children(third)) & set(alive(crew.workers))) == 2)
    until(lambda: len(set(children(first)) & set(alive(crew.workers))) == 1)
    assert run.wait() == 0, run.said
    counts = assert_whole(crew)
    assert 1 <= counts["retried"] <= 2
    until(lambda: not alive(crew.workers), 15.0)
    tell(counts)


def test_a_worker_stopped_past_its_lease_is_refused_and_replaced(
    crew: Crew, cluster: Raylets, tell: Tell
) -> None:
    cluster.add()
    run = join(crew, cluster, workers=1, plan="stop@12", budget="8trials", worker_lease_s=6.0).begin()
    until(lambda: len(crew.evaluations) >= 12)
    stopped = alive(crew.workers)[0]
    until(lambda: any(line.get("state") == "failed" for line in crew.lines))  # given up
    given_up = crew.evaluations[-1]
    os.kill(stopped, signal.SIGCONT)  # it replies late, or is told to leave before: another has its seat
    assert run.wait() == 0, run.said
    until(lambda: not alive([stopped]))
    assert len(crew.workers) == 2
    groups = labour.GROUPS
    states = [
        r.failure_kind for r in crew.records if r.recipe and effective_key(r.recipe, groups) == given_up
    ]
    assert states == ["worker-lost", ""]  # told lost once, and tried again by the other one
    tell(assert_whole(crew), refused=refused(run.output.read_text()))


def test_a_trial_that_hangs_does_not_keep_its_seat(crew: Crew, cluster: Raylets, tell: Tell) -> None:
    cluster.add()
    run = join(crew, cluster, workers=1, plan="hang@12", budget="4trials", limit_s=5.0).begin()
    assert run.wait() == 0, run.said
    assert [r.failure_kind for r in crew.records if r.state == "failed"] == ["hung"]
    tell(assert_whole(crew))


def test_workers_that_die_while_they_start_end_the_search(crew: Crew, cluster: Raylets, tell: Tell) -> None:
    cluster.add()
    run = join(crew, cluster, workers=1, plan="start@0").begin()
    assert run.wait() == 2
    assert "died 5 times in a row while they started" in run.said
    tell(starts=len(crew.workers))


def test_the_head_is_killed_and_the_same_command_goes_on_with_a_new_cluster(crew: Crew, tell: Tell) -> None:
    cluster = Raylets()
    try:
        cluster.add()
        # Without its head a cluster goes on for a minute, which a short search does not need.
        run = join(crew, cluster, workers=1, trial_s=0.5, budget="300trials").begin()
        until(lambda: len(crew.told) >= 4)
        cluster.kill_head()
        code = run.wait()
        assert code == 2, (code, run.said)
        assert "the Ray cluster is gone" in run.said
        assert "run the same command again" in run.said
    finally:
        cluster.close()
    assert_whole(crew, ended=False)
    cluster = Raylets()
    try:
        cluster.add(cpus=2)
        join(crew, cluster, workers=2, budget="20trials", trial_s=0.05).end()
    finally:
        cluster.close()
    tell(assert_whole(crew))


def test_trials_run_on_one_node_and_are_measured_on_another_that_shares_no_folder(
    crew: Crew, cluster: Raylets, tmp_path: Path, tell: Tell
) -> None:
    """The measuring process leaves its lock where its own node keeps locks."""
    locks = {name: tmp_path / name for name in ("trains", "measures")}
    cluster.add(environment={"AUTOPRUNE_LOCKS": str(locks["trains"])})
    cluster.add(cpus=0, environment={"AUTOPRUNE_LOCKS": str(locks["measures"])}, latency__cpu=1)
    storage = tmp_path / "storage"
    storage.mkdir()
    run = join(
        crew, cluster, workers=1, budget="3trials", measures=True, artifacts=str(storage), trial_s=0.05
    ).begin()
    assert run.wait() == 0, run.said
    assert (locks["measures"] / "autoprune-measure.lock").is_file()
    assert not (locks["trains"] / "autoprune-measure.lock").exists()
    counts = assert_whole(crew)
    kept = {
        place.name.removesuffix(".json") for place in (storage / crew.name / "artifacts").glob("trial-*.json")
    }
    assert kept == {place.name for place in crew.paths.artifacts.glob("trial-*")}
    assert not list((storage / crew.name / "artifacts").glob("inbox-*"))
    tell(counts, on_storage=len(kept))


@contextmanager
def namespace() -> Iterator[tuple[str, str, str, str]]:
    """Make a network of two addresses, one of them in a namespace; yield its name, the link and the addresses."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    own = secrets.token_hex(3)
    name, link, subnet = f"ap-{own}", f"ap{own}h", f"10.77.{secrets.randbelow(250)}"
    commands = [
        f"ip netns add {name}", f"ip link add {link} type veth peer name ap{own}n",
        f"ip link set ap{own}n netns {name}", f"ip addr add {subnet}.1/24 dev {link}", f"ip link set {link} up",
        f"ip -n {name} addr add {subnet}.2/24 dev ap{own}n", f"ip -n {name} link set ap{own}n up",
        f"ip -n {name} link set lo up",
    ]  # fmt: skip
    try:
        for command in commands:
            done = subprocess.run(command.split(), check=False, capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"no network namespace: {done.stderr.strip()}")
        yield name, link, f"{subnet}.1", f"{subnet}.2"
    finally:
        for command in (f"ip link del {link}", f"ip netns del {name}"):
            subprocess.run(command.split(), check=False, capture_output=True)


def test_a_node_that_is_cut_off_for_a_minute_costs_what_it_had_under_way(crew: Crew, tell: Tell) -> None:
    with namespace() as (name, link, here, there):
        cluster = Raylets(here)
        cluster.add()  # before the far one: of two nodes that start in the same moment one may not find itself
        words = ["ip", "netns", "exec", name, sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        words += [f"--address={cluster.address}", f"--node-ip-address={there}", "--num-cpus=1"]
        words += ["--object-store-memory=80000000", "--disable-usage-stats"]
        far = subprocess.Popen(
            words, env={**os.environ, **cluster.environment}, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            run = join(crew, cluster, workers=2, trial_s=2.0, budget="40trials", worker_lease_s=15.0).begin()
            until(lambda: len(alive(crew.workers)) == 2 and len(crew.told) >= 3)
            cut = set(children(far.pid)) & set(alive(crew.workers))
            assert len(cut) == 1
            subprocess.run(["ip", "link", "set", link, "down"], check=True)
            told = len(crew.told)
            time.sleep(60.0)
            subprocess.run(["ip", "link", "set", link, "up"], check=True)
            assert len(crew.told) >= told + 5  # the other one went on
            assert run.wait() == 0, run.said
            counts = assert_whole(crew)
            assert 1 <= counts["retried"] <= 2
            tell(counts, refused=refused(run.output.read_text()))
        finally:
            left = children(far.pid)
            for pid in [far.pid, *left]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            far.wait()
            cluster.close()
