"""Studies of thousands of trials, as a search of a network of 20 groups leaves them, written in seconds."""

from __future__ import annotations

import json
import random
from datetime import datetime
from typing import Any, cast

import optuna
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models

from autoprune.measure.record import Capability, Executed, Latency, Measurement, RunFigures
from autoprune.space.groups import Groups
from autoprune.space.recipe import Recipe
from autoprune.space.search_space import SearchSpace
from autoprune.space.space_files import load_space
from autoprune.study.decode import PLAN, RESULT, Plan, result_text
from autoprune.study.store import StudyStore
from tests.study.made import make_groups

GROUPS: Groups = make_groups(tuple(random.Random(0).choice((32, 64, 128)) for _ in range(20)))
SPACE: SearchSpace = load_space("default")


class Drawn(optuna.trial.FixedTrial):
    """A trial whose parameters are drawn at random, and kept."""

    def __init__(self, seed: int) -> None:
        super().__init__({})
        self._random = random.Random(seed)

    def _suggest(self, name: str, distribution: Any) -> Any:
        if name not in self._params:
            choices = distribution.choices if hasattr(distribution, "choices") else None
            drawn = self._random.choice(choices) if choices else None
            if drawn is None:
                low, high = distribution.low, distribution.high
                whole = isinstance(distribution, optuna.distributions.IntDistribution)
                drawn = self._random.randint(low, high) if whole else self._random.uniform(low, high)
            self._params[name] = drawn
        return super()._suggest(name, distribution)


def draw(seed: int) -> tuple[Recipe, optuna.trial.FixedTrial]:
    """Return a recipe of the default space, and the parameters that give it."""
    trial = Drawn(seed)
    return SPACE.suggest(trial, GROUPS), trial


def measured(recipe: Recipe, seed: int) -> Measurement:
    """Return figures of a network of 20 layers: about what the recipe removes gives, with noise."""
    noise = random.Random(seed).gauss(0.0, 0.01)
    removed = sum(recipe.choice(g.name).ratio for g in GROUPS.prunable) / len(GROUPS.prunable)
    bits = sum(recipe.choice(g.name).bits for g in GROUPS.groups) / len(GROUPS.groups)
    accuracy = 0.9 - 0.4 * removed**2 - 0.0004 * (32 - bits) + noise
    ratio = (1 - 0.8 * removed) * (0.5 + 0.5 * bits / 32) * (1 + noise)
    size = int(1_000_000 * (1 - 0.9 * removed) * bits / 32)
    layers = {f"conv{n}": "float32" for n in range(0, 20, 3)}
    return Measurement(
        search=Capability(name="accuracy", value=accuracy, ci=(accuracy - 0.01, accuracy + 0.01), examples=2000),
        report=None,
        latency=Latency(
            latency_ms=2 * ratio, latency_p95_ms=None, dense_ms=2.0, ratio=ratio,
            ratio_ci=(0.99 * ratio, 1.01 * ratio), samples=60, noisy=False,
        ),
        size_bytes=size, size_ratio=size / 1_000_000, params=int(250_000 * (1 - removed)),
        macs=int(4e7 * (1 - removed)),
        executed=Executed(
            layers=21, int8_layers=14, asked_int8=21,
            operators={"Conv": 7, "QLinearConv": 14, "Add": 9, "GlobalAveragePool": 1, "Gemm": 1, "Relu": 12},
            not_as_asked=tuple(layers), asked={"int8": 21}, ran={"int8": 14, "float32": 7}, reasons=layers,
        ),
        parity_error=1e-6,
        figures=RunFigures(memory_bytes=5_000_000, missing={"energy_mj": "no counter can be read here"}),
    )  # fmt: skip


def fill(store: StudyStore, trials: int) -> None:
    """Append finished trials to a study, many in one transaction; the first is the dense network."""
    storage, study_id = store._storage, store._study._study_id
    begun = len(store.records())
    with storage.engine.begin() as link:
        for number in range(begun, begun + trials):
            recipe, drawn = (Recipe(), Drawn(0)) if number == 0 else draw(number)
            dense = number == 0
            plan = Plan(recipe, "dense" if dense else "walk", "dense" if dense else "")
            measurement = measured(recipe, number)
            now = datetime(2026, 1, 1)
            values = {"study_id": study_id, "number": number, "state": "COMPLETE"}
            made = link.execute(
                models.TrialModel.__table__.insert(),
                {**values, "datetime_start": now, "datetime_complete": now},
            )
            trial_id = cast(tuple[int], made.inserted_primary_key)[0]
            texts = {PLAN: plan.text(), RESULT: result_text(measurement, 40, 12.0, None, 12.0 * number)}
            rows = [{"trial_id": trial_id, "key": k, "value_json": json.dumps(v)} for k, v in texts.items()]
            link.execute(models.TrialUserAttributeModel.__table__.insert(), rows)
            rows = [
                {"trial_id": trial_id, "objective": n, "value": v, "value_type": "FINITE"}
                for n, v in enumerate(store._values(measurement))
            ]
            link.execute(models.TrialValueModel.__table__.insert(), rows)
            rows = [
                {
                    "trial_id": trial_id,
                    "param_name": name,
                    "param_value": distribution.to_internal_repr(drawn.params[name]),
                    "distribution_json": distribution_to_json(distribution),
                }
                for name, distribution in drawn.distributions.items()
            ]
            if rows:
                link.execute(models.TrialParamModel.__table__.insert(), rows)


def add_one(store: StudyStore, seed: int, *, given: bool = True) -> None:
    """Record one more trial as the driver does: of a given recipe, or of one that the sampler chooses."""
    recipe, drawn = draw(seed)
    trial = store.ask(dict(drawn.params) if given else None)
    recipe = SPACE.suggest(trial, GROUPS)
    store.begin(trial, Plan(recipe, "walk"))
    store.complete(trial, measured(recipe, seed), train_steps=40, duration_s=12.0)
