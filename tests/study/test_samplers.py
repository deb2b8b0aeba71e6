"""Samplers: which is made, that a seed repeats it, and that a resumed run does not."""

from __future__ import annotations

import warnings

import optuna
import pytest

from autoprune.errors import UsageError
from autoprune.study.samplers import make_sampler


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tpe", optuna.samplers.TPESampler),
        ("auto", optuna.samplers.TPESampler),
        ("grid", optuna.samplers.TPESampler),
        ("nsga2", optuna.samplers.NSGAIISampler),
        ("random", optuna.samplers.RandomSampler),
    ],
)
def test_a_seed_repeats_a_run_and_a_resumed_one_draws_anew(name: str, kind: type) -> None:
    def drawn(seed: int, trials: int) -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampler = make_sampler(name, seed, trials)
        assert type(sampler) is kind
        study = optuna.create_study(sampler=sampler)
        return [study.ask().suggest_float("x", 0.0, 1.0) for _ in range(3)]

    assert drawn(0, 0) == drawn(0, 0)
    assert len({tuple(drawn(*given)) for given in ((0, 0), (1, 0), (0, 1), (1, 1))}) == 4


def test_conditional_parameters_are_asked_for_together() -> None:
    """The choices of a search space are conditional: one ask finds those of one trial in one group."""
    study = optuna.create_study(sampler=make_sampler("tpe", 0, 0))
    for place in range(12):
        trial = study.ask()
        if trial.suggest_categorical("kind", ["a", "b"]) == "a":
            trial.suggest_float("x", 0.0, 1.0)
        study.tell(trial, float(place))
    assert set(study.ask().relative_params) == {"kind", "x"}


def test_an_unknown_sampler_is_refused_with_the_list() -> None:
    with pytest.raises(UsageError, match="'tpr' is unknown; allowed: auto, tpe, nsga2, random, grid"):
        make_sampler("tpr", 0, 0)
