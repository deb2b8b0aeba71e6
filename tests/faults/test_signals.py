"""Ctrl-C once and twice, SIGTERM with notice, a terminal that goes away, and two drivers on one study."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Tell
from tests.faults.harness import Study, assert_intact, until


@pytest.mark.parametrize("name", ["int", pytest.param("term", marks=pytest.mark.slow)])
def test_once_ends_in_order(study: Study, tell: Tell, name: str) -> None:
    run = study.run(fault=f"trial:compressed@3={name}")
    assert run.wait() == 130, run.said
    assert "interrupted; the same command again resumes" in run.said
    records = study.records
    # The trial that was under way is finished and told.
    assert [r.state for r in records] == ["complete"] * 3
    assert len(study.told) == 3
    assert study.paths.report.is_file()
    study.finish()
    tell(assert_intact(study))


def test_twice_stops_now_and_stays_consistent(study: Study, tell: Tell) -> None:
    study.final_share = 0.3
    run = study.run(fault="trial:exported@2=int,trial:scored@2=int")
    assert run.wait() == 130, run.said
    kinds = [r.failure_kind for r in study.records]
    assert kinds == ["", "interrupted"]
    assert_intact(study, ended=False)
    run = study.run(fault="final:recovered=int,final:committed=int")
    assert run.wait() == 130, run.said
    study.finish()
    tell(assert_intact(study))


@pytest.mark.slow
def test_once_in_the_final_phase_keeps_what_was_trained(study: Study, tell: Tell) -> None:
    study.final_share = 0.3
    run = study.run(fault="final:recovered=term")
    assert run.wait() == 130, run.said
    kept = list(study.paths.artifacts.glob("trial-*-recovered1"))
    assert len(kept) == 1
    before = study.steps
    run = study.finish()
    assert_intact(study)
    tell(steps_before=before, steps=study.steps)


@pytest.mark.parametrize("first_ends", ["in order", pytest.param("killed", marks=pytest.mark.slow)])
def test_a_second_driver_is_refused_and_the_first_unharmed(study: Study, tell: Tell, first_ends: str) -> None:
    first = study.start(fault="trial:scored@2=stop")
    until(lambda: len(study.told) == 1 and "trial 1" in first.said)
    second = study.run()
    assert second.wait() == 4
    assert "is being run by another process" in second.said
    assert "--study NAME" in second.said
    assert study.run("--fresh").wait() == 4
    until(lambda: _stopped(first.pid))
    if first_ends == "killed":
        first.kill()
        assert first.wait() == -signal.SIGKILL
        study.finish()
    else:
        first.kill(signal.SIGCONT)
        assert first.wait() == 0, first.said
    tell(assert_intact(study), refused=2)


def _stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
