"""What every setting may be, what it is where it is left out, and that no setting is taken that there is none of."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import autoprune.space
from autoprune.errors import UsageError
from autoprune.space.choices import FloatRange, IntRange, RecoverySpace
from autoprune.space.mask import check_sparsity
from autoprune.space.mask_space import MaskSpace
from autoprune.space.quantization import Quantization
from autoprune.space.quantization_space import QuantizationSpace
from autoprune.space.recipe import GroupChoice, Recipe, Recovery
from autoprune.space.schedule import Schedule
from autoprune.space.schedule_space import ScheduleSpace
from autoprune.space.search_space import SearchSpace
from autoprune.space.space_parts import BaselineSpace, Override, Rung

INF, NAN = float("inf"), float("nan")
RUNGS = [{"steps": steps} for steps in range(7)]
# Model, setting, values that it may have, and values that it may not.
BOUNDS: list[tuple[type[BaseModel], str, list[Any], list[Any]]] = [
    (GroupChoice, "ratio", [0, 0.001, 1], [-0.001, 1.001, NAN]),
    (GroupChoice, "sparsity", [0, 0.999], [-0.001, 1, NAN]),
    (GroupChoice, "rank_ratio", [0, 0.999], [-0.001, 1, NAN]),
    (GroupChoice, "bits", [2, 3, 4, 5, 6, 8, 16, 32], [0, 1, 7, 9, 31, 33]),
    (GroupChoice, "activation_bits", [8, 16, 32], [4, 7, 9, 24]),
    (Recovery, "finetune_steps", [0, 1, 10**9], [-1, 10**9 + 1, 1.5]),
    (Recovery, "learning_rate", [1e-9, 10], [0, 10.001, -1]),
    (Recovery, "distill", [0, 1], [-0.001, 1.001]),
    (Recovery, "temperature", [1e-9, 100], [0, 100.001]),
    (Recovery, "clip_norm", [1e-9, 1e9], [0, -1]),
    (Recovery, "feature_distill", [0, 1e6], [-0.001, 1e6 + 1]),
    (Recipe, "width", [1, 1024], [0, 1025]),
    (Schedule, "rounds", [2, 100], [1, 101]),
    (Schedule, "strength", [1e-9, 10], [0, 10.001]),
    (Schedule, "sparse_steps", [1e-9, 1], [0, 1.001]),
    (Quantization, "percentile", [50.001, 100], [50, 100.001]),
    (Quantization, "aware", [0, 1], [-0.001, 1.001]),
    (Quantization, "aware_bits", [2, 8], [1, 9]),
    (Quantization, "smooth_alpha", [0, 1], [-0.001, 1.001]),
    (Quantization, "block_size", [None, 16, 32, 64, 128, 256], [0, 8, 17, 48, 512]),
    (Override, "groups", ["a", "a" * 300], ["", "a" * 301]),
    (Override, "ratios", [None, [0.0], [1.0]], [[], [-0.001], [1.001], [0.5, 0.5]]),
    (Override, "bits", [None, [8]], [[], [7], [8, 8]]),
    (Override, "sparsities", [None, [0.0, 0.999]], [[], [-0.001], [1.0], [0.5, 0.5]]),
    (Override, "rank_ratios", [None, [0.0, 0.999]], [[], [-0.001], [1.0], [0.5, 0.5]]),
    (BaselineSpace, "ratios", [[], [0.001, 0.999]], [[0.0], [1.0], [0.5, 0.5]]),
    (Rung, "steps", [0, 1_000_000], [-1, 1_000_001, 0.5]),
    (Rung, "examples", [None, 10], [9, 10.5]),
    (SearchSpace, "description", ["", "a" * 1000], ["a" * 1001]),
    (SearchSpace, "width", [1, 1024, "auto"], [0, 1025, 1.5, "wide"]),
    (SearchSpace, "ratios", [[0.0], [1.0]], [[], [-0.001], [1.001], [0.5, 0.5]]),
    (SearchSpace, "bits", [[32], [2, 8]], [[], [7], [8, 8]]),
    (SearchSpace, "activation_bits", [[8], [16, 32]], [[], [4], [8, 8]]),
    (SearchSpace, "sparsities", [[0.0], [0.999]], [[], [-0.001], [1.0], [0.5, 0.5]]),
    (SearchSpace, "rank_ratios", [[0.0], [0.999]], [[], [-0.001], [1.0], [0.5, 0.5]]),
    (SearchSpace, "orders", [["tune-prune-quantize"]], [[], ["prune-tune-quantize"] * 2]),
    (SearchSpace, "rankings", [["alike", "global"]], [[], ["group", "group"]]),
    (SearchSpace, "criteria", [{}, {"conv": ["l1"]}], [{"conv": []}, {"conv": ["l1", "l1"]}]),
    (SearchSpace, "overrides", [[], [{"groups": "a"}] * 1000], [[{"groups": "a"}] * 1001]),
    (SearchSpace, "rungs", [RUNGS[:2], RUNGS[:6]], [[], RUNGS[:1], RUNGS, RUNGS[1:3], RUNGS[2::-1], RUNGS[:1] * 2]),
    (RecoverySpace, "finetune_steps", [3, [0, 3], {"low": 0, "high": 1}], [[], [3, 3], [-1], 1.5, True]),
    (RecoverySpace, "finetune_steps", [], [{"low": 1, "high": 1}, {"low": -1, "high": 1}, {"low": 1}]),
    (RecoverySpace, "learning_rate", [0.1, [0.1, 10], {"low": 0.1, "high": 10}], [[], [0.1, 10.1], "much"]),
    (RecoverySpace, "learning_rate", [], [{"low": 0.1, "high": 10.1}, {"low": 0.2, "high": 0.1}]),
    (RecoverySpace, "learning_rate", [], [{"low": 0.1, "high": 1, "step": 0.1}]),
    (RecoverySpace, "batchnorm", [True, [False, True]], [[], [True, True], 1, "yes"]),
    (RecoverySpace, "schedule", ["onecycle", ["cosine"]], [[], "step", ["cosine", "cosine"]]),
    (ScheduleSpace, "kind", ["sparse", ["one_shot", "gradual"]], [[], "late", ["sparse", "sparse"]]),
    (ScheduleSpace, "rounds", [2, [2, 100], {"low": 2, "high": 100}], [1, {"low": 1, "high": 3}, [3, 3]]),
    (ScheduleSpace, "sparse_steps", [0.1, {"low": 0.1, "high": 1}], [{"low": 0.1, "high": 1.1}, 0]),
    (MaskSpace, "pattern", ["2:4", ["unstructured", "1:999"]], [[], "1:1", "0:1", "1:1000", ["2:4", "2:4"]]),
    (MaskSpace, "allocation", ["erk", ["layer", "lamp"]], [[], "even", ["erk", "erk"]]),
    (MaskSpace, "criterion", ["movement", ["taylor"]], [[], "size", ["random", "random"]]),
    (QuantizationSpace, "percentile", [99, [50.1, 100]], [[], [50], [99, 99]]),
    (QuantizationSpace, "block_size", [None, 64, [None, 16]], [[], 48, [None, None]]),
    (QuantizationSpace, "scale", ["mse", ["minmax"]], [[], "max"]),
    (QuantizationSpace, "rounding", ["gptq", ["adaptive"]], [[], "up"]),
    (QuantizationSpace, "bias_correction", [True, [True, False]], [[], "so", [True, True]]),
    (QuantizationSpace, "aware", [0.5, [0, 1]], [[], 1.1]),
    (QuantizationSpace, "aware_bits", [4, [2, 8]], [[], 9]),
    (QuantizationSpace, "half", ["bfloat16", ["float16"]], [[], "float8"]),
    (QuantizationSpace, "activations", ["fp8", ["static", "dynamic"]], [[], "none"]),
    (QuantizationSpace, "equalize", ["both", ["none", "smooth"]], [[], "all"]),
    (QuantizationSpace, "smooth_alpha", [0, [0.5, 1]], [[], 1.5]),
    (IntRange, "low", [-5, 0], [1, 2, 0.5]),
    (FloatRange, "low", [-5.0, 0.999], [1.0, 2.0, -INF, NAN]),
]  # fmt: skip
NEEDED: dict[type[BaseModel], dict[str, Any]] = {
    Override: {"groups": "a"},
    Rung: {"steps": 0},
    IntRange: {"low": 0, "high": 1},
    FloatRange: {"low": 0.0, "high": 1.0},
}


@pytest.mark.parametrize(("model", "name", "allowed", "refused"), BOUNDS)
def test_every_setting_has_its_bounds(
    model: type[BaseModel], name: str, allowed: list[Any], refused: list[Any]
) -> None:
    for value in allowed:
        model.model_validate({**NEEDED.get(model, {}), name: value})
    for value in refused:
        with pytest.raises(ValueError):
            model.model_validate({**NEEDED.get(model, {}), name: value})


def test_ranges_on_a_logarithmic_scale_are_above_zero() -> None:
    for kind in (IntRange, FloatRange):
        kind.model_validate({"low": 1, "high": 2, "log": True})
        for low in (0, -1):
            with pytest.raises(ValidationError, match=rf"low \({low}.*must be above 0 where log is true"):
                kind.model_validate({"low": low, "high": 2, "log": True})
    with pytest.raises(ValidationError, match=r"low \(1\.0\) must be below high \(inf\)"):
        FloatRange(low=1.0, high=INF)


def test_a_share_of_zeros_is_below_one() -> None:
    for allowed in (0.0, 0.999):
        check_sparsity(allowed)
    for refused in (-0.001, 1.0, NAN):
        with pytest.raises(UsageError, match=f"sparsity {refused:g} cannot be used"):
            check_sparsity(refused)


def models() -> list[type[BaseModel]]:
    found: dict[str, type[BaseModel]] = {}
    for module in pkgutil.iter_modules(autoprune.space.__path__):
        for value in vars(importlib.import_module(f"autoprune.space.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, BaseModel) and value is not BaseModel:
                found[value.__name__] = value
    return [found[name] for name in sorted(found)]


@pytest.mark.parametrize("model", models(), ids=lambda model: model.__name__)
def test_what_crosses_a_stage_is_frozen_and_has_no_other_settings(model: type[BaseModel]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate({"no_such_setting": 1})
    assert any(fault["type"] == "extra_forbidden" for fault in caught.value.errors())
    frozen = model.model_construct()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(frozen, next(iter(model.model_fields)), None)


def test_settings_that_are_left_out_mean_what_they_did() -> None:
    """Records of studies leave out what is as by default: another default would be another recipe."""
    assert GroupChoice().model_dump() == {
        "ratio": 0.0, "bits": 32, "activation_bits": 8, "criterion": "", "sparsity": 0.0, "rank_ratio": 0.0,
    }  # fmt: skip
    assert Recipe().model_dump() == {
        "groups": {},
        "criterion": {"conv": "l2", "linear": "l2"},
        "width": 8,
        "recovery": {
            "least_squares": True, "batchnorm": True, "finetune_steps": 40, "learning_rate": 0.02,
            "schedule": "cosine", "distill": 0.9, "temperature": 4.0, "clip_norm": 5.0, "feature_distill": 0.0,
        },
        "mask": {"pattern": "unstructured", "allocation": "layer", "criterion": "magnitude"},
        "schedule": {"kind": "one_shot", "rounds": 3, "strength": 0.05, "sparse_steps": 0.5},
        "ranking": "group",
        "order": "prune-tune-quantize",
        "quantization": {
            "scale": "minmax", "percentile": 99.9, "rounding": "nearest", "bias_correction": False, "aware": 0.0,
            "aware_bits": 8, "block_size": None, "half": "float16", "activations": "static", "equalize": "none",
            "smooth_alpha": 0.5,
        },
    }  # fmt: skip


def test_a_space_that_says_nothing_is_the_one_of_before() -> None:
    assert SearchSpace().content() == (
        '{"description":"","width":8,"ratios":[0.0,0.1,0.25,0.4,0.5,0.6,0.7,0.8],"bits":[8,32],'
        '"criteria":{"conv":["l2"],"linear":["l2"]},"recovery":{"least_squares":[true],"batchnorm":[true],'
        '"finetune_steps":[40],"learning_rate":[0.02],"schedule":["cosine"],"distill":[0.9],"temperature":[4.0],'
        '"clip_norm":[5.0]},"overrides":[],"baselines":{"ratios":[0.15,0.3,0.5,0.7]},'
        '"rungs":[{"steps":0,"examples":500},{"steps":50,"examples":null},{"steps":200,"examples":null}]}'
    )
    space = SearchSpace()
    # What came later starts with what recipes have by default.
    assert space.default_recovery() == Recovery()
    assert space.masks.default() == Recipe().mask
    assert space.schedules.default() == Schedule()
    assert space.quantization.default() == Quantization()
    assert QuantizationSpace().model_dump() == {
        name: (value,) for name, value in Quantization().model_dump().items()
    }
    assert ScheduleSpace().model_dump() == {name: (value,) for name, value in Schedule().model_dump().items()}
    later = (space.sparsities, space.rank_ratios, space.orders, space.rankings, space.activation_bits)
    assert later == ((0.0,), (0.0,), ("prune-tune-quantize",), ("group",), (8,))
