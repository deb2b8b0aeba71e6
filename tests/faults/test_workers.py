"""Workers of this machine that are killed, stopped, hang, raise or run out of memory; drivers that die with theirs."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.conftest import Tell
from tests.faults.crew import Crew, alive, assert_whole
from tests.faults.harness import MAX_TRIES, Forker, Run, until

_KILLS = int(os.environ.get("AUTOPRUNE_TESTS_KILLS", "200"))


@pytest.fixture
def crew(crew_forker: Forker, tmp_path: Path) -> Crew:
    return Crew(crew_forker, tmp_path / "under-fault", "crew")


def until_gone(crew: Crew) -> None:
    """Wait until no worker of a study is left, which may take seconds."""
    until(lambda: not alive(crew.workers), 5.0)


def test_what_a_worker_may_do_costs_its_trial_alone(crew: Crew, tell: Tell) -> None:
    """One study in which everything happens once, and then two workers are killed and the driver with them."""
    # The first evaluations are the dense network and baselines.
    wrong = ("raise", "nan", "inf", "memory", "data", "exit", "kill", "exit*")
    plan = ",".join(f"{what.rstrip('*')}@{n}{'*' * what.endswith('*')}" for n, what in enumerate(wrong, 13))
    run = crew.begin(plan=plan, budget="24trials")
    until(lambda: len(crew.told) >= 30)
    os.kill(alive(crew.workers)[0], signal.SIGKILL)
    time.sleep(0.1)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    until_gone(crew)
    assert "Traceback" not in run.said and "leaked" not in run.said, run.said
    run = crew.end()
    assert run.said == ""
    failures = Counter(r.failure_kind for r in crew.records if r.state == "failed")
    assert {kind: failures[kind] for kind in ("raised", "nan", "inf", "out-of-memory")} == {
        "raised": 1, "nan": 1, "inf": 1, "out-of-memory": 2,
    }  # fmt: skip
    assert failures["crashed"] <= 1  # none where the driver was killed in the last try
    assert 4 <= failures["worker-lost"] + failures["lost"] <= 7
    tell(assert_whole(crew), workers=len(crew.workers))
    until_gone(crew)


def test_a_worker_stopped_past_its_lease_and_one_that_hangs_are_killed(crew: Crew, tell: Tell) -> None:
    crew.end(plan="stop@12,hang@16", worker_lease_s=3.0, limit_s=4.0, budget="8trials")
    failures = Counter(r.failure_kind for r in crew.records if r.state == "failed")
    reasons = [r.failure_reason for r in crew.records if r.failure_kind == "worker-lost"]
    assert failures == {"worker-lost": 1, "hung": 1}
    assert "no sign of life for 3 s" in reasons[0]
    assert not alive(crew.workers)
    tell(assert_whole(crew), **failures)


@pytest.mark.parametrize(
    "how", ["twice", *(pytest.param(w, marks=pytest.mark.slow) for w in ("once", "term", "while it starts"))]
)
def test_an_end_that_was_asked_for_leaves_no_process_and_no_noise(crew: Crew, tell: Tell, how: str) -> None:
    run = crew.begin(workers=4, trial_s=1.0 if how == "twice" else 0.3, budget="8trials")
    if (
        how == "while it starts"
    ):  # the first beats have not come yet, and some workers import their first modules
        until(lambda: _children(run.pid) >= 3 or bool(crew.workers))
    else:
        until(lambda: len(crew.evaluations) >= 4)
    # To all, as a terminal does. The second has another number: two equal ones may count as one. It comes at once,
    # before trials are told of the first and end in order.
    os.killpg(run.pid, signal.SIGTERM if how == "term" else signal.SIGINT)
    if how == "twice":
        os.killpg(run.pid, signal.SIGTERM)
    assert run.wait() == 130, run.said
    assert run.said == "autoprune: interrupted; the same command again resumes\n"
    until_gone(crew)
    counts = assert_whole(crew, ended=False)
    kinds = Counter(r.failure_kind for r in crew.records)
    assert set(kinds) == ({"", "interrupted"} if how == "twice" else {""})
    assert [(r.number, r.origin, r.recipe is None) for r in crew.records if r.state == "running"] == []
    crew.end(trial_s=0.02)
    tell(assert_whole(crew), told_before=counts["told"], cut_off=kinds["interrupted"])


def _children(pid: int) -> int:
    return sum(
        int(place.read_text().rpartition(")")[2].split()[1]) == pid
        for place in Path("/proc").glob("[0-9]*/stat")
        if place.exists()
    )


@pytest.mark.parametrize(
    "what", ["raise", *(pytest.param(w, marks=pytest.mark.slow) for w in ("exit", "hang"))]
)
def test_a_storm_of_failures_ends_with_the_one_cause(crew: Crew, tell: Tell, what: str) -> None:
    run = crew.begin(
        plan=f"{what}@12+",
        budget="40trials",
        workers=1 if what == "hang" else 2,
        limit_s=1.0 if what == "hang" else 60.0,
    )
    assert run.wait() == 6, run.said
    kind = {"raise": "raised", "exit": "crashed", "hang": "hung"}[what]
    assert f"10 trials in a row failed alike ({kind})" in run.said
    assert "mend the cause and run the same command again" in run.said
    tries = Counter(crew.evaluations)
    assert max(tries.values()) == (MAX_TRIES if what == "exit" else 1)
    until_gone(crew)
    crew.end(plan="", budget="12trials")
    tell(assert_whole(crew), evaluations=len(crew.evaluations))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_workers_and_drivers_killed_at_random_times(crew_forker: Forker, tmp_path: Path, tell: Tell) -> None:
    """kill -9 of a worker, of several at once, of the driver, or SIGSTOP past the lease, ``_KILLS`` times in all."""
    chance = random.Random(0)
    total: Counter[str] = Counter()
    while total["kills"] + total["drivers"] + total["stops"] < _KILLS:
        total["studies"] += 1
        crew = Crew(crew_forker, tmp_path / str(total["studies"]), "crew")
        crew.prepared(workers=chance.choice((1, 2, 4)), trial_s=0.05, worker_lease_s=4.0, budget="30trials")
        for _ in range(4):
            run = crew.begin()
            ended = _harass(crew, run, chance, total)
            until_gone(crew)
            if ended == 0:
                break
            assert "Traceback" not in run.said and "leaked" not in run.said, run.said
            if crew.told:
                assert_whole(crew, ended=False)
        crew.end()
        counts = assert_whole(crew)
        total.update({key: counts[key] for key in ("trials", "told", "lost", "retried", "evaluations")})
    tell(total)


def _harass(crew: Crew, run: Run, chance: random.Random, total: Counter[str]) -> int:
    """Kill and stop workers at random times, and the driver in the end; return how it ended."""
    before = len(crew.workers)
    for _ in range(chance.randint(1, 5)):
        until(lambda: len(alive(crew.workers[before:])) > 0 or not alive([run.pid]))
        time.sleep(chance.uniform(0.0, 1.5))
        there = alive(crew.workers)
        what = chance.random()
        if not there:
            continue
        for pid in chance.sample(there, 1 if what < 0.8 else len(there)):
            stop = 0.7 < what < 0.8
            os.kill(pid, signal.SIGSTOP if stop else signal.SIGKILL)
            total["stops" if stop else "kills"] += 1
    if chance.random() < 0.6:
        time.sleep(chance.uniform(0.0, 1.0))
        if alive([run.pid]):
            total["drivers"] += 1
        run.kill()
    return run.wait()


@pytest.mark.slow
def test_the_kernel_kills_a_worker_that_eats_all_memory(crew: Crew, tell: Tell) -> None:
    crew.end(plan="group@13*", budget="6trials")
    failed = [r for r in crew.records if r.failure_kind in ("worker-lost", "crashed")]
    if any("exit code 5" in r.failure_reason for r in failed):
        pytest.skip("no control group of memory can be made here")
    assert [r.failure_kind for r in failed] == ["worker-lost"] * (MAX_TRIES - 1) + ["crashed"]
    assert all("the system was out of memory" in r.failure_reason for r in failed)
    tell(assert_whole(crew), kills=len(failed))


@pytest.mark.slow
def test_what_the_driver_says_of_workers_is_what_was_lost(crew: Crew) -> None:
    run = crew.end(plan="kill@12,exit@14", budget="5trials")
    assert json.loads(run.output.read_text())["lost"] == 2
