"""Trials that raise, give no number, run out of memory, hang, or end the interpreter."""

from __future__ import annotations

import signal

import pytest

from autoprune.study.front import front_points
from tests.faults.conftest import Tell
from tests.faults.harness import MAX_TRIES, Study, assert_intact, until

# What goes wrong, and the kind and a part of the reason that are recorded.
WRONG = (
    ("raise", "raised", "RuntimeError: the kernel has no such shape"),
    ("nan", "nan", "latency ratio is nan"),
    ("inf", "inf", "latency ratio is inf"),
    ("-inf", "inf", "latency ratio is -inf"),
    ("memory", "out-of-memory", "a list of the trial"),
    ("real-memory", "out-of-memory", ""),
    ("sys.exit", "raised", "it asked to end the program (SystemExit: 3)"),
)


def test_what_a_trial_may_do_is_recorded_and_the_search_goes_on(study: Study, tell: Tell) -> None:
    study.budget = f"{len(WRONG) + 1}trials"  # the last one is good
    # The first four evaluations are the dense network and baselines.
    plan = ",".join(f"{what}@{number}" for number, (what, _, _) in enumerate(WRONG, 5))
    study.finish(trials=plan, setups=[("memory_limit", [1 << 30])])
    failed = [r for r in study.records if r.state == "failed"]
    assert [r.failure_kind for r in failed] == [kind for _, kind, _ in WRONG]
    for record, (_, _, reason) in zip(failed, WRONG, strict=True):
        assert reason in record.failure_reason
        assert record.measurement is None
    on_front = {r.parent for r in study.records if r.fidelity == "final"}
    assert not on_front & {r.number for r in failed}
    assert {p.record.parent for p in front_points(study.store())} <= on_front
    tell(assert_intact(study), failed=len(failed))


@pytest.mark.parametrize(
    "what", ["exit", *(pytest.param(w, marks=pytest.mark.slow) for w in ("crash", "hang"))]
)
def test_a_trial_that_takes_the_process_along_is_tried_at_most_twice_more(
    study: Study, tell: Tell, what: str
) -> None:
    runs = 0
    for runs in range(1, MAX_TRIES + 2):
        run = study.start(trials=f"{what}@5*")
        if what == "hang" and runs <= MAX_TRIES:  # one process cannot end it: the user does
            until(lambda: len(study.evaluations) == 4 + runs)  # noqa: B023
            run.kill()
        if run.wait() == 0:
            break
    assert runs == MAX_TRIES + 1
    records = study.records
    lost = [r for r in records if r.failure_kind == "lost"]
    assert len(lost) == MAX_TRIES
    assert all("killed" in r.failure_reason and r.measurement is None for r in lost)
    tell(assert_intact(study), runs=runs)


@pytest.mark.slow
def test_a_baseline_that_takes_the_process_along_does_not_stop_the_study(study: Study, tell: Tell) -> None:
    codes = [study.run(trials="exit@3*").wait() for _ in range(MAX_TRIES + 1)]
    assert codes == [7] * MAX_TRIES + [0]
    tell(assert_intact(study))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["raise", "nan"])
def test_a_storm_of_failures_ends_with_the_one_cause(study: Study, tell: Tell, what: str) -> None:
    study.budget = "30trials"
    run = study.run(trials=f"{what}@5+")
    assert run.wait() == 6, run.said
    failed = [r for r in study.records if r.state == "failed"]
    assert len(failed) == 10
    last = run.said.strip().splitlines()[-2:]
    assert "10 trials in a row failed alike" in last[0]
    assert {"raise": "the kernel has no such shape", "nan": "latency ratio is nan"}[what] in last[0]
    assert "mend the cause and run the same command again" in last[1]
    study.budget = "12trials"
    study.finish()
    tell(assert_intact(study), failed=len(failed))


@pytest.mark.slow
def test_the_kernel_kills_a_trial_that_eats_all_memory(study: Study, tell: Tell) -> None:
    codes = []
    for _ in range(MAX_TRIES + 1):
        run = study.run(trials="real-memory@5*", setups=[("memory_group", [1 << 30])])
        if "no memory group" in run.said:
            pytest.skip("no control group of memory can be made here")
        codes.append(run.wait())
    assert codes == [-signal.SIGKILL] * MAX_TRIES + [0]
    tell(assert_intact(study), kills=MAX_TRIES)
