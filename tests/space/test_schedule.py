"""Schedules in recipes and search spaces: defaults change nothing, samplers search them, faults are told."""

from __future__ import annotations

from collections.abc import Callable

import optuna
import pytest

from autoprune.errors import UsageError
from autoprune.search.baselines import architecture_key, baselines, grid_recipes
from autoprune.search.limits import auto_cannot, check_sampler
from autoprune.space.groups import Groups
from autoprune.space.recipe import GroupChoice, Recipe, Recovery
from autoprune.space.schedule import Schedule
from autoprune.space.search_space import SearchSpace
from autoprune.space.space_files import parse_space, shipped_spaces

MakeGroups = Callable[..., Groups]
SPACE = """
ratios: [0.0, 0.5]
bits: [32]
schedules:
  kind: [one_shot, iterative, sparse]
  rounds: [2, 4]
  strength: [0.02, 0.1]
"""


@pytest.fixture
def groups(make_groups: MakeGroups) -> Groups:
    return make_groups(a=("conv", 32, True), b=("conv", 32, True))


def test_a_recipe_of_before_is_the_same_text() -> None:
    recipe = Recipe(groups={"a": GroupChoice(ratio=0.5)})
    assert "sparse_steps" not in recipe.canonical_json()
    assert Recipe.model_validate_json(recipe.canonical_json()) == recipe
    other = recipe.model_copy(update={"schedule": Schedule(kind="iterative")})
    assert other.canonical_json() != recipe.canonical_json()
    assert Recipe.model_validate_json(other.canonical_json()) == other


def test_a_space_of_before_is_the_same_text() -> None:
    assert "schedules" not in SearchSpace().content()
    assert "schedules" in parse_space(SPACE).content()


def test_samplers_search_every_schedule_and_parameters_give_it_back(groups: Groups) -> None:
    space = parse_space(SPACE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(200):
        trial = study.ask()
        recipe = space.suggest(trial, groups)
        study.tell(trial, 0.0)
        params = space.params_of(recipe, groups)
        assert params == trial.params
        again = space.suggest(optuna.trial.FixedTrial(params or {}), groups)
        assert again == recipe
        assert recipe.prunes or recipe.schedule == Schedule()
        if recipe.prunes:
            seen.add(recipe.schedule)
    assert seen == set(space.schedules.each())
    assert len(seen) == space.schedules.count() == 1 + 2 + 2


def test_single_weights_have_schedules_without_a_cut(groups: Groups) -> None:
    space = parse_space(
        "ratios: [0.0]\nbits: [32]\nsparsities: [0.0, 0.5]\nschedules: {kind: [one_shot, gradual]}"
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(60):
        trial = study.ask()
        recipe = space.suggest(trial, groups)
        study.tell(trial, 0.0)
        assert space.params_of(recipe, groups) == trial.params
        assert recipe.masks or recipe.schedule == Schedule()
        seen.add(recipe.canonical_json())
    # Nothing masked, or one of three sets of masked groups under one of two schedules.
    assert len(seen) == round(10 ** space.size(groups)) == 1 + 3 * 2


def test_one_choice_makes_no_parameter(groups: Groups) -> None:
    space = parse_space("ratios: [0.5]\nbits: [32]\nschedules: {kind: gradual, rounds: 5}")
    recipe = space.suggest(optuna.trial.FixedTrial({}), groups)
    assert recipe.schedule == Schedule(kind="gradual", rounds=5)
    assert space.params_of(recipe, groups) == {}
    assert space.params_of(recipe.model_copy(update={"schedule": Schedule()}), groups) is None


def test_schedules_count_in_the_size_of_a_space(groups: Groups) -> None:
    one = parse_space("ratios: [0.5]\nbits: [32]")
    four = parse_space("ratios: [0.5]\nbits: [32]\nschedules: {kind: iterative, rounds: [2, 3, 4, 5]}")
    assert 10 ** (four.size(groups) - one.size(groups)) == pytest.approx(4)


def test_baselines_and_the_grid_use_the_schedules(groups: Groups) -> None:
    space = parse_space(SPACE.replace("[one_shot, iterative, sparse]", "[iterative, sparse]"))
    found = baselines(
        groups, [0.5], [8, 32], "l2", 8, space.default_recovery(), schedule=space.schedules.default()
    )
    assert {b.label: b.recipe.schedule.kind for b in found} == {
        "int8": "one_shot",
        "uniform 0.5 int8": "iterative",
        "uniform 0.5": "iterative",
    }
    assert {r.schedule for r in grid_recipes(space, groups, 0) if r.prunes} == set(space.schedules.each())


def test_networks_of_two_schedules_are_two(groups: Groups) -> None:
    recipe = Recipe(groups={"a": GroupChoice(ratio=0.5)})
    other = recipe.model_copy(update={"schedule": Schedule(kind="iterative")})
    assert architecture_key(recipe, groups) != architecture_key(other, groups)
    more = recipe.model_copy(update={"schedule": Schedule(kind="iterative", rounds=4)})
    assert architecture_key(other, groups) != architecture_key(more, groups)
    uncut = Recipe(schedule=Schedule(kind="iterative"))
    assert architecture_key(uncut, groups) == architecture_key(Recipe(), groups)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("schedules: {kind: [sometimes]}", "kind.0 = 'sometimes'"),
        ("schedules: {rounds: 1}", "rounds = 1"),
        ("schedules: {strength: 0.0}", "strength = 0.0"),
        ("schedules: {kind: [sparse, sparse]}", "a choice is there twice"),
        ("schedules: {kind: gradual}\nrecovery: {finetune_steps: [0, 40]}", "finetune_steps may be 0"),
        (
            "schedules: {kind: sparse}\nrecovery: {finetune_steps: {low: 0, high: 9}}",
            "finetune_steps may be 0",
        ),
    ],
)
def test_what_cannot_be_is_told(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_space(text)


def test_a_recipe_that_trains_nothing_cannot_prune_by_training(groups: Groups) -> None:
    none = Recovery(finetune_steps=0)
    Recipe(recovery=none, schedule=Schedule(kind="iterative")).check(groups)
    with pytest.raises(UsageError, match="'sparse' prunes while it trains"):
        Recipe(recovery=none, schedule=Schedule(kind="sparse")).check(groups)


def test_the_default_search_says_what_it_cannot_search() -> None:
    for name in set(shipped_spaces()) - {"sparse"}:
        assert auto_cannot(parse_space(shipped_spaces()[name].read_text())) == []
    space = parse_space(SPACE)
    with pytest.raises(UsageError, match="schedules.kind") as caught:
        check_sampler("auto", space)
    assert "--sampler tpe" in caught.value.hint
    for sampler in ("tpe", "nsga2", "random", "grid"):
        check_sampler(sampler, space)
