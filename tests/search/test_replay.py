"""A default search that goes on decides as one does that was not interrupted, wherever it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from autoprune.config import Budget, StudyConfig
from autoprune.errors import StorageError
from autoprune.search.auto import AutoSearch
from autoprune.search.baselines import Baseline
from autoprune.search.outcome import Outcome
from autoprune.search.replay import in_order, keep_anchors, kept_anchors
from autoprune.space.recipe import Recipe
from autoprune.study.records import TrialRecord
from autoprune.study.retries import CUT_OFF
from autoprune.study.screens import Screen, read_screens
from tests.search.fakes import FakeTrials, make_measurement, make_options, make_scene
from tests.study.made import open_for_writing


@pytest.fixture(autouse=True)
def studies_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(tmp_path / "studies"))


class Killed(BaseException):
    """What ends a run at once."""


@dataclass
class Study:
    """A default search in runs that end by themselves or at a given screen or trial.

    Attributes:
        name: The study's name.
        trials: Its budget.
        screening: Whether proposals are screened.
        seconds: Its budget, instead of trials.
    """

    name: str
    trials: int
    screening: bool
    seconds: float | None = None

    def run(self, kill_at: int | None = None, trials: int | None = None) -> None:
        """Search until the budget is spent, or die at an evaluation: a screen or a training."""
        fields = {"model": "fake", "data": "fake", "study": self.name, "sampler": "auto", "front_points": 3}
        config = StudyConfig.model_validate({**fields, "auto": {"screening": self.screening}})
        budget = Budget(seconds=self.seconds) if self.seconds else Budget(trials=trials or self.trials)
        scene = make_scene(self.name, budget=budget, config=config, run=self.trial)
        self.scene, self.left = scene, kill_at
        options = make_options(scene.driver)

        def strategy(baselines: Sequence[Baseline]) -> None:
            AutoSearch(scene.driver, options, self.screen, config, scene.clock).run(baselines)

        try:
            scene.driver.search(lambda: 0.0, strategy)
        except Killed:
            pass
        finally:
            scene.store.release()

    def count(self) -> None:
        """Count an evaluation, which may be the last of this run."""
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed

    def screen(self, recipe: Recipe) -> float:
        """Lose what the trials lose and more; what of it training takes back differs from recipe to recipe."""
        self.count()
        self.scene.clock.advance(1.0)
        return (2 + len(recipe.model_dump_json()) % 7 / 7) * self.lost(recipe)

    def trial(self, recipe: Recipe, folder: Path, start: Path | None, number: int) -> Outcome:
        """Train for ten seconds."""
        self.count()
        return FakeTrials(self.scene.clock, self.scene.driver.groups)(recipe, folder, start, number)

    def lost(self, recipe: Recipe) -> float:
        return 0.9 - make_measurement(recipe, self.scene.driver.groups).search.value

    def found(self) -> tuple[list[object], list[object]]:
        """Return what was trained and what was screened, without trials that a kill cut off."""
        records = self.scene.store.records()
        recipes = {r.number: r.recipe for r in records}
        trained: list[object] = [
            (
                r.origin,
                r.label,
                r.rung,
                r.recipe,
                recipes.get(r.started_from if r.started_from is not None else -1),
            )
            for r in records
            if r.failure_kind not in CUT_OFF
        ]
        looked = [
            (s.arm, s.recipe, s.weights, s.lost, s.size_ratio, s.latency_ratio)
            for s in read_screens(self.scene.store.paths)
        ]
        return trained, list(looked)


@pytest.mark.parametrize(
    ("screening", "trials", "ends"), [(True, 12, (3, 9, 21, 34)), (False, 36, (1, 4, 11, 15))]
)
def test_whatever_ends_a_run_the_next_one_decides_alike(
    screening: bool, trials: int, ends: tuple[int, ...]
) -> None:
    whole = Study("whole", trials, screening)
    whole.run()
    cut = Study("cut", trials, screening)
    for end in ends:
        cut.run(kill_at=end)
    cut.run()
    assert cut.found() == whole.found()
    trained, screened = whole.found()
    assert len(trained) > trials and bool(screened) == screening
    origins = {row[0] for row in (trained if not screening else screened)}  # type: ignore[index]
    assert origins >= {"baseline", "solver", "weights", "moves"}, "an arm was not tried"
    lost = [r for r in cut.scene.store.records() if r.failure_kind in CUT_OFF]
    assert lost, "no trial was cut off"


@pytest.mark.parametrize(
    ("screening", "seconds", "expected"),
    [
        (True, 120.0, ["uniform 0.15", "uniform 0.15 int8", "uniform 0.3", "uniform 0.3 int8"]),
        (False, 600.0, ["uniform 0.15", "uniform 0.15 int8", "uniform 0.3 int8"]),
        (False, 120.0, ["uniform 0.15", "uniform 0.15 int8"]),
    ],
)
def test_of_the_baselines_a_run_that_goes_on_tries_those_that_one_run_would_have(
    screening: bool, seconds: float, expected: list[str]
) -> None:
    """Under a budget of time: how many fit is asked anew for each, not for each run, and two are tried at least."""

    def baselines(study: Study) -> list[str]:
        screens, records = read_screens(study.scene.store.paths), study.scene.store.records()
        if screening:
            return [screen.label for screen in screens if screen.arm == "baseline"]
        return [r.label for r in records if r.origin == "baseline" and r.recipe and r.recipe.prunes]

    whole, cut = (Study(name, 0, screening, seconds) for name in ("whole", "cut"))
    whole.run()
    for _ in range(3):
        cut.run(kill_at=2)
    cut.run()
    assert sorted(set(baselines(cut))) == sorted(set(baselines(whole))) == expected


def test_a_larger_budget_goes_on_as_if_it_had_been_given_at_once() -> None:
    whole, steps = Study("whole", 30, False), Study("steps", 30, False)
    whole.run()
    for trials in (1, 6, 7, 19, 30):
        steps.run(trials=trials)
    assert steps.found() == whole.found()


def test_events_come_in_the_order_of_their_ends() -> None:
    looked = {
        "recipe": Recipe(),
        "arm": "a",
        "lost": 0.0,
        "size_ratio": 1.0,
        "latency_ratio": 1.0,
        "duration_s": 1.0,
    }
    screens = [Screen.model_validate({**looked, "ended_s": end_s}) for end_s in (3.0, 8.0)]
    made = {"recipe": Recipe(), "origin": "solver", "rung": 1}
    records = [
        TrialRecord(number=0, state="complete", **{**made, "origin": "dense"}),  # type: ignore[arg-type]
        TrialRecord(number=1, state="failed", failure_kind="lost", **made),  # type: ignore[arg-type]
        TrialRecord(number=2, state="complete", ended_s=9.0, **made),  # type: ignore[arg-type]
        TrialRecord(number=3, state="complete", ended_s=5.0, **made),  # type: ignore[arg-type]
        TrialRecord(number=4, state="running", **made),  # type: ignore[arg-type]
        TrialRecord(number=5, state="complete", ended_s=9.5, fidelity="final", **made),  # type: ignore[arg-type]
        TrialRecord(number=6, state="failed", ended_s=1.0, **{**made, "rung": 0}),  # type: ignore[arg-type]
        TrialRecord(number=7, state="complete", ended_s=9.6, **{**made, "recipe": None}),  # type: ignore[arg-type]
    ]
    found = [e.number if isinstance(e, TrialRecord) else e.ended_s for e in in_order(screens, records)]
    # Of what a kill cut off no end is known.
    assert found == [3.0, 3, 8.0, 2, 1]


def test_the_seconds_of_a_run_that_was_killed_count_to_the_last_thing_that_ended() -> None:
    study = Study("spent", 12, True)
    study.run(kill_at=45)
    screens = read_screens(study.scene.store.paths)
    assert screens[-1].ended_s > study.scene.store.spent_s
    study.run(kill_at=0)
    assert study.scene.driver.keeper.spent_s == screens[-1].ended_s


def test_anchors_are_kept_for_their_round() -> None:

    store = open_for_writing("anchors")
    assert kept_anchors(store) is None
    keep_anchors(store, [])
    assert kept_anchors(store) == []
    keep_anchors(store, [np.array([1, 2]), np.array([3, 0])])
    assert [row.tolist() for row in kept_anchors(store) or []] == [[1, 2], [3, 0]]
    store.end_round(5.0, "1h")
    assert kept_anchors(store) is None
    store.note("anchors:2", "[[1, null]]")
    with pytest.raises(StorageError, match="is damaged: its anchors"):
        kept_anchors(store)
    store.release()
