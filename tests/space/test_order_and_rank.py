"""Low rank, distillation on features and orders in recipes and spaces; what was written before them still counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import optuna
import pytest

from autoprune.errors import UsageError
from autoprune.search.baselines import architecture_key, grid_recipes
from autoprune.search.limits import auto_cannot, check_sampler, compares_features
from autoprune.space.groups import Groups
from autoprune.space.recipe import GroupChoice, Recipe, Recovery, uniform_recipe
from autoprune.space.search_space import SearchSpace
from autoprune.space.space_files import load_space, parse_space, shipped_spaces

WIDE = """
width: 4
ratios: [0.0, 0.5]
bits: [32]
criteria: {conv: [l1, l2]}
rank_ratios: [0.5, 0.0, 0.8]
orders: [tune-prune-quantize, prune-tune-quantize]
recovery: {finetune_steps: [0, 5], feature_distill: [0.0, 2.0]}
overrides: [{groups: fc, rank_ratios: [0.0]}]
"""


@pytest.fixture
def groups(make_groups: Callable[..., Groups]) -> Groups:
    return make_groups(a=("conv", 16, True), out=("conv", 16, False), fc=("linear", 16, True))


def ask(seed: int) -> Callable[[], optuna.Trial]:
    sampler = optuna.samplers.RandomSampler(seed=seed)
    return optuna.create_study(directions=["maximize", "minimize"], sampler=sampler).ask


def test_recipes_written_before_load_and_compare_as_they_did() -> None:
    before = {
        "groups": {"a": {"ratio": 0.5, "bits": 8, "criterion": ""}},
        "criterion": {"conv": "l2", "linear": "l2"},
        "width": 8,
        "recovery": {
            "least_squares": True, "batchnorm": True, "finetune_steps": 40, "learning_rate": 0.02,
            "schedule": "cosine", "distill": 0.9, "temperature": 4.0, "clip_norm": 5.0,
        },
    }  # fmt: skip
    recipe = Recipe.model_validate(before)
    assert recipe.canonical_json() == json.dumps(before, sort_keys=True, separators=(",", ":"))
    for changed in (
        Recipe(groups={"a": GroupChoice(ratio=0.5, bits=8, rank_ratio=0.1)}),
        recipe.model_copy(update={"order": "tune-prune-quantize"}),
        recipe.model_copy(update={"recovery": Recovery(feature_distill=1.0)}),
    ):
        assert changed.canonical_json() != recipe.canonical_json()
        assert Recipe.model_validate_json(changed.canonical_json()) == changed


def test_spaces_of_before_are_known_again() -> None:
    for name in shipped_spaces():
        text = load_space(name).content()
        assert not any(word in text for word in ("rank_ratios", "orders", "feature_distill"))
    wide = parse_space(WIDE)
    assert SearchSpace.model_validate_json(wide.content()) == wide


def test_a_recipe_that_only_lowers_ranks_is_a_network_of_its_own(groups: Groups) -> None:
    plain, low = (uniform_recipe(groups, 0.0, 32, rank_ratio=ratio) for ratio in (0.0, 0.5))
    assert (plain.prunes, plain.factorises, low.prunes, low.factorises) == (False, False, True, True)
    assert [low.choice(name).rank_ratio for name in ("a", "out", "fc")] == [0.5, 0.0, 0.5]
    keys = {
        architecture_key(r, groups)
        for r in (
            plain,
            low,
            uniform_recipe(groups, 0.0, 32, rank_ratio=0.6),
            low.model_copy(update={"order": "tune-prune-quantize"}),
            low.model_copy(update={"recovery": Recovery(feature_distill=1.0)}),
        )
    }
    assert len(keys) == 5
    untrained = Recovery(finetune_steps=0)
    ordered = (
        uniform_recipe(groups, 0.5, 32, recovery=untrained),
        uniform_recipe(groups, 0.5, 32, recovery=untrained, order="tune-prune-quantize"),
    )
    assert len({architecture_key(r, groups) for r in ordered}) == 1


def test_parameters_and_recipes_are_inverse_and_exist_only_where_they_matter(groups: Groups) -> None:
    space = parse_space(WIDE)
    trial_of = ask(1)
    seen: set[str] = set()
    orders, ranks = set(), set()
    for _ in range(200):
        trial = trial_of()
        recipe = space.suggest(trial, groups)
        recipe.check(groups)
        params = set(trial.params)
        assert space.params_of(recipe, groups) == trial.params
        assert "rank:fc" not in params
        tuned = recipe.prunes and recipe.recovery.finetune_steps > 0
        assert ("finetune_steps" in params) == recipe.prunes
        assert (("order" in params), ("feature_distill" in params)) == (tuned, tuned)
        seen |= params
        orders.add(recipe.order)
        ranks.add(recipe.choice("out").rank_ratio)
    assert {"rank:a", "rank:out", "order", "feature_distill"} <= seen
    assert len(orders) == 2 and ranks == {0.0, 0.5, 0.8}
    inside = Recipe(groups={"a": GroupChoice(rank_ratio=0.5)}, width=4, criterion={}, order=space.orders[0])
    tuned_recovery = Recovery(finetune_steps=5)
    assert space.params_of(inside.model_copy(update={"recovery": tuned_recovery}), groups) is not None
    for outside in (
        Recipe(groups={"a": GroupChoice(rank_ratio=0.4)}, width=4, recovery=tuned_recovery),
        Recipe(groups={"fc": GroupChoice(rank_ratio=0.5)}, width=4, recovery=tuned_recovery),
        Recipe(groups={"a": GroupChoice(rank_ratio=0.5)}, width=8, recovery=tuned_recovery),
        inside.model_copy(update={"recovery": Recovery(finetune_steps=5, feature_distill=1.0)}),
    ):
        assert space.params_of(outside, groups) is None


@pytest.mark.parametrize("ranks", ["[0.5, 0.0, 0.8]", "[0.5, 0.8]", "[0.0]"])
def test_size_counts_every_recipe_once(groups: Groups, ranks: str) -> None:
    space = parse_space(WIDE.replace("[0.5, 0.0, 0.8]", ranks))
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        study = optuna.create_study(sampler=optuna.samplers.BruteForceSampler())
    found: set[str] = set()

    def note(trial: optuna.Trial) -> float:
        found.add(space.suggest(trial, groups).canonical_json())
        return 0.0

    study.optimize(note)
    assert space.size(groups) == pytest.approx(math.log10(len(found)))


def test_the_grid_tries_every_rank_and_order_that_differs(groups: Groups) -> None:
    space = parse_space(WIDE.replace("[0, 5]", "[5]"))
    recipes = grid_recipes(space, groups, 0)
    assert len({r.canonical_json() for r in recipes}) == len(recipes)
    # Ratio 0: one criterion; rank 0 one order, else two. Ratio 0.5: two criteria, three ranks, two orders.
    assert len(recipes) == 1 + 2 * 2 + 2 * 3 * 2


def test_the_default_search_refuses_what_it_cannot_search() -> None:
    assert auto_cannot(SearchSpace()) == []
    for text, said in {
        "rank_ratios: [0.0, 0.5]": "rank_ratios = [0.0, 0.5]; allowed: [0.0]",
        "rank_ratios: [0.5]": "rank_ratios = [0.5]",
        "overrides: [{groups: a, rank_ratios: [0.3]}]": "rank_ratios = [0.3]",
        "orders: [tune-prune-quantize]": "orders = ['tune-prune-quantize']",
        "recovery: {feature_distill: [0.0, 1.0]}": "feature_distill = [0.0, 1.0]; allowed: a single value",
        "recovery: {feature_distill: {low: 0.0, high: 1.0}}": "'high': 1.0",
    }.items():
        space = parse_space(text)
        with pytest.raises(UsageError) as caught:
            check_sampler("auto", space)
        assert said in caught.value.message
        assert "--sampler tpe" in caught.value.hint
        check_sampler("tpe", space)
    single = parse_space("recovery: {feature_distill: 2.0}")
    check_sampler("auto", single)
    assert single.default_recovery().feature_distill == 2.0
    assert (compares_features(single), compares_features(SearchSpace())) == (True, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank_ratios: [1.0]", "less than 1"),
        ("rank_ratios: []", "at least 1 item"),
        ("rank_ratios: [0.5, 0.5]", "twice"),
        ("orders: [quantize-first]", "'prune-tune-quantize' or 'tune-prune-quantize'"),
        ("recovery: {feature_distill: -1}", "greater than or equal to 0"),
    ],
)
def test_faults_are_named(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_space(text)
    assert said in caught.value.message
