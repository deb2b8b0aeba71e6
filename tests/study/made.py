"""Groups and measurements that follow from a recipe, and studies of them; loads no torch."""

from __future__ import annotations

from autoprune.config import StudyConfig
from autoprune.measure.record import Capability, Executed, Latency, Measurement
from autoprune.naming import StudyPaths
from autoprune.space.groups import Group, Groups, Member
from autoprune.space.recipe import Recipe, uniform_recipe
from autoprune.study.decode import Plan
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


def make_latency(ratio: float) -> Latency:
    """Return a latency of so many milliseconds against a dense network of one."""
    return Latency(
        latency_ms=ratio,
        latency_p95_ms=None,
        dense_ms=1.0,
        ratio=ratio,
        ratio_ci=(ratio, ratio),
        samples=50,
        noisy=False,
    )


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
        latency=make_latency(ratio),
        size_bytes=size,
        size_ratio=size / 1_000_000,
        params=1000,
        macs=1000,
        executed=Executed(layers=4, int8_layers=0, asked_int8=0, operators={}),
        parity_error=0.0,
    )


GROUPS = make_groups()


def config(name: str, **changes: object) -> StudyConfig:
    """Return the settings of a study."""
    return StudyConfig.model_validate({"model": "m", "data": "d", "study": name, **changes})


def open_for_writing(
    name: str, *, fresh: bool = False, lease_s: float = 60.0, **changes: object
) -> StudyStore:
    """Open a study for its driver."""
    settings = config(name, **changes)
    return StudyStore.create_or_resume(settings, StudyPaths.of(name), fresh=fresh, lease_s=lease_s)


def add(store: StudyStore, ratio: float, label: str = "") -> int:
    """Record one finished trial and return its number."""
    recipe = uniform_recipe(GROUPS, ratio, 8)
    trial = store.ask()
    store.begin(trial, Plan(recipe, "tpe", label))
    store.complete(trial, make_measurement(recipe, GROUPS), train_steps=7, duration_s=1.5)
    return int(trial.number)
