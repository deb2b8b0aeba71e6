"""Resumed studies: they do not work twice, and propose what a study proposes that was not interrupted."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from autoprune.space.groups import Groups
from tests.faults.conftest import Tell
from tests.faults.crew import Crew, assert_whole
from tests.faults.harness import Forker, Study, assert_intact, key_of

# Where runs are killed: before a proposal is recorded, in the middle of one, and after it was told.
FAULTS = ("trial:asked@6", "trial:scored@2", "trial:told@2", "trial:committed@1")
AUTO_FAULTS = ("profile:written@1", "screen:written@5", "trial:scored@1", "trial:told@1", "screen:written@3")


def searched(study: Study) -> list[tuple[Any, ...]]:
    """Return what a study proposed and found, without trials that a kill cut off."""
    store = study.store()
    groups = Groups.model_validate_json(store.notes()["groups"])
    return [
        (r.origin, r.label, r.rung, key_of(r, groups), r.measurement.search.value, r.measurement.size_bytes)
        for r in store.records()
        if r.fidelity == "search" and r.failure_kind != "lost" and r.measurement is not None
    ]


def interrupted(study: Study, faults: Sequence[str]) -> int:
    kills = 0
    for fault in faults:
        kills += study.run(fault=f"{fault}=kill").wait() == -signal.SIGKILL
    study.finish()
    return kills


@pytest.mark.parametrize(
    "sampler",
    ["tpe", "auto", *(pytest.param(s, marks=pytest.mark.slow) for s in ("random", "grid", "nsga2"))],
)
def test_an_interrupted_search_proposes_what_an_uninterrupted_one_does(
    forker: Forker, tmp_path: Path, tell: Tell, sampler: str
) -> None:
    # TPE models what it found from its tenth trial on.
    budget = "3trials" if sampler == "auto" else "9trials"
    whole, cut = (Study(forker, tmp_path / name, budget=budget, sampler=sampler) for name in ("whole", "cut"))
    whole.finish()
    kills = interrupted(cut, AUTO_FAULTS if sampler == "auto" else FAULTS)
    assert kills >= 2
    counts = assert_intact(cut)
    assert searched(cut) == searched(whole)
    # A kill costs the trial that it cuts off and nothing else.
    assert len(cut.evaluations) <= len(whole.evaluations) + kills
    if sampler not in ("auto", "grid"):  # of whose few trials here a kill is much
        assert len(cut.evaluations) <= 1.2 * len(whole.evaluations)
    tell(counts, kills=kills, evaluations=len(cut.evaluations), uninterrupted=len(whole.evaluations))


@pytest.mark.parametrize("way", ["forwards", pytest.param("backwards", marks=pytest.mark.slow)])
def test_a_clock_that_jumps_by_a_day_changes_nothing(
    forker: Forker, tmp_path: Path, tell: Tell, way: str
) -> None:
    if forker.shim is None:
        pytest.skip("no C compiler to build what lets the clock jump")
    calm, study = (Study(forker, tmp_path / name, budget="2trials", sampler="random") for name in ("a", "b"))
    calm.finish()
    study.finish(trials=f"{way}@4")
    counts = assert_intact(study)
    assert searched(study) == searched(calm)
    store = study.store()
    started = [t.datetime_start.timestamp() for t in store._study.trials if t.datetime_start]
    assert abs(started[-1] - started[0]) > 80_000, "the clock did not jump"
    assert 0 < store.spent_s < 600
    ends = [r.ended_s for r in store.records()]
    assert ends == sorted(ends)
    assert all(0 <= r.duration_s < 600 for r in store.records())
    tell(counts)


@pytest.mark.slow
def test_a_budget_of_time_is_kept_when_the_clock_jumps(study: Study, tell: Tell) -> None:
    if study.forker.shim is None:
        pytest.skip("no C compiler to build what lets the clock jump")
    study.budget = "20s"
    study.sampler = "random"
    study.finish(trials="forwards@4")
    counts = assert_intact(study)
    # Proposals were made, as there was time; a wall clock would have said that it was over.
    assert sum(r.origin == "random" for r in study.records) >= 3
    tell(counts)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_resumed_runs_take_at_most_a_fifth_longer(crew_forker: Forker, tmp_path: Path, tell: Tell) -> None:
    seconds = []
    # So much work that beginning again, which takes a second or two, is no more of it than in a search of an hour.
    for name, moments in (("whole", ()), ("cut", ("trial:told@15", "trial:committed@15"))):
        crew = Crew(crew_forker, tmp_path / name, "crew").prepared(workers=1, trial_s=0.8, budget="30trials")
        begun = time.monotonic()
        for moment in moments:
            crew.environment = {"AUTOPRUNE_FAULT": f"{moment}=kill"}
            assert crew.begin().wait() == -signal.SIGKILL
        crew.environment = {}
        crew.end()
        seconds.append(time.monotonic() - begun)
        assert_whole(crew)
    assert seconds[1] <= 1.2 * seconds[0], seconds
    tell(ratio=round(seconds[1] / seconds[0], 3))
