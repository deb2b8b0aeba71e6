"""Baselines and the equality of candidates."""

from __future__ import annotations

from autoprune.search.baselines import architecture_key, baselines, effective_key, grid_recipes
from autoprune.space.quantization import Quantization
from autoprune.space.recipe import GroupChoice, Recipe, Recovery, uniform_recipe
from autoprune.space.space_files import parse_space
from tests.search.fakes import make_groups

GROUPS = make_groups()


def test_int8_first_then_ratios_from_the_mildest() -> None:
    found = baselines(GROUPS, (0.5, 0.25), (8, 32), "l2", 8, Recovery())
    assert [b.label for b in found] == [
        "int8",
        "uniform 0.25 int8",
        "uniform 0.25",
        "uniform 0.5 int8",
        "uniform 0.5",
    ]
    for baseline in found:
        baseline.recipe.check(GROUPS)


def test_a_space_without_int8_has_no_int8_baselines() -> None:
    assert [b.label for b in baselines(GROUPS, (0.5,), (32,), "l2", 8, Recovery())] == ["uniform 0.5"]


def test_ratios_that_keep_the_same_count_are_the_same_candidate() -> None:
    one, other = (uniform_recipe(GROUPS, ratio, 8) for ratio in (0.5, 0.51))
    assert effective_key(one, GROUPS) == effective_key(other, GROUPS)
    assert effective_key(one, GROUPS) != effective_key(uniform_recipe(GROUPS, 0.5, 32), GROUPS)


def test_bits_do_not_change_the_network_but_the_criterion_does() -> None:
    int8, float32 = uniform_recipe(GROUPS, 0.5, 8), uniform_recipe(GROUPS, 0.5, 32)
    assert architecture_key(int8, GROUPS) == architecture_key(float32, GROUPS)
    assert architecture_key(int8, GROUPS) != architecture_key(uniform_recipe(GROUPS, 0.5, 8, "l1"), GROUPS)


def test_criterion_of_a_type_that_nothing_prunes_makes_no_difference() -> None:
    choices = {"conv0": GroupChoice(ratio=0.5)}
    one = Recipe(groups=choices, criterion={"conv": "l2", "linear": "l1"})
    other = Recipe(groups=choices, criterion={"conv": "l2", "linear": "taylor"})
    assert effective_key(one, GROUPS) == effective_key(other, GROUPS)


def test_what_makes_integers_makes_another_artifact() -> None:
    four = uniform_recipe(GROUPS, 0.0, 4, "l2")
    by_gptq = four.model_copy(update={"quantization": Quantization(rounding="gptq")})
    in_float = uniform_recipe(GROUPS, 0.0, 4, "l2", activation_bits=32)
    keys = {
        effective_key(recipe, GROUPS)
        for recipe in (four, by_gptq, in_float, uniform_recipe(GROUPS, 0.0, 8, "l2"))
    }
    assert len(keys) == 4
    # Where nothing is an integer, it says nothing.
    dense = uniform_recipe(GROUPS, 0.0, 32, "l2")
    other = dense.model_copy(update={"quantization": Quantization(rounding="gptq")})
    assert effective_key(other, GROUPS) == effective_key(dense, GROUPS)


def test_fewer_bits_alone_are_points_of_their_own() -> None:
    how = Quantization(rounding="gptq")
    found = baselines(GROUPS, (0.5,), (4, 8, 3), "l2", 8, Recovery(), quantization=how)
    assert [b.label for b in found] == ["int8", "int4", "int3", "uniform 0.5 int8"]
    assert [b.recipe.quantization for b in found[:3]] == [how, how, how]
    assert not any(b.recipe.prunes for b in found[:3])


def test_the_grid_tries_schedules_for_single_weights_too() -> None:
    space = parse_space(
        "ratios: [0.0]\nbits: [32]\nsparsities: [0.0, 0.5]\nschedules: {kind: [one_shot, gradual]}"
    )
    found = grid_recipes(space, GROUPS, 0)
    assert sorted((r.masks, r.schedule.kind) for r in found) == [
        (False, "one_shot"),
        (True, "gradual"),
        (True, "one_shot"),
    ]


def test_trained_integers_depend_on_what_their_layers_read() -> None:
    how = Quantization(aware=1.0)
    keys = {
        architecture_key(uniform_recipe(GROUPS, 0.0, 4, "l2", activation_bits=read, quantization=how), GROUPS)
        for read in (8, 32)
    }  # fmt: skip
    assert len(keys) == 2


def test_every_setting_of_integers_makes_another_artifact_where_it_matters() -> None:
    four = uniform_recipe(GROUPS, 0.0, 4, "l2", activation_bits=32)
    differ: list[dict[str, object]] = [
        {"block_size": 32}, {"block_size": 64}, {"equalize": "cross_layer"}, {"equalize": "smooth"},
        {"equalize": "smooth", "smooth_alpha": 0.7}, {"scale": "percentile", "percentile": 99.0},
    ]  # fmt: skip
    same: list[dict[str, object]] = [
        {"half": "bfloat16"}, {"smooth_alpha": 0.7}, {"percentile": 99.0}, {"activations": "dynamic"},
    ]  # fmt: skip

    def key(recipe: Recipe, how: dict[str, object]) -> str:
        made = recipe.model_copy(update={"quantization": Quantization.model_validate(how)})
        return effective_key(made, GROUPS)

    assert len({key(four, how) for how in [{}, *differ]}) == 1 + len(differ)
    assert {key(four, how) for how in same} == {key(four, {})}
    # Ranges of inputs matter where these have 8 bits, halves where weights have 16.
    int8, half = uniform_recipe(GROUPS, 0.0, 8, "l2"), uniform_recipe(GROUPS, 0.0, 16, "l2")
    assert key(int8, {"activations": "dynamic"}) != key(int8, {})
    assert key(half, {"half": "bfloat16"}) != key(half, {})
    assert {key(half, how) for how in [*differ, *same[1:]]} == {key(half, {})}
    assert {key(uniform_recipe(GROUPS, 0.0, 32, "l2"), how) for how in [*differ, *same]} == {
        key(uniform_recipe(GROUPS, 0.0, 32, "l2"), {})
    }


def test_bits_of_inputs_make_another_artifact() -> None:
    keys = {
        effective_key(uniform_recipe(GROUPS, 0.0, 4, "l2", activation_bits=read), GROUPS)
        for read in (8, 16, 32)
    }  # fmt: skip
    assert len(keys) == 3


def test_baselines_read_what_the_space_lets_layers_read() -> None:
    how = Quantization(block_size=32)
    found = baselines(GROUPS, (0.5,), (4, 8), "l2", 8, Recovery(), quantization=how, activation_bits=32)
    for baseline in found:
        baseline.recipe.check(GROUPS)
        assert {c.activation_bits for c in baseline.recipe.groups.values()} == {32}
