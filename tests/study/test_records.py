"""Trial records: which are compared, which chose themselves, which are superseded."""

from __future__ import annotations

from typing import Any

import pytest

from autoprune.space.recipe import GroupChoice, Recipe, Recovery
from autoprune.space.schedule import Schedule
from autoprune.study.records import TrialRecord, is_given, superseded
from tests.search.fakes import make_groups, make_measurement

GROUPS = make_groups()
CUT = Recipe(groups={"conv0": GroupChoice(ratio=0.5)})
OTHER = Recipe(groups={"conv1": GroupChoice(ratio=0.5)})


def made(number: int = 1, recipe: Recipe | None = CUT, **values: Any) -> TrialRecord:
    measurement = make_measurement(recipe or Recipe(), GROUPS)
    return TrialRecord.model_validate(
        {"number": number, "state": "complete", "recipe": recipe, "measurement": measurement, **values}
    )


def test_a_trial_counts_in_the_search_where_it_was_measured_there_and_is_no_repeat() -> None:
    assert made().is_measured_search and made().is_trained and not made().is_repeat
    assert made(repeat_of=0).is_repeat
    for record in (
        made(state="failed"),
        made(state="running"),
        made(fidelity="final"),
        made(repeat_of=0),
        made(measurement=None),
    ):
        assert not record.is_measured_search and not record.is_trained


def test_what_was_not_cut_needs_no_training() -> None:
    whole = made(recipe=Recipe(groups={"conv0": GroupChoice(bits=8)}))
    assert whole.is_measured_search and not whole.is_trained
    assert made(recipe=None).is_measured_search and not made(recipe=None).is_trained


def test_cuts_are_alike_however_long_and_in_how_many_bits_order_was_trained() -> None:
    longer = CUT.model_copy(update={"recovery": Recovery(finetune_steps=900)})
    assert made(recipe=longer).cuts == made().cuts
    turned = Recipe(groups={"conv1": GroupChoice(), "conv0": GroupChoice(ratio=0.5)})
    names = CUT.model_copy(update={"criterion": {"linear": "l2", "conv": "l2"}})
    assert made(recipe=names).cuts == made().cuts
    assert made(recipe=turned).cuts == made(recipe=Recipe(groups=dict(reversed(turned.groups.items())))).cuts
    for other in (
        OTHER,
        CUT.model_copy(update={"criterion": {"conv": "l1", "linear": "l2"}}),
        CUT.model_copy(update={"schedule": Schedule(kind="iterative")}),
        None,
    ):
        assert made(recipe=other).cuts != made().cuts


@pytest.mark.parametrize("sampler", ["auto", "tpe"])
def test_dense_and_baselines_are_given_and_trained_ones_only_by_plain_samplers(sampler: str) -> None:
    assert is_given(made(origin="dense", recipe=Recipe()), sampler)
    assert is_given(made(origin="baseline", recipe=Recipe()), sampler)
    assert is_given(made(origin="baseline", recipe=None), sampler)
    assert is_given(made(origin="baseline"), sampler) == (sampler == "tpe")
    assert not is_given(made(origin=sampler, recipe=Recipe()), sampler)


def test_only_the_highest_rung_of_a_recipe_counts() -> None:
    records = [
        made(1, rung=1),
        made(2, OTHER, rung=1),
        made(3, rung=2),
        made(4, rung=3),
        made(5, Recipe(), rung=1),
        made(6, OTHER, rung=2, state="failed"),
        made(7, rung=1),
    ]
    assert superseded(records) == {1, 3, 7}
    # Whatever the order in which they ended.
    assert superseded(records[::-1]) == {1, 3, 7}
    assert superseded(records[:2]) == set()
    assert superseded([made(1, rung=1), made(2, rung=2)]) == {1}
    # A higher rung that failed supersedes nothing.
    assert superseded([made(1), made(2, rung=2, state="failed")]) == set()
