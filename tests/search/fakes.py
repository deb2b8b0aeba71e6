"""A synthetic study: trials whose figures follow from the recipe, on a clock that the trials move."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from autoprune.clock import Clock, FakeClock
from autoprune.config import Budget, StudyConfig
from autoprune.errors import TrialError
from autoprune.naming import StudyPaths
from autoprune.search.budget import Timekeeper
from autoprune.search.driver import Driver
from autoprune.search.events import Progress
from autoprune.search.executors.contract import Executor
from autoprune.search.interrupt import Interrupt
from autoprune.search.jobs import TrialFunction
from autoprune.search.outcome import Outcome
from autoprune.search.timings import Timings
from autoprune.space.groups import Groups
from autoprune.space.recipe import Recipe
from autoprune.space.space_files import load_space
from autoprune.study.store import StudyStore
from tests.study.made import make_groups, make_measurement

__all__ = ["FakeBench", "FakeTrials", "Scene", "make_groups", "make_measurement", "make_scene"]


@dataclass
class FakeTrials:
    """Stands in for real trials: moves the clock, writes a file, and fails where it is told to."""

    clock: FakeClock
    groups: Groups
    duration_s: float = 10.0
    fail_from: int | None = None
    interrupt: Interrupt | None = None
    interrupt_at: int | None = None
    seen: list[Recipe] = field(default_factory=list)

    def __call__(self, recipe: Recipe, folder: Path, start: Path | None = None, number: int = 0) -> Outcome:
        self.seen.append(recipe)
        self.clock.advance(self.duration_s)
        if self.fail_from is not None and len(self.seen) > self.fail_from:
            raise TrialError("nan", "the loss became NaN")
        (folder / "model.onnx").write_bytes(b"model")
        if self.interrupt is not None and len(self.seen) == self.interrupt_at:
            self.interrupt.requested = True
        steps = recipe.recovery.finetune_steps
        return Outcome(make_measurement(recipe, self.groups), steps, steps)


@dataclass
class FakeBench:
    """The part of a bench that the driver reads."""

    groups: Groups
    config: StudyConfig
    timings: Timings = field(default_factory=Timings)


@dataclass
class Scene:
    """A driver with everything around it faked but the study's record."""

    driver: Driver
    trials: FakeTrials
    store: StudyStore
    clock: FakeClock
    events: list[Progress]


def make_scene(
    name: str,
    *,
    budget: Budget,
    config: StudyConfig | None = None,
    groups: Groups | None = None,
    executor: Executor | None = None,
    run: TrialFunction | None = None,
    clock: Clock | None = None,
    **trials: object,
) -> Scene:
    """Open or resume the study ``name`` with fake trials, or with those of ``run`` beside each other."""
    config = config or StudyConfig(model="fake", data="fake", study=name, space="default", sampler="tpe")
    fake_clock = FakeClock()
    groups = groups or make_groups()
    store = StudyStore.create_or_resume(config, StudyPaths.of(name))
    keeper = Timekeeper(budget, config.final_share, clock or fake_clock, store.spent_s)
    interrupt = Interrupt()
    fake = FakeTrials(fake_clock, groups, interrupt=interrupt, **trials)  # type: ignore[arg-type]
    events: list[Progress] = []
    driver = Driver(
        store,
        load_space(config.space),
        FakeBench(groups, config),  # type: ignore[arg-type]
        keeper,
        interrupt,
        events.append,
        clock or fake_clock,
        run=run or fake,
        adopt_dense=lambda record: None,
        executor=executor,
    )
    return Scene(driver, fake, store, fake_clock, events)
