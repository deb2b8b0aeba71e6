"""A search space on groups: what each may get, how many recipes that makes, and what cannot go together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from optuna.trial import FixedTrial

from autoprune.errors import UsageError
from autoprune.space.groups import Group, Groups, Member
from autoprune.space.mask import Mask
from autoprune.space.quantization import Quantization
from autoprune.space.recipe import GroupChoice, Recipe, Recovery
from autoprune.space.schedule import Schedule
from autoprune.space.search_space import SearchSpace
from autoprune.space.space_files import parse_space

FLOAT = "bits: [32]\n"


@pytest.fixture
def groups(make_groups: Callable[..., Groups]) -> Groups:
    """``a`` lies in a block, nothing but heads' places are in ``heads``, ``out`` is left alone."""
    made = make_groups(
        a=("conv", 16, True), b=("conv", 64, True), fc=("linear", 32, True), out=("linear", 10, False)
    )
    member = Member(layer="qkv", kind="linear", axis="out", index_map=((0,), (1,)), own=False)
    heads = Group(name="heads", type="linear", size=16, members=(member,), prunable=True)
    first = made.groups[0].model_copy(update={"block": "block"})
    return Groups(groups=(first, *made.groups[1:], heads), input_shape=made.input_shape)


def only(groups: Groups, *names: str) -> Groups:
    return Groups(groups=tuple(groups.by_name[name] for name in names), input_shape=groups.input_shape)


def recipes(space: SearchSpace, groups: Groups) -> float:
    return 10 ** space.size(groups)


def test_the_last_override_that_names_a_setting_wins(groups: Groups) -> None:
    space = parse_space(
        "ratios: [0.25, 0.0]\nbits: [32, 8]\nsparsities: [0.5, 0.0]\nrank_ratios: [0.4, 0.0]\noverrides:\n"
        "- {groups: '*', ratios: [0.75], bits: [16, 4], sparsities: [0.3, 0.2], rank_ratios: [0.2, 0.1]}\n"
        "- {groups: '[ab]', ratios: [0.5, 0.25], sparsities: [0.0]}\n"
        "- {groups: 'b', bits: [2], rank_ratios: [0.3]}\n"
    )
    found = {
        g.name: (space.ratios_of(g), space.bits_of(g), space.sparsities_of(g), space.rank_ratios_of(g))
        for g in groups.groups
    }
    assert found == {
        "a": ((0.25, 0.5), (4, 16), (0.0,), (0.1, 0.2)),
        "b": ((0.25, 0.5), (2,), (0.0,), (0.3,)),
        "fc": ((0.75,), (4, 16), (0.2, 0.3), (0.1, 0.2)),
        "out": ((0.0,), (4, 16), (0.2, 0.3), (0.1, 0.2)),
        "heads": ((0.75,), (32,), (0.2, 0.3), (0.1, 0.2)),
    }
    assert space.every_sparsity == (0.5, 0.0, 0.3, 0.2)


def test_a_ratio_of_one_is_for_groups_in_a_block(groups: Groups) -> None:
    space = parse_space("ratios: [1.0, 0.5]")
    a, b = groups.by_name["a"], groups.by_name["b"]
    assert (space.ratios_of(a), space.ratios_of(b)) == ((0.5, 1.0), (0.5,))
    # Where nothing else is left the group is whole.
    assert parse_space("ratios: [1.0]").ratios_of(b) == (0.0,)
    # Of ratios that keep the same count the smallest is there.
    assert parse_space("width: 16\nratios: [0.3, 0.2, 0.25, 0.6]").ratios_of(b) == (0.2, 0.6)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("groups: c, bits: [8]", "unknown group 'c'"),
        ("groups: 'b', ratios: [1.0]", "group 'b' gives ratio 1.0 alone, but 'b' lies in no block"),
        ("groups: '[bf]*', ratios: [1.0]", r"group '\[bf\]\*' gives ratio 1.0 alone, but 'b' lies in no block"),
        ("groups: 'out', ratios: [0.0, 0.5]", r"ratios \[0.0, 0.5\], but 'out' cannot be pruned: makes the .*\[0.0\]"),
    ],
)  # fmt: skip
def test_overrides_that_cannot_take_effect_are_refused(override: str, says: str, groups: Groups) -> None:
    with pytest.raises(UsageError, match=says):
        parse_space(f"overrides: [{{{override}}}]").check(groups)


@pytest.mark.parametrize(
    "override",
    [
        "groups: a, ratios: [1.0]",
        "groups: '*', ratios: [1.0]",
        "groups: b, ratios: [0.5, 1.0]",
        "groups: out, ratios: [0.0]",
        "groups: '*', ratios: [0.5]",
        "groups: out, bits: [8]",
    ],
)
def test_overrides_that_can_take_effect_are_taken(override: str, groups: Groups) -> None:
    space = parse_space(f"overrides: [{{{override}}}]")
    assert space.check(groups) is space


def test_an_automatic_width_is_remembered_until_it_is_settled() -> None:
    space = parse_space("width: auto")
    assert (space.width, space.has_automatic_width) == (8, True)
    assert space.content() == SearchSpace().content() + " width: auto"
    settled = space.with_width(16)
    assert (settled.width, settled.has_automatic_width) == (16, False)
    assert settled.content() == SearchSpace(width=16).content()
    assert not parse_space("width: 8").has_automatic_width
    with pytest.raises(UsageError, match="allowed: a whole number from 1 to 1024, or auto"):
        parse_space("width: wide")


def test_a_space_trains_where_its_default_does() -> None:
    assert parse_space("recovery: {finetune_steps: 1}").trains
    assert not parse_space("recovery: {finetune_steps: [0, 9]}").trains


def test_text_holds_newer_settings_only_where_they_are_set() -> None:
    for text, words in {
        "activation_bits: [16]": ["activation_bits"],
        "recovery: {feature_distill: 1.0}": ["feature_distill"],
        "overrides: [{groups: a, sparsities: [0.5]}]": ["sparsities"],
        "overrides: [{groups: a, rank_ratios: [0.5]}]": ["rank_ratios"],
        "masks: {criterion: random}": ["masks"],
        "rank_ratios: [0.5]\norders: [tune-prune-quantize]": ["rank_ratios", "orders"],
    }.items():
        content = parse_space(text).content()
        later = (
            "activation_bits",
            "feature_distill",
            "sparsities",
            "rank_ratios",
            "masks",
            "orders",
            "schedules",
        )
        assert [word for word in later if word in content] == sorted(words, key=later.index)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rungs: [{steps: 0}, {steps: 9}, {steps: 9}]", r"rise from rung to rung; got \[0, 9, 9\]"),
        ("rungs: [{steps: 1}, {steps: 9}]", r"must start with 0, the screen, .* got \[1, 9\]"),
        ("rungs: [{steps: 0}, {steps: 9, examples: 50}, {steps: 20}]", "examples is for the screen alone"),
        (
            "schedules: {kind: [one_shot, gradual]}\nrecovery: {finetune_steps: {low: 0, high: 5}}",
            "schedules.kind 'gradual' prunes while it trains, but recovery.finetune_steps may be 0",
        ),
        (
            "orders: [prune-tune-quantize, tune-prune-quantize]\nschedules: {kind: [one_shot, iterative]}",
            r"schedules.kind \['one_shot', 'iterative'\] train after the cut",
        ),
        (
            "orders: [tune-prune-quantize]\nsparsities: [0.0, 0.5]\nmasks: {criterion: [random, movement]}",
            "masks.criterion 'movement' trains after the cut",
        ),
        (
            "rankings: [group, global]\ncriteria: {conv: [lamp, taylor, l2], linear: [l1, random, fpgm]}",
            r"rankings \['group', 'global'\] .* \['lamp'\] cannot be .* \['fpgm', 'l1', 'l2', 'random', 'taylor'\]",
        ),
        (
            "bits: [32]\noverrides: [{groups: a, bits: [8]}]\nquantization: {block_size: [null, 32]}",
            r"quantization.block_size \[32\] .* activation_bits \[8\] holds 8",
        ),
        ("sparsities: [0.5]\nmasks: {criterion: movement}\nrecovery: {finetune_steps: [9, 0]}", "'movement'"),
        (
            "sparsities: [0.5]\nmasks: {criterion: movement}\nrecovery: {finetune_steps: {low: 0, high: 9}}",
            "'movement'",
        ),
    ],
)
def test_choices_that_cannot_go_together_are_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_space(text)


@pytest.mark.parametrize(
    "text",
    [
        "rungs: [{steps: 0, examples: 50}, {steps: 1}]",
        "schedules: {kind: [one_shot, gradual]}\nrecovery: {finetune_steps: {low: 1, high: 5}}",
        "schedules: {kind: [one_shot, gradual]}\nrecovery: {finetune_steps: [1, 5]}",
        "schedules: {kind: [iterative]}\nrecovery: {finetune_steps: [0]}",
        "orders: [prune-tune-quantize]\nschedules: {kind: iterative}",
        "orders: [tune-prune-quantize]\nsparsities: [0.5]\nmasks: {criterion: random}",
        "orders: [prune-tune-quantize]\nsparsities: [0.5]\nmasks: {criterion: movement}",
        "rankings: [group]\ncriteria: {conv: [lamp]}",
        "rankings: [global]\ncriteria: {conv: [lamp], linear: [lamp]}",
        "rankings: [global]\ncriteria: {conv: [l1], linear: [l2]}",
        "bits: [16, 32]\nquantization: {block_size: 32}",
        "bits: [4]\nactivation_bits: [16]\nquantization: {block_size: 32}",
        "sparsities: [0.5]\nmasks: {criterion: movement}\nrecovery: {finetune_steps: {low: 1, high: 9}}",
        "sparsities: [0.5]\nmasks: {criterion: movement}\nrecovery: {finetune_steps: [9, 1]}",
    ],
)
def test_choices_that_can_go_together_are_taken(text: str) -> None:
    parse_space(text)


@pytest.mark.parametrize(
    ("text", "names", "count"),
    [
        (FLOAT + "ratios: [0.0]", "a b fc out", 1),
        (FLOAT + "ratios: [0.0, 0.5]", "a b fc out", 8),
        (FLOAT + "ratios: [0.25, 0.5]", "a b fc out", 8),
        # Each way to cut has every recovery; what is not cut has none.
        (FLOAT + "ratios: [0.0, 0.5]\nrecovery: {batchnorm: [true, false]}", "a b out", 1 + 3 * 2),
        (FLOAT + "ratios: [0.0, 0.5]\nrankings: [group, alike]", "a b", 1 + 3 * 2),
        (FLOAT + "ratios: [0.0, 0.5]\norders: [prune-tune-quantize, tune-prune-quantize]", "a b", 1 + 3 * 2),
        # A criterion of a type matters where a group of it is cut.
        (FLOAT + "ratios: [0.0, 0.5]\ncriteria: {conv: [l1, l2], linear: [l1, l2, fpgm]}", "a b", 1 + 3 * 2),
        (
            FLOAT + "ratios: [0.0, 0.5]\ncriteria: {conv: [l1, l2], linear: [l1, l2, fpgm]}",
            "a fc",
            (1 + 2) * (1 + 3),
        ),
        (FLOAT + "ratios: [0.5, 0.75]\ncriteria: {conv: [l1, l2]}", "a", 2 * 2),
        # Masked or not, of two groups each, by three criteria.
        (FLOAT + "ratios: [0.0]\nsparsities: [0.0, 0.5]\nmasks: {criterion: [random, taylor, fisher]}", "a b",
         1 + 3 * 3),
        (FLOAT + "ratios: [0.0]\nsparsities: [0.5]\nmasks: {criterion: [random, taylor, fisher]}", "a b", 3),
        # Schedules are for what is cut or masked.
        (FLOAT + "ratios: [0.0, 0.5]\nschedules: {kind: [one_shot, iterative]}", "a b", 1 + 3 * 2),
        (FLOAT + "ratios: [0.0]\nsparsities: [0.0, 0.5]\nschedules: {kind: [one_shot, iterative]}", "a", 1 + 2),
        (FLOAT + "ratios: [0.0]\nrank_ratios: [0.0, 0.5]\nschedules: {kind: [one_shot, iterative]}", "a", 2),
        (FLOAT + "ratios: [0.0]\nrank_ratios: [0.0, 0.5]\nrecovery: {batchnorm: [true, false]}", "a b", 1 + 3 * 2),
        (FLOAT + "ratios: [0.0]\nrank_ratios: [0.5]\nrecovery: {batchnorm: [true, false]}", "a b", 2),
        # Of bits each combination; of integers by what reads them too.
        ("ratios: [0.0]\nbits: [8, 32]", "a b", 4),
        ("ratios: [0.0]\nbits: [4, 8, 16, 32]\nactivation_bits: [16, 32]", "a", 2 * 2 + 2),
        ("ratios: [0.0]\nbits: [8, 16, 32]\nquantization: {half: [float16, bfloat16]}", "a", 1 + 2 + 1),
        ("ratios: [0.0]\nbits: [8]\nquantization: {rounding: [nearest, gptq]}", "a b", 2),
        # Places of heads have no bits of their own.
        ("ratios: [0.0]\nbits: [8, 16, 32]", "a heads", 3),
        (FLOAT + "ratios: [0.0, 0.5, 1.0]", "a b", 3 * 2),
        ("ratios: [0.0, 0.5]\nbits: [8, 32]\nsparsities: [0.0, 0.5]\nrecovery: {batchnorm: [true, false]}", "a",
         2 * (1 + 3 * 2)),
    ],
)  # fmt: skip
def test_recipes_that_differ_are_counted(text: str, names: str, count: int, groups: Groups) -> None:
    assert recipes(parse_space(text), only(groups, *names.split())) == pytest.approx(count)


def test_many_groups_make_a_number_that_no_float_holds(groups: Groups) -> None:
    one = groups.by_name["a"]
    many = Groups(
        groups=tuple(one.model_copy(update={"name": f"g{i}"}) for i in range(2000)), input_shape=(3,)
    )
    assert parse_space(FLOAT + "ratios: [0.0, 0.5]").size(many) == pytest.approx(2000 * math.log10(2))


WHOLE = """
ratios: [0.0, 0.5]
bits: [4, 16, 32]
activation_bits: [8, 16]
sparsities: [0.0, 0.5]
rank_ratios: [0.0, 0.25]
criteria: {conv: [l1, fpgm], linear: [l2]}
rankings: [group, alike]
orders: [prune-tune-quantize, tune-prune-quantize]
masks: {criterion: [random, taylor]}
schedules: {kind: one_shot}
quantization: {rounding: [nearest, gptq], half: [float16, bfloat16]}
recovery: {finetune_steps: [0, 1]}
"""


def test_parameters_make_the_recipe_that_they_name(groups: Groups) -> None:
    some = only(groups, "a", "fc", "heads")
    space = parse_space(WHOLE)
    params: dict[str, Any] = {
        "ratio:a": 1, "bits:a": 4, "activation_bits:a": 1, "sparsity:a": 1, "rank:a": 0, "criterion:conv": "fpgm",
        "ratio:fc": 0, "bits:fc": 16, "sparsity:fc": 0, "rank:fc": 1, "ratio:heads": 0, "sparsity:heads": 0,
        "rank:heads": 0, "ranking": "alike", "mask:criterion": "taylor", "finetune_steps": 1,
        "order": "tune-prune-quantize", "quantization:rounding": "gptq", "quantization:half": "bfloat16",
    }  # fmt: skip
    trial = FixedTrial(params)
    recipe = space.suggest(trial, some)
    assert recipe == Recipe(
        groups={
            "a": GroupChoice(ratio=0.5, bits=4, activation_bits=16, sparsity=0.5),
            "fc": GroupChoice(bits=16, rank_ratio=0.25),
            "heads": GroupChoice(),
        },
        criterion={"conv": "fpgm", "linear": "l2"},
        mask=Mask(criterion="taylor"),
        ranking="alike",
        order="tune-prune-quantize",
        recovery=Recovery(finetune_steps=1),
        quantization=Quantization(rounding="gptq", half="bfloat16"),
    )
    assert trial.params == params
    assert space.params_of(recipe, some) == params


def test_inputs_are_chosen_where_weights_are_integers(groups: Groups) -> None:
    some = only(groups, "a")
    space = parse_space("ratios: [0.0]\nbits: [8, 16]\nactivation_bits: [16, 32]")
    assert (
        space.suggest(FixedTrial({"bits:a": 8, "activation_bits:a": 1}), some).choice("a").activation_bits
        == 32
    )
    assert space.suggest(FixedTrial({"bits:a": 16}), some).choice("a").activation_bits == 16


def test_what_is_left_whole_has_no_further_parameters(groups: Groups) -> None:
    some = only(groups, "a")
    space = parse_space(WHOLE)
    params: dict[str, Any] = {"ratio:a": 0, "bits:a": 32, "sparsity:a": 0, "rank:a": 0}
    recipe = space.suggest(FixedTrial(params), some)
    # Everything else is as by its first choice, or as by default.
    assert recipe == Recipe(
        groups={"a": GroupChoice()},
        criterion={"conv": "l1", "linear": "l2"},
        recovery=Recovery(finetune_steps=0),
    )
    assert space.params_of(recipe, some) == params
    assert space.params_of(Recipe(width=4), some) == params


def test_trained_integers_are_recovered_without_a_cut(groups: Groups) -> None:
    some = only(groups, "a")
    space = parse_space(
        "ratios: [0.0, 0.5]\nbits: [4]\nquantization: {aware: [0.0, 0.5]}\nrecovery: {finetune_steps: [5, 9]}"
    )
    recipe = space.suggest(FixedTrial({"ratio:a": 0, "quantization:aware": 1, "finetune_steps": 1}), some)
    assert recipe.recovery.finetune_steps == 9 and recipe.prunes
    plain = space.suggest(FixedTrial({"ratio:a": 0, "quantization:aware": 0}), some)
    assert plain.recovery.finetune_steps == 5 and not plain.prunes


def test_a_recipe_is_inside_by_its_effect(groups: Groups) -> None:
    some = only(groups, "a", "fc")
    space = parse_space("ratios: [0.0, 0.5]\nbits: [8, 32]\ncriteria: {conv: [l1, l2]}\n")

    def params(choice: dict[str, Any], **more: Any) -> dict[str, Any] | None:
        return space.params_of(Recipe.model_validate({"groups": {"a": choice}, **more}), some)

    whole = {"ratio:a": 0, "bits:a": 32, "ratio:fc": 0, "bits:fc": 32}
    assert params({}) == whole
    assert params({"bits": 8}) == {**whole, "bits:a": 8}
    cut = {**whole, "ratio:a": 1, "criterion:conv": "l2"}
    assert params({"ratio": 0.5}) == cut
    # 0.45 keeps as many as 0.5.
    assert params({"ratio": 0.45}) == cut
    # The type's own criterion may be written beside the group.
    assert params({"ratio": 0.5, "criterion": "l2"}) == cut
    assert params({"ratio": 0.5, "criterion": "l1"}) is None
    assert params({"ratio": 0.5}, criterion={"conv": "fpgm"}) is None
    assert params({"ratio": 0.5}, criterion={"conv": "l1"}) == {**cut, "criterion:conv": "l1"}
    assert params({"ratio": 0.25}) is None
    assert params({"bits": 16}) is None
    assert params({"bits": 8, "activation_bits": 16}) is None
    assert params({"activation_bits": 16}) == whole, "inputs of float weights say nothing"
    assert params({"sparsity": 0.5}) is None
    assert params({"rank_ratio": 0.5}) is None
    # The width, the ranking, the order and the recovery of what is not cut say nothing.
    said: dict[str, Any] = {
        "width": 4, "ranking": "global", "order": "tune-prune-quantize", "recovery": {"finetune_steps": 9},
        "schedule": {"kind": "iterative"},
    }  # fmt: skip
    assert params({}, **said) == whole
    for name, value in said.items():
        assert params({"ratio": 0.5}, **{name: value}) is None
    # Nor does an order without steps.
    steps = parse_space("ratios: [0.5]\nbits: [32]\nrecovery: {finetune_steps: 0}")
    untrained = Recipe(
        groups={"a": GroupChoice(ratio=0.5), "fc": GroupChoice(ratio=0.5)},
        recovery=Recovery(finetune_steps=0),
        order="tune-prune-quantize",
    )
    assert steps.params_of(untrained, some) == {}
    assert space.params_of(Recipe(groups={"gone": GroupChoice()}), some) is None


def test_masks_and_their_schedule_are_inside_or_not(groups: Groups) -> None:
    some = only(groups, "a")
    space = parse_space(
        FLOAT + "ratios: [0.0]\nsparsities: [0.0, 0.5]\nmasks: {criterion: [random, taylor]}\n"
        "schedules: {kind: [iterative, one_shot]}\nrecovery: {finetune_steps: [5, 9]}"
    )
    masked = Recipe(
        groups={"a": GroupChoice(sparsity=0.5)}, mask=Mask(criterion="taylor"), recovery=Recovery(finetune_steps=9)
    )  # fmt: skip
    params = {"sparsity:a": 1, "mask:criterion": "taylor", "schedules:kind": "one_shot", "finetune_steps": 1}
    assert space.params_of(masked, some) == params
    assert space.suggest(FixedTrial(params), some) == masked
    assert space.params_of(masked.model_copy(update={"mask": Mask()}), some) is None
    gradual = masked.model_copy(update={"schedule": Schedule(kind="gradual")})
    assert space.params_of(gradual, some) is None
    assert space.params_of(Recipe(mask=Mask(criterion="fisher")), some) == {"sparsity:a": 0}
