"""Parts of a search space by themselves: what they choose, count and give back, against counts by hand."""

from __future__ import annotations

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial
from pydantic import ValidationError

from autoprune.errors import UsageError
from autoprune.space.choices import RecoverySpace, choice_params, suggest_choice
from autoprune.space.mask import Mask, check_share
from autoprune.space.mask_space import MaskSpace
from autoprune.space.quantization import Quantization, computed_in
from autoprune.space.quantization_space import QuantizationSpace
from autoprune.space.recipe import Recovery
from autoprune.space.schedule import Schedule
from autoprune.space.schedule_space import ScheduleSpace


def recovery_space(**choices: object) -> RecoverySpace:
    return RecoverySpace.model_validate(choices)


def asked() -> optuna.Trial:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()


def test_numbers_are_indices_in_their_order_and_names_categories() -> None:
    trial = asked()
    suggest_choice(trial, "numbers", (8, 2, 4))
    suggest_choice(trial, "names", ("b", "a"))
    suggest_choice(trial, "switch", (True, False))
    assert suggest_choice(trial, "one", (5,)) == 5
    assert trial.distributions == {
        "numbers": IntDistribution(0, 2),
        "names": CategoricalDistribution(("b", "a")),
        "switch": CategoricalDistribution((True, False)),
    }
    assert [suggest_choice(FixedTrial({"n": i}), "n", (8, 2, 4)) for i in range(3)] == [2, 4, 8]
    assert choice_params("n", (8, 2, 4), 4) == {"n": 1}
    assert choice_params("n", (True, False), False) == {"n": False}
    assert choice_params("n", (4,), 4) == {}
    assert choice_params("n", (4,), 5) is None


def test_ranges_are_asked_for_on_their_own_scale() -> None:
    for log in (False, True):
        space = recovery_space(
            finetune_steps={"low": 1, "high": 9, "log": log},
            learning_rate={"low": 0.1, "high": 1, "log": log},
        )
        trial = asked()
        space.suggest(trial)
        assert trial.distributions == {
            "finetune_steps": IntDistribution(1, 9, log=log),
            "learning_rate": FloatDistribution(0.1, 1.0, log=log),
        }
    steps, rates = space.finetune_steps, space.learning_rate
    assert [choice_params("n", steps, value) for value in (0, 1, 9, 10)] == [None, {"n": 1}, {"n": 9}, None]
    assert [choice_params("n", rates, value) for value in (0.09, 0.1, 1.0, 1.1)] == [
        None,
        {"n": 0.1},
        {"n": 1.0},
        None,
    ]


def test_the_default_is_the_first_choice_and_of_a_range_its_middle() -> None:
    linear = recovery_space(finetune_steps={"low": 2, "high": 9}, distill={"low": 0.2, "high": 0.6}).default()
    assert linear.finetune_steps == 5 and linear.distill == pytest.approx(0.4)
    log = recovery_space(
        finetune_steps={"low": 4, "high": 100, "log": True}, temperature={"low": 1, "high": 16, "log": True}
    ).default()
    assert log.finetune_steps == 20 and log.temperature == pytest.approx(4.0)
    assert recovery_space(clip_norm=[3.0, 1.0], batchnorm=[False, True]).default() == Recovery(
        clip_norm=3.0, batchnorm=False
    )


def test_a_fault_of_a_choice_is_told_in_one_line() -> None:
    for space, name, value in (
        (RecoverySpace, "learning_rate", {"low": 0.1, "high": 20.0}),
        (ScheduleSpace, "strength", {"low": 0.1, "high": 20.0}),
    ):
        with pytest.raises(ValidationError) as caught:
            space.model_validate({name: value})
        fault = caught.value.errors()[0]["msg"]
        assert fault == f"Value error, {name} = 20.0: Input should be less than or equal to 10"
    with pytest.raises(ValidationError, match=r"distill: a choice is there twice: \[0\.5, 0\.5\]"):
        recovery_space(distill=[0.5, 0.5])
    with pytest.raises(ValidationError, match=r"rounds: a choice is there twice: \[3, 3\]"):
        ScheduleSpace.model_validate({"rounds": [3, 3]})
    with pytest.raises(ValidationError, match=r"rounding: a choice is there twice: \['gptq', 'gptq'\]"):
        QuantizationSpace.model_validate({"rounding": ["gptq", "gptq"]})


@pytest.mark.parametrize(
    ("choices", "count"),
    [
        ({}, 1),
        ({"least_squares": [True, False], "batchnorm": [True, False]}, 4),
        ({"finetune_steps": [0, 1, 2]}, 3),
        # Without a step its settings mean nothing; without distillation its temperature.
        ({"finetune_steps": 0, "learning_rate": [0.1, 0.2], "distill": [0.1, 0.2]}, 1),
        ({"finetune_steps": [0, 1, 2], "learning_rate": [0.1, 0.2], "clip_norm": [1, 2, 3]}, 1 + 2 * 2 * 3),
        ({"distill": [0.0, 0.1, 0.2], "temperature": [1, 2]}, 1 + 2 * 2),
        ({"schedule": ["cosine", "onecycle"], "feature_distill": [0, 1, 2]}, 2 * 3),
        # Ranges: whole numbers as they are up to a hundred, all others as a hundred.
        ({"finetune_steps": {"low": 0, "high": 9}}, 10),
        ({"finetune_steps": {"low": 1, "high": 100}}, 100),
        ({"finetune_steps": {"low": 0, "high": 99}, "clip_norm": [1, 2]}, 1 + 99 * 2),
        ({"finetune_steps": {"low": 0, "high": 100}, "clip_norm": [1, 2]}, 1 + 99 * 2),
        ({"finetune_steps": {"low": 0, "high": 5000}, "clip_norm": [1, 2]}, 1 + 99 * 2),
        ({"learning_rate": {"low": 0.1, "high": 1}}, 100),
        ({"distill": {"low": 0.0, "high": 1.0}, "temperature": [1, 2]}, 1 + 99 * 2),
        ({"least_squares": [True, False], "finetune_steps": [0, 1]}, 4),
    ],
)
def test_recoveries_that_differ_are_counted(choices: dict[str, object], count: int) -> None:
    assert recovery_space(**choices).count() == count


def test_orders_count_where_there_is_fine_tuning() -> None:
    assert recovery_space().count(2) == 2
    assert recovery_space(finetune_steps=[0, 1, 2]).count(3) == 1 + 2 * 3


def test_a_recovery_s_parameters_are_those_that_matter() -> None:
    space = recovery_space(
        batchnorm=[True, False], finetune_steps=[0, 5], clip_norm=[1.0, 2.0], distill=[0.0, 0.5], temperature=[1, 2]
    )  # fmt: skip
    assert space.params_of(Recovery(finetune_steps=0)) == {"batchnorm": True, "finetune_steps": 0}
    plain = Recovery(batchnorm=False, finetune_steps=5, clip_norm=2.0, distill=0.0, temperature=9.0)
    assert space.params_of(plain) == {"batchnorm": False, "finetune_steps": 1, "clip_norm": 1, "distill": 0}
    whole = plain.model_copy(update={"distill": 0.5, "temperature": 2.0})
    assert space.params_of(whole) == {
        "batchnorm": False, "finetune_steps": 1, "clip_norm": 1, "distill": 1, "temperature": 1,
    }  # fmt: skip
    assert space.suggest(FixedTrial(space.params_of(whole) or {})) == whole
    assert space.params_of(whole.model_copy(update={"temperature": 9.0})) is None


def test_a_share_of_a_pattern_may_be_rounded_but_not_be_another() -> None:
    for share in (0.0, 1 / 3, 0.333, 0.3343, 0.3324):
        check_share("2:3", share)
    for share in (0.3353, 0.3313, 0.5, 1.0):
        with pytest.raises(UsageError, match=rf"sparsity {share:g} .*'2:3'; allowed: 0 or 0\.333333"):
            check_share("2:3", share)
    check_share("unstructured", 0.123)


def test_masks_that_differ() -> None:
    space = MaskSpace.model_validate(
        {"pattern": ["2:4", "unstructured"], "allocation": ["erk", "lamp"], "criterion": ["random", "taylor"]}
    )
    assert space.default() == Mask(pattern="2:4", criterion="random")
    free = MaskSpace.model_validate({"allocation": ["erk", "lamp"]})
    assert free.default() == Mask(allocation="erk")
    every = [(mask.pattern, mask.allocation, mask.criterion) for mask in space.every()]
    assert every == [
        ("2:4", "layer", "random"),
        ("2:4", "layer", "taylor"),
        ("unstructured", "erk", "random"),
        ("unstructured", "erk", "taylor"),
        ("unstructured", "lamp", "random"),
        ("unstructured", "lamp", "taylor"),
    ]
    assert space.count() == 6
    for mask in space.every():
        params = space.params_of(mask)
        assert params is not None
        assert ("mask:allocation" in params) == (mask.pattern == "unstructured")
        assert space.suggest(FixedTrial(params)) == mask
    assert space.params_of(Mask(criterion="random")) is None
    assert space.params_of(Mask(pattern="1:4", criterion="random")) is None


def test_masks_are_checked_against_every_share_and_number_of_steps() -> None:
    space = MaskSpace.model_validate(
        {"pattern": ["unstructured", "2:4"], "criterion": ["random", "movement"]}
    )
    space.check([0.0, 0.5], [1, 9])
    # Where nothing is masked there is nothing to refuse.
    space.check([0.0], [0])
    with pytest.raises(UsageError, match="sparsity 0.6"):
        space.check([0.0, 0.5, 0.6], [9])
    for steps in ([0, 9], [9, 0]):
        with pytest.raises(UsageError, match="'movement'"):
            space.check([0.5], steps)
    MaskSpace.model_validate({"criterion": "taylor"}).check([0.7], [0])


def test_steps_of_a_schedule_before_and_after_the_last_cut() -> None:
    for kind in ("gradual", "sparse"):
        schedule = Schedule.model_validate({"kind": kind, "sparse_steps": 0.25})
        assert [schedule.first_steps(steps) for steps in (0, 1, 2, 7, 8, 100)] == [0, 1, 1, 2, 2, 25]
        assert [schedule.steps_after(steps) for steps in (0, 1, 2, 7, 8, 100)] == [0, 0, 1, 5, 6, 75]
    for kind in ("one_shot", "iterative"):
        assert Schedule.model_validate({"kind": kind}).steps_after(100) == 100
        Schedule.model_validate({"kind": kind}).check(0)
    Schedule(kind="gradual").check(1)
    with pytest.raises(
        UsageError, match="'gradual' prunes while it trains, but recovery.finetune_steps is 0"
    ):
        Schedule(kind="gradual").check(0)


def test_schedules_of_a_space() -> None:
    space = ScheduleSpace.model_validate(
        {
            "kind": ["iterative", "gradual", "sparse", "one_shot"],
            "rounds": {"low": 2, "high": 4},
            "strength": [0.2, 0.1],
            "sparse_steps": {"low": 0.5, "high": 0.75},
        }
    )
    assert space.default() == Schedule(kind="iterative", rounds=2)
    assert space.needs_steps() == "gradual"
    assert ScheduleSpace.model_validate({"kind": ["one_shot", "iterative"]}).needs_steps() == ""
    # iterative 3 rounds; gradual 3 rounds of a range; sparse 2 strengths of one; one shot.
    assert space.count() == 3 + 3 * 100 + 2 * 100 + 1
    assert len(list(space.each())) == 2 + 2 * 2 + 2 * 2 + 1
    assert next(space.each()) == Schedule(kind="iterative", rounds=2)
    # The longest share of gradual or sparse leaves least.
    assert space.fewest_steps_after(100) == 25
    assert ScheduleSpace().fewest_steps_after(100) == 100
    wide = ScheduleSpace.model_validate({"kind": "iterative", "rounds": {"low": 2, "high": 100}})
    assert wide.count() == 99
    assert ScheduleSpace.model_validate({"kind": "iterative", "rounds": {"low": 2, "high": 3}}).count() == 2


def test_a_schedule_s_parameters_are_those_of_its_kind() -> None:
    space = ScheduleSpace.model_validate(
        {"kind": ["one_shot", "gradual"], "rounds": [2, 3], "sparse_steps": {"low": 0.5, "high": 0.75}}
    )
    assert space.params_of(Schedule()) == {"schedules:kind": "one_shot"}
    gradual = Schedule(kind="gradual", rounds=3, sparse_steps=0.6)
    params = {"schedules:kind": "gradual", "schedules:rounds": 1, "schedules:sparse_steps": 0.6}
    assert space.params_of(gradual) == params
    assert space.suggest(FixedTrial(params)) == gradual
    for outside in ({"rounds": 4}, {"sparse_steps": 0.8}, {"kind": "sparse"}):
        assert space.params_of(gradual.model_copy(update=outside)) is None


def test_arithmetic_is_in_integers_or_in_float() -> None:
    assert [computed_in(bits) for bits in (2, 8, 16, 32)] == [8, 8, 32, 32]


def test_settings_of_integers_that_nothing_depends_on_are_as_by_default() -> None:
    how = Quantization(
        scale="mse", percentile=90.0, rounding="gptq", aware_bits=4, block_size=64, half="bfloat16", smooth_alpha=0.7
    )  # fmt: skip
    both = how.of_weights(integers=True, halves=True)
    assert both == Quantization(scale="mse", rounding="gptq", block_size=64, half="bfloat16")
    assert how.of_weights(integers=True, halves=False) == both.model_copy(update={"half": "float16"})
    assert how.of_weights(integers=False, halves=True) == Quantization(half="bfloat16")
    assert how.of_weights(integers=False, halves=False) == Quantization()
    every = {"scale": "percentile", "percentile": 90.0, "aware": 0.5, "aware_bits": 4}
    for equalize in ("smooth", "both"):
        full = Quantization.model_validate({**every, "equalize": equalize, "smooth_alpha": 0.7})
        assert full.of_weights(integers=True, halves=False) == full
    crossed = Quantization(equalize="cross_layer", smooth_alpha=0.7).of_weights(integers=True, halves=False)
    assert crossed.smooth_alpha == 0.5


def test_makings_of_integers_that_differ() -> None:
    space = QuantizationSpace.model_validate(
        {"scale": ["percentile", "mse"], "percentile": [99.0, 99.9], "half": ["bfloat16", "float16"]}
    )
    assert space.default() == Quantization(scale="percentile", percentile=99.0, half="bfloat16")
    assert space.count() == 2 + 1
    assert [len(space.of_bits(bits)) for bits in (2, 8, 9, 16, 31, 32)] == [3, 3, 2, 2, 2, 1]
    assert len(space.every(integers=True, halves=True)) == 3 * 2
    assert space.blocks == []
    assert QuantizationSpace.model_validate({"block_size": [None, 64, 16]}).blocks == [64, 16]
    # By hand, for one group with two formats of 32 bits, one of 16 and one of integers.
    assert space.combinations([(2, 1, 1)]) == 2 + 1 * 2 + 1 * 3
    # Two groups of one format each: none, halves alone, integers alone, or both.
    assert space.combinations([(1, 1, 1)] * 2) == 1 + 3 * 2 + 3 * 3 + 2 * 2 * 3


def test_parameters_of_integers_are_those_that_matter() -> None:
    space = QuantizationSpace.model_validate(
        {
            "scale": ["percentile", "mse"], "percentile": [99.0, 99.9], "rounding": ["nearest", "gptq"],
            "aware": [0.0, 0.5], "aware_bits": [4, 8], "half": ["bfloat16", "float16"],
        }
    )  # fmt: skip
    made = Quantization(scale="percentile", percentile=99.9, aware=0.5, aware_bits=4, half="bfloat16")
    params = {
        "quantization:scale": "percentile", "quantization:percentile": 1, "quantization:rounding": "nearest",
        "quantization:aware": 1, "quantization:aware_bits": 0,
    }  # fmt: skip
    halves = {"quantization:half": "bfloat16"}
    assert space.params_of(made) == params
    assert space.params_of(made, integers=True, halves=True) == {**params, **halves}
    assert space.params_of(made, integers=False, halves=True) == halves
    assert space.params_of(made, integers=False, halves=False) == {}
    assert space.suggest(FixedTrial({**params, **halves}), halves=True) == made
    assert space.suggest(FixedTrial(params)) == made.model_copy(update={"half": "float16"})
    assert space.suggest(FixedTrial({}), integers=False) == Quantization()
    plain = {"quantization:scale": "mse", "quantization:rounding": "gptq", "quantization:aware": 0}
    assert space.params_of(Quantization(scale="mse", rounding="gptq", percentile=50.5, aware_bits=2)) == plain
    assert space.params_of(made.model_copy(update={"percentile": 90.0})) is None
    assert space.params_of(made.model_copy(update={"rounding": "adaptive"})) is None
    equal = QuantizationSpace.model_validate({"equalize": ["none", "smooth"], "smooth_alpha": [0.4, 0.6]})
    assert equal.params_of(Quantization(equalize="smooth", smooth_alpha=0.6)) == {
        "quantization:equalize": "smooth",
        "quantization:smooth_alpha": 1,
    }
    assert equal.params_of(Quantization(smooth_alpha=0.9)) == {"quantization:equalize": "none"}


def test_trained_grids_and_rescaling_exclude_each_other() -> None:
    for aware, equalize in (([0.0], ["none", "smooth"]), ([0.0, 0.5], ["none"])):
        QuantizationSpace.model_validate({"aware": aware, "equalize": equalize})
    for aware, equalize in (([0.0, 0.5], ["none", "smooth"]), ([0.5], ["both"])):
        with pytest.raises(ValidationError, match="allowed: aware 0 alone, or equalize none alone"):
            QuantizationSpace.model_validate({"aware": aware, "equalize": equalize})
