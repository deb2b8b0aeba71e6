"""The networks that the final recovery trains."""

from __future__ import annotations

from autoprune.search.selection import choose_networks
from autoprune.space.quantization import Bits
from autoprune.space.recipe import uniform_recipe
from autoprune.study.records import TrialRecord
from tests.search.fakes import make_groups, make_measurement

GROUPS = make_groups()
OBJECTIVES = ("accuracy", "latency", "size")


def record(number: int, ratio: float, bits: Bits) -> TrialRecord:
    recipe = uniform_recipe(GROUPS, ratio, bits)
    return TrialRecord(
        number=number,
        state="complete",
        origin="tpe",
        recipe=recipe,
        measurement=make_measurement(recipe, GROUPS),
    )


def test_members_cover_the_axis_from_mild_to_small() -> None:
    records = [record(i, i / 16, 8) for i in range(1, 15)]
    chosen = choose_networks(records, GROUPS, OBJECTIVES, 4)
    ratios = [members[0].recipe.choice("conv1").ratio for members in chosen if members[0].recipe]
    assert ratios == sorted(ratios)
    assert len(ratios) == 4
    assert ratios[-1] - ratios[0] >= 0.5
    assert max(b - a for a, b in zip(ratios, ratios[1:], strict=False)) <= 0.45


def test_trials_that_differ_in_bits_share_a_network() -> None:
    records = [record(1, 0.5, 8), record(2, 0.5, 32)]
    chosen = choose_networks(records, GROUPS, OBJECTIVES, 4)
    assert [sorted(r.number for r in members) for members in chosen] == [[1, 2]]


def test_networks_that_prune_nothing_or_failed_are_not_trained() -> None:
    failed = TrialRecord(number=3, state="failed", recipe=uniform_recipe(GROUPS, 0.5, 8), failure_kind="nan")
    assert choose_networks([record(1, 0.0, 8), failed], GROUPS, OBJECTIVES, 4) == []
    assert choose_networks([record(1, 0.5, 8)], GROUPS, OBJECTIVES, 0) == []


def test_networks_beyond_the_users_least_accuracy_get_no_training() -> None:
    records = [record(0, 0.0, 32).model_copy(update={"origin": "dense"})]
    records += [record(i, i / 16, 8) for i in range(1, 12)]
    free = choose_networks(records, GROUPS, OBJECTIVES, 4, left={1: 0.5})
    bound = choose_networks(records, GROUPS, OBJECTIVES, 4, left={1: 0.5}, min_accuracy=0.88)
    kept = [m[0].measurement.search.value for m in bound if m[0].measurement]
    assert kept
    assert min(kept) >= 0.9 - 0.02 / 0.5
    assert min(m[0].measurement.search.value for m in free if m[0].measurement) < min(kept)
