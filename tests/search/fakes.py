"""A synthetic study: trials whose figures follow from the recipe, on a clock that the trials move."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from autoprune.clock import Clock, FakeClock
from autoprune.config import Budget, StudyConfig
from autoprune.errors import TrialError
from autoprune.naming import StudyPaths
from autoprune.search.budget import Timekeeper
from autoprune.search.cost_model import CostModel
from autoprune.search.driver import Driver
from autoprune.search.events import Progress
from autoprune.search.executors.contract import Executor
from autoprune.search.interrupt import Interrupt
from autoprune.search.jobs import TrialFunction
from autoprune.search.options import Options
from autoprune.search.outcome import Outcome
from autoprune.search.profile import CutLoss, Design, Profile
from autoprune.search.replay import spent_s
from autoprune.search.timings import Timings
from autoprune.space.groups import Groups
from autoprune.space.recipe import Recipe
from autoprune.space.shapes import AxisUse, LayerShape
from autoprune.space.space_files import load_space
from autoprune.study.store import StudyStore
from tests.study.made import make_groups, make_measurement

__all__ = [
    "FakeBench",
    "FakeTrials",
    "Scene",
    "make_groups",
    "make_measurement",
    "make_options",
    "make_scene",
]


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
    keeper = Timekeeper(budget, config.final_share, clock or fake_clock, spent_s(store))
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


def make_options(driver: Driver) -> Options:
    """Return options whose predicted costs are about those of the fake trials."""
    groups: Groups = driver.groups
    space = driver.space
    cuts = [
        CutLoss(group=g.name, kept=k, criterion="activation", growth=(1 - k / g.size) ** 2, measured=True)
        for g in groups.prunable
        for k in range(0, g.size, 4)
    ]
    shapes = tuple(
        LayerShape(
            name=g.name,
            group=g.name,
            weights=9 * g.size * g.size,
            outputs=g.size,
            inputs=g.size,
            makes=(AxisUse(group=g.name, share=1 / g.size, units=g.size),),
            reads=(),
            read_elements=100,
        )
        for g in groups.groups
    )
    designs = []
    for bits in (32, 8):
        size = sum(s.weights * bits / 8 for s in shapes) + 6000
        designs.append(
            Design(
                kept={g.name: g.size for g in groups.groups},
                bits=dict.fromkeys((g.name for g in groups.groups), bits),
                layer_s={s.name: s.weights * bits * 1e-9 for s in shapes},
                size_bytes=round(size),
                latency_ratio=0.5 + bits / 64,
            )
        )
    profile = Profile(dense_loss=0.2, examples=100, cuts=tuple(cuts), designs=tuple(designs), shapes=shapes)
    return Options(profile, groups, space, CostModel(shapes, designs))
