"""Samplers: which is made, that a seed repeats it, and that a resumed run does not."""

from __future__ import annotations

import warnings

import optuna
import pytest

from autoprune.errors import UsageError
from autoprune.space.recipe import GroupChoice, Recipe
from autoprune.study.records import TrialRecord
from autoprune.study.retries import CUT_OFF, MAX_RETRIES
from autoprune.study.samplers import counted, make_sampler


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


def test_a_generation_of_nsga2_has_twenty_trials() -> None:
    study = optuna.create_study(directions=["minimize"] * 2, sampler=make_sampler("nsga2", 0, 0))
    crossed = []
    for _ in range(25):
        trial = study.ask()
        # Parameters that come from parents, of which the first generation has none.
        crossed.append(trial.relative_params != {})
        drawn = [trial.suggest_float(name, 0.0, 1.0) for name in "abcdef"]
        study.tell(trial, [drawn[0], 1 - drawn[0] + drawn[1]])
    assert crossed.index(True) == 20


def test_studies_of_later_versions_draw_as_before() -> None:
    study = optuna.create_study(sampler=make_sampler("random", 0, 0))
    assert study.ask().suggest_float("x", 0.0, 1.0) == pytest.approx(0.9540667518532587)


def test_an_unknown_sampler_is_refused_with_the_list() -> None:
    with pytest.raises(UsageError, match="'tpr' is unknown; allowed: auto, tpe, nsga2, random, grid"):
        make_sampler("tpr", 0, 0)


def test_trials_that_were_cut_off_count_once_they_are_given_up() -> None:
    one, other = (Recipe(groups={"a": GroupChoice(ratio=ratio)}) for ratio in (0.1, 0.2))

    def trial(number: int, recipe: Recipe | None, kind: str = "") -> TrialRecord:
        state = "failed" if kind else "complete"
        return TrialRecord.model_validate(
            {"number": number, "state": state, "recipe": recipe, "failure_kind": kind}
        )

    done = [trial(0, one), trial(1, other, "nan")]
    assert counted([]) == 0
    assert counted(done) == 2
    lost = [trial(number, one, CUT_OFF[number % len(CUT_OFF)]) for number in range(2, 2 + MAX_RETRIES)]
    assert counted([*done, *lost, trial(8, None, "lost"), trial(9, other, "interrupted")]) == 2
    assert counted([*done, *lost, trial(8, one, "lost")]) == 3
    assert counted([*done, *lost, trial(8, one, "lost"), trial(9, one, "lost")]) == 3
