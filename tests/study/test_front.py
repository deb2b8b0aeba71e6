"""Which points are on a front, and which one is taken."""

from __future__ import annotations

import pytest

from autoprune.config import StudyConfig
from autoprune.errors import NoFeasiblePointError
from autoprune.naming import StudyPaths
from autoprune.space.quantization import Bits
from autoprune.space.recipe import Recipe, uniform_recipe
from autoprune.study.decode import Plan
from autoprune.study.front import (
    all_points,
    dense_number,
    dense_record,
    front_numbers,
    front_points,
    pick_points,
    point_json,
    study_hypervolume,
    to_frame,
)
from autoprune.study.records import TrialRecord
from autoprune.study.store import StudyStore
from tests.search.fakes import make_groups, make_measurement

GROUPS = make_groups()


@pytest.fixture
def store() -> StudyStore:
    settings = StudyConfig(model="m", data="d", study="front")
    store = StudyStore.create_or_resume(settings, StudyPaths.of("front"))
    add(store, Recipe(), "dense", "dense")
    choices: list[tuple[float, Bits]] = [(0.0, 8), (0.5, 8), (0.5, 32), (0.75, 8)]
    for ratio, bits in choices:
        add(
            store, uniform_recipe(GROUPS, ratio, bits), "baseline" if ratio == 0 else "tpe", f"{ratio} {bits}"
        )
    return store


def add(store: StudyStore, recipe: Recipe, origin: str, label: str) -> None:
    trial = store.ask()
    store.begin(trial, Plan(recipe, origin, label))
    store.complete(trial, make_measurement(recipe, GROUPS), train_steps=0, duration_s=1.0)


def finish(store: StudyStore, number: int, ratio: float, bits: Bits) -> None:
    measurement = make_measurement(uniform_recipe(GROUPS, ratio, bits), GROUPS, report=True)
    parent = store.record(number)
    assert parent.recipe is not None
    store.add_final(
        parent, measurement, recipe=parent.recipe, train_steps=9, duration_s=1.0, label=parent.label
    )


def test_before_the_final_phase_the_front_is_the_search_s(store: StudyStore) -> None:
    # Pruned to half in float is dominated by pruned to half in int8 on cost alone, not on accuracy.
    assert {p.record.number for p in front_points(store)} == {0, 1, 2, 3, 4}
    assert point_json(store.paths, store.record(0))["accuracy"] is None


def test_after_it_only_final_points_are_on_the_front(store: StudyStore) -> None:
    finish(store, 0, 0.0, 32)
    finish(store, 2, 0.5, 8)
    finish(store, 4, 0.6, 32)
    points = {p.record.number: p for p in all_points(store)}
    assert [n for n, p in points.items() if p.on_front] == [5, 6]
    assert not points[7].on_front, "0.6 in float is dominated by 0.5 in int8 or tied with it nowhere"
    assert points[5].baseline
    assert not points[6].baseline
    assert dense_record(store.records()) == points[5].record


def test_points_that_intervals_do_not_tell_apart_are_ties(store: StudyStore) -> None:
    points = {p.record.number: p for p in front_points(store)}
    # The fakes' latency intervals have no width, so equal latency is needed: every point differs.
    assert all(p.tie_with == () for p in points.values())


def test_limits_are_kept_and_the_best_comes_first(store: StudyStore) -> None:
    points = front_points(store)
    chosen = pick_points(points, max_size_mb=0.6)
    assert all(p.measurement.size_bytes <= 600_000 for p in chosen)
    values = [p.capability.value for p in chosen]
    assert values == sorted(values, reverse=True)
    assert pick_points(points, max_drop=0.011)[-1].capability.value >= 0.9 - 0.011
    assert len(pick_points(points, knee=True)) == 1


def test_no_feasible_point_names_the_nearest_miss(store: StudyStore) -> None:
    with pytest.raises(
        NoFeasiblePointError, match=r"size_mb: asked at most 0\.01, the front's least is 0\.08"
    ):
        pick_points(front_points(store), max_size_mb=0.01)


def test_json_has_the_names_of_the_contract(store: StudyStore) -> None:
    finish(store, 2, 0.5, 8)
    point = point_json(store.paths, store.record(5))
    names = "trial accuracy accuracy_search latency_ms latency_ratio latency_ratio_ci size_bytes size_ratio"
    names += " params macs recipe artifact"
    assert set(names.split()) <= set(point)
    assert point["accuracy"] == pytest.approx(store.record(5).measurement.report.value)  # type: ignore[union-attr]
    assert list(to_frame(front_points(store), store.paths)["trial"]) == [5]


def test_volume_grows_with_the_front_and_stays_within_one(store: StudyStore) -> None:
    records = store.records()
    volumes = [study_hypervolume(records[:n], store.objectives) for n in range(1, 6)]
    assert volumes == sorted(volumes)
    assert 0.0 < volumes[-1] < 1.0


def test_a_repeat_is_recorded_and_on_no_front(store: StudyStore) -> None:
    before = {p.record.number for p in all_points(store)}
    recipe = uniform_recipe(GROUPS, 0.5, 8)
    trial = store.ask()
    store.begin(trial, Plan(recipe, "tpe"))
    store.complete(trial, make_measurement(recipe, GROUPS), train_steps=0, duration_s=0.0, repeat_of=2)
    assert store.records()[-1].repeat_of == 2
    assert {p.record.number for p in all_points(store)} == before
    assert front_numbers(store.records(), store.objectives) == {0, 1, 2, 3, 4}


def test_a_limit_on_accuracy_says_what_the_best_is(store: StudyStore) -> None:
    with pytest.raises(
        NoFeasiblePointError,
        match=r"accuracy: asked at least 0\.999, the front's best is 0\.\d+\n.*relax|best",
    ) as caught:
        pick_points(front_points(store), min_accuracy=0.999, max_size_mb=1e9)
    assert "size_mb" not in str(caught.value)


def test_the_dense_trial_is_the_one_that_was_measured(store: StudyStore) -> None:
    lost = TrialRecord(number=0, state="failed", origin="dense", failure_kind="lost")
    measured = store.records()[0].model_copy(update={"number": 1, "origin": "dense"})
    assert dense_number([lost, measured]) == 1
    assert dense_number([lost]) is None
