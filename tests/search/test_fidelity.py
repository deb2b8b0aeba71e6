"""What one rung tells about the next, and lineage."""

from __future__ import annotations

import math

import pytest

from autoprune.search.fidelity import (
    FINAL_LEFT,
    SEEN_SPLIT,
    Step,
    final_left,
    left_by_rung,
    steps_between_rungs,
)
from autoprune.search.lineage import find_parent, prunes_further
from autoprune.search.severity import ALL_LOST, severity, worst_severity
from autoprune.space.recipe import Recipe, uniform_recipe
from autoprune.study.records import TrialRecord, superseded
from tests.search.fakes import make_groups, make_measurement

GROUPS = make_groups()


def trial(
    number: int,
    ratio: float,
    rung: int,
    accuracy: float,
    *,
    screened: float | None = None,
    started_from: int | None = None,
) -> TrialRecord:
    recipe = uniform_recipe(GROUPS, ratio, 8) if ratio else Recipe()
    measured = make_measurement(recipe, GROUPS)
    measured = measured.model_copy(update={"search": measured.search.model_copy(update={"value": accuracy})})
    return TrialRecord(
        number=number,
        state="complete",
        rung=rung,
        origin="solver" if ratio else "dense",
        started_from=started_from,
        screened=screened,
        recipe=recipe,
        measurement=measured,
        train_steps=50 * rung,
    )


def test_ranks_that_agree_promote_few_and_ranks_that_do_not_promote_many() -> None:
    agreeing = Step.of([0.1, 0.2, 0.3, 0.4, 0.5], [0.05, 0.1, 0.15, 0.2, 0.25], 0.9)
    opposite = Step.of([0.1, 0.2, 0.3, 0.4, 0.5], [0.25, 0.2, 0.15, 0.1, 0.05], 0.9)
    unknown = Step.of([], [], 0.9)
    assert agreeing.correlation == pytest.approx(1.0)
    assert agreeing.promoted_share < unknown.promoted_share < opposite.promoted_share
    assert math.isnan(unknown.correlation)


def test_the_loss_that_is_left_moves_from_the_usual_to_what_was_seen() -> None:
    few = Step.of([0.2], [0.02], 0.9)
    many = Step.of([0.2] * 20, [0.02] * 20, 0.9)
    assert 0.1 < few.kept_loss < 0.65
    assert few.seen_loss == pytest.approx(0.1)
    assert many.kept_loss == pytest.approx(0.1, abs=0.05)
    assert many.hopeful_loss <= many.kept_loss
    assert few.hopeful_loss == 0.0  # nothing is hopeless on one result


def test_rungs_are_related_over_the_recipes_that_have_both() -> None:
    records = [
        trial(0, 0.0, 1, 0.9),
        trial(1, 0.3, 1, 0.8, screened=0.2),
        trial(2, 0.5, 1, 0.7, screened=0.4),
        trial(3, 0.5, 2, 0.85, started_from=2),
        trial(4, 0.7, 1, 0.6),  # never screened
    ]
    first, second = steps_between_rungs(records, 3)
    assert (first.pairs, second.pairs) == (2, 1)
    left = left_by_rung([first, second], final=0.4, seen=False)
    assert left[2] == 0.4
    assert left[0] == pytest.approx(first.kept_loss * second.kept_loss * 0.4)
    assert left_by_rung([first, second], final=0.4, seen=True)[0] == pytest.approx(left[0] * SEEN_SPLIT)
    assert superseded(records) == {2}


def test_a_longer_final_recovery_leaves_less() -> None:
    assert final_left(None, 200) == FINAL_LEFT
    assert final_left(10, 200) == 1.0
    assert final_left(20_000, 200) < final_left(2_000, 200) < 1.0


def test_a_recipe_that_starts_from_another_one_supersedes_nothing() -> None:
    records = [trial(1, 0.3, 2, 0.8), trial(2, 0.5, 1, 0.7, started_from=1)]
    assert superseded(records) == set()


def test_a_parent_keeps_at_least_as_much_of_every_group() -> None:
    assert prunes_further({"a": 4, "b": 8}, {"a": 8, "b": 8})
    assert not prunes_further({"a": 8, "b": 8}, {"a": 8, "b": 8})
    assert not prunes_further({"a": 4, "b": 9}, {"a": 8, "b": 8})


def test_the_parent_is_the_one_with_most_training_then_the_nearest() -> None:
    records = [trial(1, 0.3, 1, 0.8), trial(2, 0.4, 2, 0.8), trial(3, 0.25, 2, 0.8), trial(4, 0.7, 6, 0.5)]
    counts = uniform_recipe(GROUPS, 0.6, 8).kept_counts(GROUPS)

    def kept(record: TrialRecord) -> dict[str, int]:
        assert record.recipe is not None
        return record.recipe.kept_counts(GROUPS)

    found = find_parent(counts, records, kept, lambda record: True)
    assert found is not None
    assert found.number == 2
    found = find_parent(counts, records, kept, lambda record: record.number != 2)
    assert found is not None
    assert found.number == 3
    assert find_parent(counts, records, kept, lambda record: False) is None


def test_a_recipe_that_was_trained_anew_supersedes_its_lower_rung() -> None:
    records = [trial(1, 0.3, 1, 0.8), trial(2, 0.5, 1, 0.7), trial(3, 0.5, 2, 0.75)]
    assert superseded(records) == {2}


def test_where_nothing_is_trained_what_a_screen_lost_stays_lost() -> None:
    assert left_by_rung(steps_between_rungs([], 2), final=0.4, seen=False, trains=False) == {0: 1.0, 1: 1.0}


def test_a_recipe_that_was_trained_anew_from_another_network_leaves_that_one_alone() -> None:
    records = [
        trial(0, 0.0, 1, 0.9),
        trial(1, 0.3, 1, 0.8),
        trial(2, 0.5, 1, 0.7),
        trial(3, 0.5, 2, 0.85, started_from=1),
    ]
    assert superseded(records) == {2}
    _, second = steps_between_rungs(records, 3)
    assert second.pairs == 1
    assert second.seen_loss == pytest.approx(0.05 / 0.2)


def test_severity_is_the_loss_where_that_is_small_and_has_no_end() -> None:
    assert severity(0.001, 0.9) == pytest.approx(0.001, rel=1e-3)
    assert severity(0.0, 0.9) == 0.0
    assert severity(-0.01, 0.9) == -0.01
    losses = [0.1, 0.3, 0.5, 0.7, 0.85]
    severities = [severity(lost, 0.9) for lost in losses]
    growth = [b - a for a, b in zip(severities, severities[1:], strict=False)]
    assert growth == sorted(growth)
    assert severity(ALL_LOST, 0.9) == ALL_LOST
    assert severity(0.4, -2.0) == 0.4
    assert worst_severity(0.9, 0.85) == pytest.approx(severity(0.05, 0.9))
    assert worst_severity(0.9, 0.2) == pytest.approx(severity(0.7, 0.9))
    assert worst_severity(0.9, None) == pytest.approx(severity(0.1, 0.9))
