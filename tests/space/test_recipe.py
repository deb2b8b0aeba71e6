"""Recipes: what they do to a network, and what they say of what they cannot do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from autoprune.errors import UsageError
from autoprune.space.groups import Group, Groups, Member
from autoprune.space.mask import Mask
from autoprune.space.quantization import Quantization
from autoprune.space.recipe import GroupChoice, Recipe, Recovery, groups_left, uniform_recipe
from autoprune.space.schedule import Schedule


@pytest.fixture
def groups(make_groups: Callable[..., Groups]) -> Groups:
    """Two convolutions, of which the first lies in a block, a linear layer, and the network's output."""
    made = make_groups(
        a=("conv", 16, True), b=("conv", 64, True), fc=("linear", 32, True), out=("linear", 10, False)
    )
    first = made.groups[0].model_copy(update={"block": "block"})
    inside = Member(layer="block.conv", kind="conv", axis="out", index_map=((0,),))
    first = first.model_copy(update={"members": (inside,)})
    return Groups(groups=(first, *made.groups[1:]), input_shape=made.input_shape)


def cut(ratio: float = 0.5, **more: Any) -> Recipe:
    return Recipe.model_validate({"groups": {"a": {"ratio": ratio}}, **more})


def test_a_group_has_its_own_criterion_or_its_type_s(groups: Groups) -> None:
    recipe = Recipe(groups={"a": GroupChoice(criterion="l1")}, criterion={"conv": "fpgm"})
    assert [recipe.criterion_of(group) for group in groups.groups] == ["l1", "fpgm", "l2", "l2"]
    assert recipe.choice("b") == GroupChoice()


def test_kept_counts_are_by_ratio_and_width(groups: Groups) -> None:
    recipe = Recipe(groups={"a": GroupChoice(ratio=1.0), "b": GroupChoice(ratio=0.45)}, width=8)
    assert recipe.kept_counts(groups) == {"a": 0, "b": 32, "fc": 32, "out": 10}
    assert recipe.model_copy(update={"width": 1}).kept_counts(groups)["b"] == 35
    assert [group.name for group in groups_left(recipe, groups).groups] == ["b", "fc", "out"]
    assert groups_left(cut(), groups).groups == groups.groups


@pytest.mark.parametrize(
    ("choice", "prunes", "masks", "factorises"),
    [
        ({}, False, False, False),
        ({"bits": 8}, False, False, False),
        ({"ratio": 0.1}, True, False, False),
        ({"sparsity": 0.1}, True, True, False),
        ({"rank_ratio": 0.1}, True, False, True),
    ],
)
def test_what_removes_anything(choice: dict[str, Any], prunes: bool, masks: bool, factorises: bool) -> None:
    recipe = Recipe.model_validate({"groups": {"b": {}, "a": choice}})
    assert (recipe.prunes, recipe.masks, recipe.factorises) == (prunes, masks, factorises)


def test_integers_are_trained_where_there_are_some_few_enough_and_steps_after_the_cut() -> None:
    trained = Recipe.model_validate(
        {"groups": {"a": {"bits": 4}, "b": {}}, "quantization": {"aware": 0.5, "aware_bits": 4}}
    )
    assert trained.trains_integers and trained.prunes
    others: list[dict[str, Any]] = [
        {"groups": {"a": GroupChoice(bits=5)}},
        {"groups": {"a": GroupChoice(bits=16)}},
        {"groups": {}},
        {"recovery": Recovery(finetune_steps=0)},
        {"order": "tune-prune-quantize"},
        {"quantization": Quantization(aware_bits=4)},
    ]
    for changes in others:
        other = trained.model_copy(update=changes)
        assert not other.trains_integers and not other.prunes
    assert trained.model_copy(update={"recovery": Recovery(finetune_steps=1)}).trains_integers


def test_text_leaves_out_what_came_later_where_it_is_as_by_default() -> None:
    plain = Recipe.model_validate({"groups": {"a": {}}}).content()
    assert plain["groups"] == {"a": {"ratio": 0.0, "bits": 32, "criterion": ""}}
    assert set(plain) == {"groups", "criterion", "width", "recovery"}
    assert "feature_distill" not in plain["recovery"]
    full = Recipe.model_validate(
        {
            "groups": {
                "a": {"sparsity": 0.1, "rank_ratio": 0.2, "activation_bits": 16},
                "b": {"rank_ratio": 0.3},
            },
            "recovery": {"feature_distill": 1.0},
            "mask": {"criterion": "random"},
            "schedule": {"kind": "iterative"},
            "ranking": "alike",
            "order": "tune-prune-quantize",
            "quantization": {"block_size": 64, "aware_bits": 4},
        }
    )
    content = full.content()
    assert content["groups"]["a"] == {
        "ratio": 0.0, "bits": 32, "criterion": "", "sparsity": 0.1, "rank_ratio": 0.2, "activation_bits": 16,
    }  # fmt: skip
    assert content["groups"]["b"] == {"ratio": 0.0, "bits": 32, "criterion": "", "rank_ratio": 0.3}
    assert content["recovery"]["feature_distill"] == 1.0
    assert (content["mask"]["criterion"], content["schedule"]["kind"]) == ("random", "iterative")
    assert (content["ranking"], content["order"]) == ("alike", "tune-prune-quantize")
    assert set(content["quantization"]) == {
        "scale", "percentile", "rounding", "bias_correction", "aware", "block_size", "aware_bits",
    }  # fmt: skip
    assert Recipe.model_validate(content) == full
    # Keys are sorted and nothing is between them.
    text = cut().canonical_json()
    assert text.startswith(
        '{"criterion":{"conv":"l2","linear":"l2"},"groups":{"a":{"bits":32,"criterion":"",'
    )


WRONG: list[tuple[Recipe, str]] = [
    (Recipe(groups={"c": GroupChoice()}), "unknown group 'c'"),
    (Recipe(groups={"out": GroupChoice(ratio=0.1)}), "group 'out' cannot be pruned: makes the network's output"),
    (Recipe(groups={"b": GroupChoice(ratio=1.0)}), "'b' has ratio 1, but it lies in no block .* below 1"),
    (Recipe(criterion={"conv": "l3"}), "unknown criterion 'l3'"),
    (Recipe(groups={"a": GroupChoice(criterion="l4")}), "unknown criterion 'l4'"),
    (
        Recipe(groups={"b": GroupChoice(), "a": GroupChoice(bits=4)}, quantization=Quantization(block_size=64)),
        "group 'a' has blocks of 64 weights .* 8 bits.*; allowed with blocks: activation bits 16, 32",
    ),
    (
        cut(order="tune-prune-quantize", schedule={"kind": "iterative"}),
        "schedule 'iterative' trains after the cut, which order 'tune-prune-quantize' does not; allowed with it",
    ),
    (
        Recipe(
            groups={"a": GroupChoice(sparsity=0.5)}, mask=Mask(criterion="movement"), order="tune-prune-quantize"
        ),
        "mask criterion 'movement' trains after the cut, which order 'tune-prune-quantize' does not",
    ),
    (
        Recipe(
            groups={"a": GroupChoice(ratio=0.5), "fc": GroupChoice(ratio=0.5)},
            criterion={"conv": "lamp", "linear": "l2"},
            ranking="global",
        ),
        r"ranking 'global' compares .* criteria \['l2', 'lamp'\] .*; allowed: one of them for all, or any without lamp",
    ),
    (
        Recipe(
            groups={"a": GroupChoice(ratio=0.9), "b": GroupChoice(ratio=0.5, criterion="lamp")}, ranking="alike"
        ),
        "ranking 'alike' compares",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "says"), WRONG)
def test_a_recipe_that_cannot_be_carried_out_says_why(recipe: Recipe, says: str, groups: Groups) -> None:
    with pytest.raises(UsageError) as caught:
        recipe.check(groups)
    assert re.search(says, caught.value.message)


RIGHT: list[Recipe] = [
    Recipe(groups={"out": GroupChoice(bits=8)}),
    Recipe(groups={"a": GroupChoice(ratio=1.0)}),
    Recipe(groups={"b": GroupChoice(ratio=0.999)}),
    # Blocks of weights are for layers whose inputs are no integers.
    Recipe(groups={"a": GroupChoice(bits=4, activation_bits=16)}, quantization=Quantization(block_size=64)),
    Recipe(groups={"a": GroupChoice(bits=16)}, quantization=Quantization(block_size=64)),
    Recipe(groups={"a": GroupChoice(bits=4)}),
    # In the other order nothing may need training after the cut; where nothing is cut nothing does.
    cut(order="tune-prune-quantize"),
    Recipe(order="tune-prune-quantize", schedule=Schedule(kind="iterative")),
    cut(order="tune-prune-quantize", mask={"criterion": "movement"}),
    cut(schedule={"kind": "iterative"}),
    # Scores that are shares are compared with such, or with none.
    Recipe(groups={"a": GroupChoice(ratio=0.5), "b": GroupChoice(ratio=0.5)}, criterion={"conv": "lamp"},
           ranking="global"),
    Recipe(groups={"a": GroupChoice(ratio=0.5), "b": GroupChoice(ratio=0.5, criterion="l1")}, ranking="global"),
    Recipe(groups={"a": GroupChoice(ratio=0.5), "b": GroupChoice(ratio=0.5, criterion="lamp")}),
    Recipe(groups={"a": GroupChoice(ratio=1.0), "b": GroupChoice(ratio=0.5, criterion="lamp")}, ranking="global"),
    Recipe(groups={"a": GroupChoice(ratio=0.0), "b": GroupChoice(ratio=0.5, criterion="lamp")}, ranking="global"),
]  # fmt: skip


@pytest.mark.parametrize("recipe", RIGHT)
def test_a_recipe_that_can_be_carried_out_is_taken(recipe: Recipe, groups: Groups) -> None:
    recipe.check(groups)


def heads() -> Group:
    """Places of heads: channels whose layers' bits are another group's, which nothing reads."""
    member = Member(layer="qkv", kind="linear", axis="out", index_map=((0,), (1,)), own=False)
    return Group(name="heads", type="linear", size=2, members=(member,), prunable=True)


def test_a_uniform_recipe_does_to_every_group_what_it_can(groups: Groups) -> None:
    reader = Member(layer="next", kind="linear", axis="in", index_map=((0,),))
    read = groups.groups[3].model_copy(
        update={"name": "read", "members": (*groups.groups[3].members, reader)}
    )
    every = Groups(groups=(*groups.groups, heads(), read), input_shape=(3, 8, 8))
    recipe = uniform_recipe(every, 0.5, 4, "l1", 16, sparsity=0.2, rank_ratio=0.3, activation_bits=16)
    usual = GroupChoice(ratio=0.5, bits=4, activation_bits=16, sparsity=0.2, rank_ratio=0.3)
    assert recipe.groups == {
        "a": usual,
        "b": usual,
        "fc": usual,
        # Nothing of the network's outputs is removed, and their rank stays.
        "out": usual.model_copy(update={"ratio": 0.0, "rank_ratio": 0.0}),
        # The layers' bits are another group's.
        "heads": usual.model_copy(update={"bits": 32, "activation_bits": 8}),
        # What cannot be pruned but is read by layers may lose rank.
        "read": usual.model_copy(update={"ratio": 0.0}),
    }
    assert recipe.criterion == {"conv": "l1", "linear": "l1"}
    assert recipe.width == 16


def test_a_uniform_recipe_takes_the_rest_as_it_is_given(groups: Groups) -> None:
    plain = uniform_recipe(groups, 0.5, 8)
    assert plain.groups["a"] == GroupChoice(ratio=0.5, bits=8)
    rest = plain.model_dump(exclude={"groups"})
    assert rest == Recipe().model_dump(exclude={"groups"})
    given: dict[str, Any] = {
        "recovery": Recovery(finetune_steps=7), "mask": Mask(criterion="random"), "ranking": "alike",
        "order": "tune-prune-quantize", "schedule": Schedule(kind="iterative"),
        "quantization": Quantization(rounding="gptq"),
    }  # fmt: skip
    recipe = uniform_recipe(groups, 0.5, 8, **given)
    assert {name: getattr(recipe, name) for name in given} == given
