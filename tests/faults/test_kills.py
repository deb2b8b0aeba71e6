"""kill -9 of the driver: at every named moment, and at random times."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Tell
from tests.faults.harness import Forker, Study, assert_intact

# In the order in which a study passes them.
MOMENTS = (
    "study:settings", "study:database", "trial:asked", "trial:begun", "trial:compressed", "trial:exported",
    "trial:scored", "trial:measured", "trial:committed", "trial:told", "final:recovered",
    "final:committed", "final:told", "round:over", "round:budget", "round:told",
)  # fmt: skip
AUTO_MOMENTS = ("profile:written", "screen:written", "trial:measured", "final:told", "report:written")
_KILLS = int(os.environ.get("AUTOPRUNE_TESTS_KILLS", "200"))


def test_a_kill_at_every_moment_loses_doubles_and_tears_nothing(study: Study, tell: Tell) -> None:
    study.final_share = 0.3  # so that there is time to train however busy the machine is
    for moment in MOMENTS:
        run = study.run(fault=f"{moment}=kill")
        assert run.wait() == -signal.SIGKILL, f"{moment} was not reached: {run.said}"
    study.finish()
    tell(assert_intact(study), kills=len(MOMENTS))


@pytest.mark.slow
def test_the_default_search_is_killed_between_its_files(study: Study, tell: Tell) -> None:
    study.sampler = "auto"
    for moment in AUTO_MOMENTS:
        run = study.run(fault=f"{moment}=kill")
        assert run.wait() == -signal.SIGKILL, f"{moment} was not reached: {run.said}"
    study.finish()
    tell(assert_intact(study), kills=len(AUTO_MOMENTS))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("times", [2, 3])
def test_a_kill_at_every_later_moment(forker: Forker, tmp_path: Path, tell: Tell, times: int) -> None:
    kills = 0
    for number, moment in enumerate(MOMENTS):
        study = Study(forker, tmp_path / f"{number}", budget="3trials")
        kills += study.run(fault=f"{moment}@{times}=kill").wait() == -signal.SIGKILL
        study.finish()
        assert_intact(study)
    assert kills >= 10
    tell(kills=kills)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_at_random_times(forker: Forker, tmp_path: Path, tell: Tell) -> None:
    moments = random.Random(0)
    kills = studies = trials = told = 0
    while kills < _KILLS:
        studies += 1
        sampler = ("tpe", "auto", "grid", "random", "nsga2")[studies % 5]
        study = Study(forker, tmp_path / f"{studies}", budget="6trials", sampler=sampler)
        longest = 0.0
        for _ in range(12):
            run = study.start()
            begun = time.monotonic()
            time.sleep(moments.uniform(0.05, 0.6 + 0.2 * longest))
            run.kill()
            if run.wait() == 0:
                break
            longest = min(5.0, max(longest, time.monotonic() - begun) + 0.5)
            kills += 1
            if study.paths.database.is_file() and study.paths.settings.is_file() and study.told:
                assert_intact(study, ended=False)
        study.finish()
        counts = assert_intact(study)
        trials += counts["trials"]
        told += counts["told"]
    tell(kills=kills, studies=studies, trials=trials, told=told)
