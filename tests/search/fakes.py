"""A synthetic study: trials whose figures follow from the recipe, on a clock that the trials move."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from autoprune.clock import FakeClock
from autoprune.config import Budget, StudyConfig
from autoprune.errors import TrialError
from autoprune.measure.record import Capability, Executed, Latency, Measurement
from autoprune.naming import StudyPaths
from autoprune.search.budget import Timekeeper
from autoprune.search.driver import Driver
from autoprune.search.events import Progress
from autoprune.search.interrupt import Interrupt
from autoprune.search.outcome import Outcome
from autoprune.search.timings import Timings
from autoprune.space.groups import Group, Groups, Member
from autoprune.space.recipe import Recipe
from autoprune.space.space_files import load_space
from autoprune.study.store import StudyStore


def make_groups(sizes: tuple[int, ...] = (32, 64, 64)) -> Groups:
    """Return prunable groups and one that is left alone."""
    groups = [
        Group(
            name=f"conv{i}",
            type="conv",
            size=size,
            members=(
                Member(layer=f"conv{i}", kind="conv", axis="out", index_map=tuple((u,) for u in range(size))),
                Member(layer=f"next{i}", kind="conv", axis="in", index_map=tuple((u,) for u in range(size))),
            ),
            prunable=True,
        )
        for i, size in enumerate(sizes)
    ]
    head = Group(
        name="head",
        type="linear",
        size=10,
        members=(Member(layer="head", kind="linear", axis="out", index_map=tuple((u,) for u in range(10))),),
        prunable=False,
        reason="makes the outputs of the network",
    )
    return Groups(groups=(*groups, head), input_shape=(3, 8, 8))


def make_measurement(recipe: Recipe, groups: Groups, *, report: bool = False) -> Measurement:
    """Return figures that fall and rise with what the recipe removes."""
    removed = sum(recipe.choice(g.name).ratio for g in groups.prunable) / max(1, len(groups.prunable))
    bits = sum(recipe.choice(g.name).bits for g in groups.groups) / len(groups.groups)
    accuracy = 0.9 - 0.4 * removed**2 - 0.01 * (32 - bits) / 24
    ratio = (1 - 0.8 * removed) * (0.5 + 0.5 * bits / 32)
    size = int(1_000_000 * (1 - 0.9 * removed) * bits / 32)
    capability = Capability(
        name="accuracy", value=accuracy, ci=(accuracy - 0.01, accuracy + 0.01), examples=1000
    )
    return Measurement(
        search=capability,
        report=capability if report else None,
        latency=Latency(
            latency_ms=ratio,
            latency_p95_ms=None,
            dense_ms=1.0,
            ratio=ratio,
            ratio_ci=(ratio, ratio),
            samples=50,
            noisy=False,
        ),
        size_bytes=size,
        size_ratio=size / 1_000_000,
        params=1000,
        macs=1000,
        executed=Executed(layers=4, int8_layers=0, asked_int8=0, operators={}),
        parity_error=0.0,
    )


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


def make_scene(name: str, *, budget: Budget, config: StudyConfig | None = None, **trials: object) -> Scene:
    """Open or resume the study ``name`` with fake trials."""
    config = config or StudyConfig(model="fake", data="fake", study=name, space="default", sampler="tpe")
    clock = FakeClock()
    groups = make_groups()
    store = StudyStore.create_or_resume(config, StudyPaths.of(name))
    keeper = Timekeeper(budget, config.final_share, clock, store.spent_s)
    interrupt = Interrupt()
    fake = FakeTrials(clock, groups, interrupt=interrupt, **trials)  # type: ignore[arg-type]
    events: list[Progress] = []
    driver = Driver(
        store,
        load_space(config.space),
        FakeBench(groups, config),  # type: ignore[arg-type]
        keeper,
        interrupt,
        events.append,
        clock,
        run=fake,
        adopt_dense=lambda record: None,
    )
    return Scene(driver, fake, store, clock, events)
