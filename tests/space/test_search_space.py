"""Search spaces: every shipped one loads and samples, parameters and recipes are inverse, faults are named."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import optuna
import pytest

from autoprune.errors import UsageError
from autoprune.search.baselines import baselines, effective_key, grid_recipes
from autoprune.search.limits import auto_cannot, check_sampler
from autoprune.space.groups import Groups, kept_count
from autoprune.space.recipe import GroupChoice, Recipe, Recovery, uniform_recipe
from autoprune.space.search_space import SearchSpace
from autoprune.space.space_files import json_schema, load_space, parse_space, shipped_spaces
from autoprune.yaml_io import read_yaml

WIDE = """
width: 4
ratios: [0.0, 0.5, 0.25]
bits: [32, 8]
criteria: {conv: [l1, l2], linear: [random]}
recovery:
  batchnorm: [true, false]
  finetune_steps: {low: 0, high: 3}
  learning_rate: {low: 0.001, high: 0.1, log: true}
  schedule: [cosine, onecycle]
  distill: [0.0, 0.5]
  temperature: [1, 4]
overrides:
  - {groups: "b*", ratios: [0.0, 0.9]}
  - {groups: "fc", bits: [32]}
"""


@pytest.fixture
def groups(make_groups: Callable[..., Groups]) -> Groups:
    return make_groups(
        a=("conv", 16, True),
        b1=("conv", 64, True),
        b2=("conv", 2, True),
        out=("conv", 32, False),
        fc=("linear", 10, True),
    )


def ask(seed: int = 0) -> Callable[[], optuna.Trial]:
    sampler = optuna.samplers.RandomSampler(seed=seed)
    return optuna.create_study(directions=["maximize", "minimize"], sampler=sampler).ask


@pytest.mark.parametrize("name", sorted(shipped_spaces()))
def test_every_shipped_space_samples_recipes_that_can_be_carried_out(name: str, groups: Groups) -> None:
    space = load_space(name).check(groups)
    trial_of = ask()
    for _ in range(100):
        trial = trial_of()
        recipe = space.suggest(trial, groups)
        recipe.check(groups)
        assert space.params_of(recipe, groups) == trial.params


@pytest.mark.parametrize("name", sorted(shipped_spaces()))
def test_every_shipped_space_contains_its_own_baselines_and_the_dense_network(
    name: str, groups: Groups
) -> None:
    space = load_space(name)
    dense = space.params_of(Recipe(), groups)
    assert dense is not None
    for ratio, bits in itertools.product(space.baselines.ratios, space.bits):
        criterion = space.criteria["conv"][0]
        recipe = uniform_recipe(
            groups, ratio, bits, criterion, space.width, space.default_recovery(),
            quantization=space.quantization.default(),
        )  # fmt: skip
        params = space.params_of(recipe, groups)
        assert params is not None
        assert params != dense


@pytest.mark.parametrize("name", sorted(shipped_spaces()))
def test_every_shipped_space_shows_its_own_command_and_fits_the_schema(name: str) -> None:
    path = shipped_spaces()[name]
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"--space {name}\n" in path.read_text(encoding="utf-8")
    assert "autoprune search --model" in header
    jsonschema.validate(read_yaml(path).values, json_schema())


def test_conditional_parameters_exist_only_where_they_matter(groups: Groups) -> None:
    space = parse_space(WIDE)
    trial_of = ask(1)
    seen: set[str] = set()
    for _ in range(200):
        trial = trial_of()
        recipe = space.suggest(trial, groups)
        params = set(trial.params)
        assert space.params_of(recipe, groups) == trial.params
        assert {"ratio:out", "bits:fc", "criterion:linear", "least_squares"}.isdisjoint(params)
        cut_conv = any(recipe.choice(name).ratio > 0 for name in ("a", "b1", "b2"))
        assert ("criterion:conv" in params) == cut_conv
        assert ("finetune_steps" in params) == recipe.prunes
        assert ("learning_rate" in params) == (recipe.prunes and recipe.recovery.finetune_steps > 0)
        assert ("temperature" in params) == ("learning_rate" in params and recipe.recovery.distill > 0)
        seen |= params
    assert {"ratio:a", "bits:out", "criterion:conv", "learning_rate", "temperature", "schedule"} <= seen


def test_only_ratios_that_make_a_difference_are_offered(groups: Groups) -> None:
    space = parse_space(WIDE)
    by_name = groups.by_name
    assert space.ratios_of(by_name["a"]) == (0.0, 0.25, 0.5)
    assert space.ratios_of(by_name["b1"]) == (0.0, 0.9)
    assert space.ratios_of(by_name["b2"]) == (0.0, 0.9)
    assert space.ratios_of(by_name["out"]) == (0.0,)
    tiny = parse_space("ratios: [0.0, 0.1, 0.2, 0.3, 0.9]\nwidth: 8\n")
    counts = [kept_count(2, ratio, 8) for ratio in tiny.ratios_of(by_name["b2"])]
    assert counts == [2, 1]


def test_a_recipe_outside_of_the_space_has_no_parameters(groups: Groups) -> None:
    space = parse_space(WIDE)
    inside = uniform_recipe(groups, 0.0, 32, "l1", 4)
    assert space.params_of(inside, groups) is not None
    outside = [
        inside.model_copy(update={"groups": {"fc": GroupChoice(bits=8)}}),
        inside.model_copy(update={"groups": {"gone": GroupChoice()}}),
        Recipe(groups={"a": GroupChoice(ratio=0.9)}, width=4, criterion={"conv": "l1"}),
        Recipe(groups={"a": GroupChoice(ratio=0.5)}, width=8, criterion={"conv": "l1"}),
        Recipe(groups={"a": GroupChoice(ratio=0.5)}, width=4, criterion={"conv": "taylor"}),
        Recipe(groups={"a": GroupChoice(ratio=0.5)}, width=4, recovery=Recovery(finetune_steps=9)),
    ]
    assert [space.params_of(recipe, groups) for recipe in outside] == [None] * len(outside)


def test_size_counts_every_recipe_once(make_groups: Callable[..., Groups]) -> None:
    groups = make_groups(a=("conv", 16, True), fc=("linear", 16, True))
    space = parse_space(
        "width: 4\nratios: [0.0, 0.5]\nbits: [8, 32]\ncriteria: {conv: [l1, l2]}\n"
        "recovery: {finetune_steps: [0, 5], learning_rate: [0.1, 0.2], distill: [0.0, 0.5], temperature: [1, 2]}\n"
    )
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        study = optuna.create_study(sampler=optuna.samplers.BruteForceSampler())
    found: set[str] = set()

    def note(trial: optuna.Trial) -> float:
        found.add(space.suggest(trial, groups).canonical_json())
        return 0.0

    study.optimize(note)
    assert space.size(groups) == pytest.approx(math.log10(len(found)))


def test_rankings_are_searched_counted_and_found_again(make_groups: Callable[..., Groups]) -> None:
    groups = make_groups(a=("conv", 16, True), fc=("linear", 16, True))
    space = parse_space("width: 4\nratios: [0.0, 0.5]\nbits: [8]\nrankings: [alike, group, global]\n")
    chosen = {}
    for ratio, ranking in itertools.product((0, 1), ("alike", "group", "global")):
        trial = optuna.trial.FixedTrial({"ratio:a": ratio, "ratio:fc": 0, "ranking": ranking})
        recipe = space.suggest(trial, groups)
        chosen[recipe.canonical_json()] = recipe.ranking
        assert space.params_of(recipe, groups) == trial.params
    assert sorted(chosen.values()) == ["alike", "alike", "global", "group"], "uncut there is nothing to rank"
    assert space.size(groups) == pytest.approx(math.log10(1 + 3 * 3))
    outside = uniform_recipe(groups, 0.5, 8, "l2", 4, space.default_recovery(), "global")
    assert parse_space("width: 4\nratios: [0.5]\nbits: [8]").params_of(outside, groups) is None
    assert len(grid_recipes(space, groups, 0)) == 1 + 3
    assert [b.recipe.ranking for b in baselines(groups, (0.5,), (8,), "l2", 4, Recovery(), "alike")][
        -1
    ] == "alike"
    keys = {effective_key(recipe, groups) for recipe in grid_recipes(space, groups, 0)}
    assert len(keys) == 1 + 3


def test_the_content_of_a_space_tells_newer_settings_only_where_they_are_set() -> None:
    assert "rankings" not in SearchSpace().content()
    assert "rankings" in SearchSpace(rankings=("global",)).content()
    assert '"width":4' in SearchSpace(width=4).content()


def test_the_default_search_refuses_what_it_cannot_search() -> None:
    assert auto_cannot(SearchSpace()) == []
    for sampler in ("tpe", "nsga2", "random", "grid"):
        check_sampler(sampler, SearchSpace(rankings=("group", "global")))
    for rankings in (("global",), ("group", "global")):
        with pytest.raises(UsageError, match="rankings = ") as caught:
            check_sampler("auto", SearchSpace(rankings=rankings))
        assert "--sampler tpe" in caught.value.hint


def test_defaults_are_the_first_choices() -> None:
    recovery = parse_space(
        "recovery: {finetune_steps: [7, 3], learning_rate: {low: 0.01, high: 1.0, log: true}}"
    )
    assert recovery.default_recovery().finetune_steps == 7
    assert recovery.default_recovery().learning_rate == pytest.approx(0.1)
    assert SearchSpace().criteria == {"conv": ("l2",), "linear": ("l2",)}


FAULTS = {
    "width: 1.5": [":1:", "width = 1.5", "integer"],
    "width: 0": [":1:", "greater than or equal to 1"],
    "ratios: [0.5, 1.5]": [":1:", "ratios.1 = 1.5", "less than or equal to 1"],
    "ratios: [.nan]": ["ratios.0 = nan"],
    "ratios: []": ["at least 1 item"],
    "ratios: [0.5, 0.5]": ["twice"],
    "\nbits: [7]": [":2:", "bits.0 = 7", "8, 16 or 32"],
    "ratio: [0.5]": [":1:", "did you mean 'ratios'"],
    "rankings: [globe]": ["'group', 'global' or 'alike'"],
    "rankings: [group, group]": ["a choice is there twice"],
    "rankings: [global]\ncriteria: {conv: [lamp]}": ["['lamp'] cannot be compared with ['l2']"],
    "criteria: {conv: [talyor]}": ["unknown criterion 'talyor'; did you mean 'taylor'?", "bn_scale"],
    "criteria: {convs: [l2]}": ["'conv' or 'linear'"],
    "recovery:\n  learning_rat: 1": [":2:", "learning_rat"],
    "recovery: {finetune_steps: -4}": ["finetune_steps = -4", "greater than or equal to 0"],
    "recovery: {finetune_steps: {low: 5, high: 1}}": ["low (5) must be below high (1)"],
    "recovery: {learning_rate: {low: 0, high: 1, log: true}}": ["above 0"],
    "recovery: {least_squares: 'yes'}": ["least_squares.0 = 'yes'", "boolean"],
    "- a": [":1:", "mapping"],
    "ratios: [1, 2\nwidth: 3": [":2:"],
}


@pytest.mark.parametrize("text", FAULTS)
def test_faults_name_line_value_and_what_is_allowed(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_space(str(path))
    assert str(path) in caught.value.message
    for part in FAULTS[text]:
        assert part in caught.value.message


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        parse_space("width: x\nbits: [7]\nratios: [2]\n")
    assert [f":{line}:" in caught.value.message for line in (1, 2, 3)] == [True] * 3


def test_overrides_must_take_effect(groups: Groups) -> None:
    with pytest.raises(UsageError, match="unknown group 'aa'; did you mean 'a'"):
        parse_space("overrides: [{groups: aa, bits: [8]}]").check(groups)
    with pytest.raises(UsageError, match="'out' cannot be pruned: makes the network's output"):
        parse_space("overrides: [{groups: out, ratios: [0.5]}]").check(groups)
    space = parse_space(
        "overrides: [{groups: '*', bits: [32]}, {groups: 'b?', bits: [8], ratios: [0.5]}]"
    ).check(groups)
    assert (space.bits_of(groups.by_name["a"]), space.bits_of(groups.by_name["b1"])) == ((32,), (8,))
    assert space.ratios_of(groups.by_name["b1"]) == (0.5,)


def test_unknown_names_answer_with_near_matches() -> None:
    with pytest.raises(UsageError, match="unknown search space 'defualt'; did you mean 'default'"):
        load_space("defualt")


def test_schema_refuses_what_loading_refuses() -> None:
    bad: list[dict[str, Any]] = [
        {"width": 0},
        {"ratio": [0.5]},
        {"bits": [7]},
        {"recovery": {"distill": "x"}},
    ]
    for values in bad:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(values, json_schema())


def test_bits_and_their_making_are_searched_and_counted(groups: Groups) -> None:
    space = parse_space(
        "ratios: [0.0]\nbits: [4, 32]\nactivation_bits: [8, 32]\n"
        "quantization: {scale: [minmax, percentile], percentile: [99.0, 99.9], rounding: gptq}"
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(600):
        trial = study.ask()
        recipe = space.suggest(trial, groups)
        study.tell(trial, 0.0)
        assert space.params_of(recipe, groups) == trial.params
        seen.add(recipe.canonical_json())
    # Each group in float, or in 4 bits with inputs of 8 or 32: one of three makings wherever one has 4 bits.
    count = len(groups.groups)
    assert round(10 ** space.size(groups)) == 1 + (3**count - 1) * 3
    assert space.quantization.count() == 3
    assert len(seen) > 100
    assert len(grid_recipes(space, groups, 0)) == 2 * 3 + 1


def test_a_space_of_before_knows_nothing_of_quantization() -> None:
    assert "quantization" not in SearchSpace().content()
    assert "activation_bits" not in SearchSpace().content()
    assert "quantization" in parse_space("quantization: {rounding: gptq}").content()


def test_the_making_of_integers_tells_what_is_wrong() -> None:
    with pytest.raises(UsageError, match=r"quantization.scale.0 = 'max'"):
        parse_space("quantization: {scale: max}")
    with pytest.raises(UsageError, match="percentile"):
        parse_space("quantization: {percentile: 20}")
    with pytest.raises(UsageError, match="a choice is there twice"):
        parse_space("quantization: {rounding: [gptq, gptq]}")


EVERY = """
ratios: [0.0]
bits: [4, 16, 32]
activation_bits: [16, 32]
quantization: {
  scale: [minmax, percentile], percentile: [99.0, 99.9], block_size: [null, 64], half: [float16, bfloat16],
  activations: [static, dynamic], equalize: [none, smooth], smooth_alpha: [0.4, 0.5],
}
"""


def test_every_setting_of_integers_is_searched_where_it_matters(groups: Groups) -> None:
    space = parse_space(EVERY)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen: dict[str, set[object]] = {}
    for _ in range(300):
        trial = study.ask()
        recipe = space.suggest(trial, groups)
        study.tell(trial, 0.0)
        assert space.params_of(recipe, groups) == trial.params
        assert Recipe.model_validate(recipe.content()) == recipe
        recipe.check(groups)
        widths = {choice.bits for choice in recipe.groups.values()}
        assert ("quantization:half" in trial.params) == (16 in widths)
        assert ("quantization:block_size" in trial.params) == (4 in widths)
        assert ("quantization:smooth_alpha" in trial.params) == (recipe.quantization.equalize == "smooth")
        for name, value in recipe.quantization.model_dump().items():
            seen.setdefault(name, set()).add(value)
    assert seen["block_size"] == {None, 64}
    assert seen["half"] == {"float16", "bfloat16"}
    assert seen["activations"] == {"static", "dynamic"}
    assert seen["smooth_alpha"] == {0.4, 0.5}


def test_ways_to_make_bits_are_counted_as_they_differ() -> None:
    space = parse_space(EVERY).quantization
    assert space.count() == 3 * 2 * 2 * 3
    # Two groups: 32 or 16 bits, or integers of two formats.
    kinds = [(1, 1, 2), (1, 0, 2)]
    found = 0
    for one in "f" + "h" + "ii":
        for other in "f" + "ii":
            chosen = {one, other}
            found += (space.count() if "i" in chosen else 1) * (2 if "h" in chosen else 1)
    assert space.combinations(kinds) == found
    assert [len(space.of_bits(bits)) for bits in (4, 16, 32)] == [36, 2, 1]


def test_spaces_refuse_integers_that_no_kernel_takes() -> None:
    with pytest.raises(UsageError, match=r"block_size \[32\] .* activation_bits \[8\] holds 8"):
        parse_space("quantization: {block_size: 32}")
    assert parse_space("activation_bits: [32]\nquantization: {block_size: 32}").quantization.blocks == [32]
    assert parse_space("bits: [32]\nquantization: {block_size: 32}").quantization.blocks == [32]
    with pytest.raises(UsageError, match="aware 0 alone, or equalize none alone"):
        parse_space("quantization: {equalize: [none, both], aware: 0.5}")
    with pytest.raises(UsageError, match=r"quantization.block_size.0 = 48"):
        parse_space("quantization: {block_size: 48}")


def test_a_space_of_before_is_known_by_the_same_text() -> None:
    """Studies compare spaces by their text: settings that came later say nothing while they are as by default."""
    made = parse_space("quantization: {rounding: gptq}").content()
    assert '"quantization":{"scale":["minmax"],"percentile":[99.9],"rounding":["gptq"]' in made
    assert "block_size" not in made and "equalize" not in made
    assert "block_size" in parse_space("bits: [32]\nquantization: {block_size: 32}").content()
