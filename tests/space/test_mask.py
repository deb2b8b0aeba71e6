"""Masks in recipes and search spaces: what is allowed, what is searched, and that older recipes stay what they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import optuna
import pytest
from pydantic import ValidationError

from autoprune.errors import UsageError
from autoprune.search.baselines import architecture_key, effective_key, grid_recipes
from autoprune.search.limits import auto_cannot, check_sampler
from autoprune.space.groups import Groups
from autoprune.space.mask import Mask, block_pattern, pattern_share
from autoprune.space.recipe import GroupChoice, Recipe, Recovery, uniform_recipe
from autoprune.space.schedule import Schedule
from autoprune.space.search_space import SearchSpace
from autoprune.space.space_files import load_space, parse_space

SPACE = """
ratios: [0.0, 0.5]
bits: [32]
sparsities: [0.5, 0.0]
masks: {pattern: [unstructured, "2:4"], allocation: [layer, erk], criterion: [magnitude, activation]}
criteria: {conv: [l2], linear: [l2]}
recovery: {finetune_steps: [5, 9]}
overrides:
  - {groups: fc, sparsities: [0.0]}
"""


@pytest.fixture
def groups(make_groups: Callable[..., Groups]) -> Groups:
    return make_groups(a=("conv", 16, True), out=("conv", 32, False), fc=("linear", 10, True))


def test_patterns() -> None:
    assert block_pattern("unstructured") is None
    assert block_pattern("2:4") == (2, 4)
    assert pattern_share("1:4") == 0.75
    assert pattern_share("unstructured") is None
    for wrong in ("4:4", "4:2", "0:4", "2:", "2-4", "half", "2:4:8", "٢:4"):
        with pytest.raises(ValidationError, match="allowed: 'unstructured', or 'N:M'"):
            Mask(pattern=wrong)


def test_a_recipe_says_what_a_mask_cannot_do(groups: Groups) -> None:
    def recipe(sparsity: float, steps: int = 5, **mask: Any) -> Recipe:
        recovery = Recovery(finetune_steps=steps)
        return Recipe(groups={"a": GroupChoice(sparsity=sparsity)}, mask=Mask(**mask), recovery=recovery)

    recipe(0.5, pattern="2:4").check(groups)
    recipe(0.333, pattern="2:3").check(groups)
    recipe(0.0, 0, criterion="movement", allocation="erk", pattern="2:4").check(groups)
    with pytest.raises(UsageError, match="sparsity 0.8 cannot be used with pattern '2:4'; allowed: 0 or 0.5"):
        recipe(0.8, pattern="2:4").check(groups)
    with pytest.raises(UsageError, match="allocation 'erk' cannot be used with pattern '2:4'.*'layer'"):
        recipe(0.5, pattern="2:4", allocation="erk").check(groups)
    with pytest.raises(UsageError, match="'movement'.*no step follows the last cut; allowed: at least 1"):
        recipe(0.5, 0, criterion="movement").check(groups)


def test_a_recipe_from_before_masks_is_the_same_text() -> None:
    before = {
        "groups": {"a": {"ratio": 0.5, "bits": 8, "criterion": ""}},
        "criterion": {"conv": "l2", "linear": "l2"},
        "width": 8,
        "recovery": Recovery().model_dump(mode="json", exclude={"feature_distill"}),
    }
    recipe = Recipe.model_validate(before)
    assert recipe.canonical_json() == json.dumps(before, sort_keys=True, separators=(",", ":"))
    assert not recipe.masks and recipe.prunes
    masked = recipe.model_copy(
        update={"groups": {"a": GroupChoice(sparsity=0.25)}, "mask": Mask(pattern="3:4")}
    )
    assert masked.masks and masked.prunes
    assert Recipe.model_validate_json(masked.canonical_json()) == masked
    assert Recipe.model_validate_json(masked.model_dump_json()) == masked


def test_a_space_from_before_masks_is_the_same_text() -> None:
    space = load_space("quick")
    assert "spars" not in space.content() and "masks" not in space.content()
    with_override = SearchSpace.model_validate({"overrides": [{"groups": "a", "bits": [8]}]})
    assert '"overrides":[{"groups":"a","ratios":null,"bits":[8]}]' in with_override.content()
    assert '"sparsities":[0.0]' in parse_space(SPACE).content()
    assert parse_space(SPACE).content() != parse_space(SPACE.replace("erk", "lamp")).content()


def test_parameters_of_masks_exist_only_where_they_matter(groups: Groups) -> None:
    space = parse_space(SPACE).check(groups)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen: set[str] = set()
    recipes: set[str] = set()
    for _ in range(2500):
        trial = study.ask()
        recipe = space.suggest(trial, groups)
        recipe.check(groups)
        assert space.params_of(recipe, groups) == trial.params
        params = set(trial.params)
        assert "sparsity:fc" not in params
        assert recipe.choice("fc").sparsity == 0.0
        assert ("mask:pattern" in params) == recipe.masks
        assert ("mask:allocation" in params) == (recipe.masks and recipe.mask.pattern == "unstructured")
        assert ("finetune_steps" in params) == recipe.prunes
        seen |= params
        recipes.add(effective_key(recipe, groups))
    assert {"sparsity:a", "sparsity:out", "mask:pattern", "mask:allocation", "mask:criterion"} <= seen
    # Cuts of a and fc: 4, of which 1 none. Sparsities of a and out: 4, of which 1 none. Masks: 6. Recoveries: 2.
    count = 1 + (4 * (1 + 3 * 6) - 1) * 2
    assert 10 ** space.size(groups) == pytest.approx(count)
    assert len(recipes) == count


def test_what_lies_outside_of_a_space_has_no_parameters(groups: Groups) -> None:
    space = parse_space(SPACE)
    assert (
        space.params_of(uniform_recipe(groups, 0.0, 32, recovery=space.default_recovery()), groups)
        is not None
    )
    outside: list[Recipe] = [
        Recipe(groups={"a": GroupChoice(sparsity=0.7)}, recovery=space.default_recovery()),
        Recipe(groups={"fc": GroupChoice(sparsity=0.5)}, recovery=space.default_recovery()),
        Recipe(
            groups={"a": GroupChoice(sparsity=0.5)},
            mask=Mask(criterion="fisher"),
            recovery=space.default_recovery(),
        ),
    ]
    assert [space.params_of(recipe, groups) for recipe in outside] == [None] * 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "sparsities: [0.0, 0.7]\nmasks: {pattern: '2:4'}\n",
            "sparsity 0.7 cannot be used with pattern '2:4'",
        ),
        ("sparsities: [0.5]\nmasks: {criterion: movement}\nrecovery: {finetune_steps: 0}\n", "'movement'"),
        ("overrides: [{groups: a, sparsities: [0.6]}]\nmasks: {pattern: '1:2'}\n", "sparsity 0.6"),
        ("sparsities: [1.0]\n", "less than 1"),
        ("sparsities: [0.5, 0.5]\n", "a choice is there twice"),
        ("masks: {pattern: ['2:4', '2:4']}\n", "pattern: a choice is there twice"),
        ("masks: {pattern: '4:2'}\n", "N below M"),
        ("masks: {allocation: even}\n", "'layer', 'global', 'erk' or 'lamp'"),
    ],
)
def test_spaces_that_cannot_be_are_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_space(text)
    assert says in str(raised.value)


def test_the_grid_tries_every_mask_of_the_space(groups: Groups) -> None:
    recipes = grid_recipes(parse_space(SPACE), groups, 0)
    # Two ratios, each without a mask and with six.
    assert len({effective_key(recipe, groups) for recipe in recipes}) == len(recipes) == 2 * (1 + 6)
    for recipe in recipes:
        recipe.check(groups)


def test_masks_make_networks_differ(groups: Groups) -> None:
    dense = Recipe()
    masked = Recipe(groups={"a": GroupChoice(sparsity=0.5)})
    other = masked.model_copy(update={"mask": Mask(criterion="random")})
    unused = Recipe(mask=Mask(criterion="random"))
    assert architecture_key(dense, groups) == architecture_key(unused, groups) == "dense"
    assert len({architecture_key(r, groups) for r in (dense, masked, other)}) == 3


def test_the_default_sampler_refuses_what_it_cannot_search() -> None:
    assert auto_cannot(load_space("default")) == []
    space = parse_space("overrides: [{groups: a, sparsities: [0.5]}]")
    with pytest.raises(UsageError, match=r"sparsities holds \[0.0, 0.5\]") as raised:
        check_sampler("auto", space)
    assert "--sampler tpe" in raised.value.hint
    check_sampler("tpe", space)


def test_movement_needs_steps_after_the_cut_of_a_schedule(groups: Groups) -> None:
    late = Recipe(
        groups={"a": GroupChoice(ratio=0.5, sparsity=0.5)},
        mask=Mask(criterion="movement"),
        schedule=Schedule(kind="gradual", sparse_steps=1.0),
    )
    with pytest.raises(UsageError, match="'movement'.*no step follows"):
        late.check(groups)
    late.model_copy(update={"schedule": Schedule(kind="gradual", sparse_steps=0.5)}).check(groups)
    # Single weights alone are masked in the midst of the steps.
    late.model_copy(update={"groups": {"a": GroupChoice(sparsity=0.5)}}).check(groups)
    with pytest.raises(UsageError, match="'movement'.*no step follows"):
        parse_space(
            "sparsities: [0.5]\nmasks: {criterion: movement}\n"
            "schedules: {kind: [one_shot, sparse], sparse_steps: [0.5, 1.0]}"
        )
    # Where nothing is masked its criterion says nothing.
    parse_space("orders: [tune-prune-quantize]\nmasks: {criterion: [magnitude, movement]}")
