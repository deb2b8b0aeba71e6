"""Points of a study against fronts that are known: made of figures alone, without a database."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from autoprune.errors import NoFeasiblePointError
from autoprune.measure.record import Capability, Executed, Latency, Measurement, RunFigures
from autoprune.naming import StudyPaths
from autoprune.space.recipe import GroupChoice, Recipe
from autoprune.study.front import (
    FrontPoint,
    all_points,
    costs,
    dense_number,
    dense_record,
    front_numbers,
    front_points,
    pick_points,
    point_json,
    study_hypervolume,
    to_frame,
    volume_of,
)
from autoprune.study.records import TrialRecord
from autoprune.study.store import StudyStore

ALL = ("accuracy", "latency", "size")


def score(value: float, width: float = 0.0) -> Capability:
    return Capability(name="accuracy", value=value, ci=(value - width, value + width), examples=100)


def measured(
    accuracy: float,
    ratio: float,
    size: float,
    *,
    report: float | None = None,
    ci: float = 0.0,
    ratio_ci: float = 0.0,
) -> Measurement:
    return Measurement(
        search=score(accuracy, ci),
        report=None if report is None else score(report, ci),
        latency=Latency(
            latency_ms=10 * ratio, latency_p95_ms=None, dense_ms=10.0, ratio=ratio,
            ratio_ci=(ratio - ratio_ci, ratio + ratio_ci), samples=50, noisy=False,
        ),
        size_bytes=round(4_000_000 * size), size_ratio=size, params=1000, macs=2000,
        executed=Executed(layers=4, int8_layers=1, asked_int8=1, operators={}, not_as_asked=("a",)),
        parity_error=0.0, figures=RunFigures(memory_bytes=7, missing={"energy_mj": "no counter"}),
    )  # fmt: skip


def trial(number: int, figures: Measurement | None, ratio: float = 0.5, **values: Any) -> TrialRecord:
    """Return a trial whose recipe is its own, so that no other one supersedes it."""
    recipe = Recipe(groups={"a": GroupChoice(ratio=ratio, bits=8)}) if ratio else Recipe()
    values = {"state": "complete", "origin": "tpe", "recipe": recipe, "measurement": figures, **values}
    return TrialRecord.model_validate({"number": number, **values})


def dense(number: int = 0, accuracy: float = 0.9, **values: Any) -> TrialRecord:
    return trial(number, measured(accuracy, 1.0, 1.0), 0.0, **{"origin": "dense", "label": "dense", **values})


def study(*records: TrialRecord, objectives: tuple[str, ...] = ALL, sampler: str = "tpe") -> StudyStore:
    """Return what a front asks of a store."""
    return cast(
        StudyStore,
        SimpleNamespace(records=lambda: list(records), objectives=objectives, sampler_name=sampler),
    )


def point(number: int, figures: Measurement, **values: Any) -> FrontPoint:
    return FrontPoint(trial(number, figures, **values), on_front=True, tie_with=(), baseline=False)


def test_all_costs_are_minimised_and_capability_comes_first() -> None:
    figures = measured(0.8, 0.5, 0.25, report=0.7)
    assert costs(figures, ("size", "accuracy", "latency"), on_search=True) == [-0.8, 0.25, 0.5]
    assert costs(figures, ALL, on_search=False) == [-0.7, 0.5, 0.25]
    assert costs(measured(0.8, 0.5, 0.25), ("accuracy",), on_search=False) == [-0.8]


def test_a_point_has_the_report_split_s_capability_where_there_is_one() -> None:
    assert point(1, measured(0.8, 0.5, 0.5)).capability.value == 0.8
    assert point(1, measured(0.8, 0.5, 0.5, report=0.7)).capability.value == 0.7
    lost = FrontPoint(trial(4, None, state="failed"), on_front=False, tie_with=(), baseline=False)
    with pytest.raises(ValueError, match="trial 4 was not measured"):
        _ = lost.measurement


def test_the_front_leaves_out_what_another_point_dominates() -> None:
    records = [
        dense(),
        trial(1, measured(0.85, 0.5, 0.5), 0.1),
        trial(2, measured(0.84, 0.5, 0.5), 0.2),
        trial(3, measured(0.80, 0.4, 0.6), 0.3),
        trial(4, None, 0.4, state="failed"),
        trial(5, measured(0.95, 0.1, 0.1), 0.5, repeat_of=1),
    ]
    assert front_numbers(records, ALL) == {0, 1, 3}
    # By size alone the smallest wins.
    assert front_numbers(records, ("accuracy", "size")) == {0, 1}
    assert front_numbers([], ALL) == set()
    assert front_numbers(records[4:5], ALL) == set()


def test_only_trials_of_one_rung_are_compared_and_untrained_ones_with_all() -> None:
    records = [
        dense(),
        trial(1, measured(0.70, 0.5, 0.5), 0.1, rung=1),
        trial(2, measured(0.60, 0.5, 0.5), 0.2, rung=1),
        trial(3, measured(0.80, 0.5, 0.5), 0.3, rung=2),
        trial(4, measured(0.65, 0.5, 0.6), 0.4, rung=2),
        trial(5, measured(0.70, 0.4, 0.5), 0.1, rung=2),
    ]
    # Trial 1 went on as 5. On rung 2 trial 4 is dominated by 3; 2 by 1 on its own rung.
    assert front_numbers(records, ALL) == {0, 3, 5}
    free = trial(6, measured(0.9, 0.3, 0.3), 0.0, label="int8")
    assert front_numbers([*records, free], ALL) == {6}


def test_volumes_are_of_the_best_rung_and_scaled_to_one() -> None:
    assert study_hypervolume([trial(1, measured(0.9, 0.5, 0.5))], ALL) == 0.0
    # Half of a tenth lost, at half of each cost.
    low = trial(1, measured(0.85, 0.5, 0.5), 0.1, rung=1)
    assert study_hypervolume([dense(), low], ALL) == pytest.approx(0.125)
    # The next rung counts alone; the dense network with it, which has no volume.
    high = trial(2, measured(0.9, 0.5, 0.5), 0.2, rung=2)
    assert study_hypervolume([dense(), low, high], ALL) == pytest.approx(0.25)
    # What is better than dense adds nothing for being so.
    assert study_hypervolume([dense(), trial(1, measured(0.99, 0.5, 0.5), 0.1)], ALL) == pytest.approx(0.25)
    assert study_hypervolume([dense(), low], ("accuracy", "size")) == pytest.approx(0.25)


def test_a_metric_above_one_loses_shares_of_itself() -> None:
    at_half = [measured(47.5, 0.5, 0.5)]
    assert volume_of(at_half, ALL, 50.0, on_search=True) == pytest.approx(0.125)
    assert volume_of([measured(-52.5, 0.5, 0.5)], ALL, -50.0, on_search=True) == pytest.approx(0.125)
    assert volume_of([], ALL, 0.9, on_search=True) == 0.0
    both = [measured(0.85, 0.5, 0.5, report=0.9)]
    assert volume_of(both, ALL, 0.9, on_search=True) == pytest.approx(0.125)
    assert volume_of(both, ALL, 0.9, on_search=False) == pytest.approx(0.25)


def test_the_dense_network_is_the_finished_trial_of_that_origin_by_its_last_measurement() -> None:
    lost = dense(0, state="failed", measurement=None)
    first = dense(1)
    final = [dense(number, origin="final", fidelity="final", parent=1) for number in (3, 5)]
    undone = dense(7, origin="final", fidelity="final", parent=1, state="failed")
    other = trial(4, measured(0.8, 0.5, 0.5), fidelity="final", parent=2)
    repeated = dense(6, parent=1)
    records = [lost, first, trial(2, measured(0.8, 0.5, 0.5)), final[0], other, final[1], repeated, undone]
    assert dense_record(records) == final[1]
    assert dense_record(records[:3]) == first
    assert dense_record([lost]) is None
    assert dense_number(records) == 1
    assert dense_number([lost]) is None
    assert dense_number([dense(3, fidelity="final")]) is None


def test_once_there_are_final_trials_the_front_is_that_of_the_last_phase() -> None:
    def final(number: int, parent: int, round: int, *figures: float) -> TrialRecord:
        accuracy, ratio, size, report = figures
        values = {"origin": "final", "fidelity": "final", "parent": parent, "round": round}
        return trial(number, measured(accuracy, ratio, size, report=report), number / 100, **values)

    records = [
        dense(),
        trial(1, measured(0.85, 0.5, 0.5), 0.1),
        trial(2, measured(0.80, 0.4, 0.4), 0.2),
        final(3, 0, 1, 0.9, 1.0, 1.0, 0.9),
        final(4, 1, 1, 0.8, 0.1, 0.1, 0.8),
        final(5, 0, 2, 0.5, 1.0, 1.0, 0.9),
        final(6, 1, 2, 0.8, 0.5, 0.5, 0.8),
        final(7, 2, 2, 0.9, 0.6, 0.6, 0.7),
    ]
    found = {p.record.number: p for p in all_points(study(*records))}
    # The first phase is told no more; 7 is better only on the search split.
    assert list(found) == [0, 1, 2, 5, 6, 7]
    assert [n for n, p in found.items() if p.on_front] == [5, 6]
    # What continued the dense network is given as that was.
    assert [n for n, p in found.items() if p.baseline] == [0, 5]
    before = all_points(study(*records[:3]))
    assert [p.record.number for p in before if p.on_front] == [0, 1, 2]
    assert [p.record.number for p in front_points(study(*records))] == [5, 6]
    assert all_points(study()) == []


def test_baselines_are_marked_by_the_sampler() -> None:
    uniform = trial(1, measured(0.8, 0.5, 0.5), 0.5, origin="baseline")
    for sampler, marked in (("auto", [0]), ("tpe", [0, 1])):
        points = all_points(study(dense(), uniform, sampler=sampler))
        assert [p.record.number for p in points if p.baseline] == marked


def test_points_are_ties_where_neither_interval_tells_them_apart() -> None:
    near = [
        trial(1, measured(0.80, 0.50, 0.50, ci=0.02, ratio_ci=0.05), 0.1),
        trial(2, measured(0.82, 0.55, 0.50, ci=0.02, ratio_ci=0.05), 0.2),
        # As capable as 1 and 2, but surely faster.
        trial(3, measured(0.79, 0.30, 0.50, ci=0.02, ratio_ci=0.05), 0.3),
        # As fast as 3, and surely less capable.
        trial(4, measured(0.60, 0.25, 0.50, ci=0.02, ratio_ci=0.05), 0.4),
        # Off the front.
        trial(5, measured(0.59, 0.60, 0.60, ci=0.50, ratio_ci=0.50), 0.5),
    ]

    def ties(objectives: tuple[str, ...]) -> dict[int, tuple[int, ...]]:
        points = all_points(study(*near, objectives=objectives))
        return {p.record.number: p.tie_with for p in points if p.on_front}

    assert ties(ALL) == {1: (2,), 2: (1,), 3: (), 4: ()}
    assert all_points(study(*near))[4].tie_with == ()
    flat = [trial(n, measured(a, 0.5, s, ci=0.02), n / 10) for n, a, s in ((1, 0.80, 0.4), (2, 0.81, 0.5))]
    points = all_points(study(*flat, objectives=("accuracy", "size")))
    assert [p.tie_with for p in points] == [(2,), (1,)]
    # The report split's interval counts once there is one.
    final = [
        trial(n, measured(0.8, 0.5 - n / 100, 0.5, report=report, ci=0.02, ratio_ci=0.05), n / 10, fidelity="final")
        for n, report in ((1, 0.8), (2, 0.7))
    ]  # fmt: skip
    assert [p.tie_with for p in all_points(study(*final))] == [(), ()]


def test_of_equally_capable_points_the_faster_and_earlier_comes_first() -> None:
    records = [
        trial(1, measured(0.8, 0.6, 0.3), 0.1),
        trial(2, measured(0.8, 0.5, 0.4), 0.2),
        trial(3, measured(0.9, 0.9, 0.9), 0.3),
        trial(4, measured(0.8, 0.5, 0.4), 0.4),
    ]
    assert [p.record.number for p in front_points(study(*records))] == [3, 2, 4, 1]
    points = [point(r.number, r.measurement) for r in records if r.measurement is not None]
    assert [p.record.number for p in pick_points(points)] == [3, 2, 4, 1]


POINTS = [
    point(0, measured(0.90, 1.0, 1.00), label="dense"),
    point(1, measured(0.85, 0.5, 0.50)),
    point(2, measured(0.60, 0.2, 0.25)),
]


@pytest.mark.parametrize(
    ("limits", "numbers"),
    [
        ({}, [0, 1, 2]),
        ({"max_latency_ms": 5.0}, [1, 2]),
        ({"max_latency_ms": 4.99}, [2]),
        ({"max_latency_ratio": 0.5}, [1, 2]),
        ({"max_size_mb": 2.0}, [1, 2]),
        ({"max_size_mb": 1.999}, [2]),
        ({"min_accuracy": 0.85}, [0, 1]),
        ({"max_drop": 0.051}, [0, 1]),
        ({"max_drop": 0.0}, [0]),
        ({"max_latency_ms": 5.0, "min_accuracy": 0.7}, [1]),
        ({"knee": True}, [1]),
        ({"knee": True, "max_latency_ms": 2.0}, [2]),
    ],
)
def test_limits_are_kept_to_the_last_digit(limits: dict[str, Any], numbers: list[int]) -> None:
    assert [p.record.number for p in pick_points(POINTS, **limits)] == numbers


def test_a_drop_is_against_the_dense_network_that_is_given_or_found() -> None:
    other = dense(9, accuracy=0.87)
    assert [p.record.number for p in pick_points(POINTS, max_drop=0.03, dense=other)] == [0, 1]
    as_point = FrontPoint(other, on_front=True, tie_with=(), baseline=True)
    assert [p.record.number for p in pick_points(POINTS, max_drop=0.03, dense=as_point)] == [0, 1]
    final = dense(9, measurement=measured(0.9, 1.0, 1.0, report=0.86))
    assert [p.record.number for p in pick_points(POINTS, max_drop=0.02, dense=final)] == [0, 1]
    # Without one the most capable point stands in.
    assert [p.record.number for p in pick_points(POINTS[1:], max_drop=0.26)] == [1, 2]
    assert [p.record.number for p in pick_points(POINTS[1:], max_drop=0.24)] == [1]
    lost = dense(9, measurement=None, state="failed")
    assert [p.record.number for p in pick_points(POINTS, max_drop=0.06, dense=lost)] == [0, 1]


def test_the_knee_is_of_the_study_s_objectives() -> None:
    points = [
        point(1, measured(0.9, 1.0, 0.50)),
        point(2, measured(0.8, 0.9, 0.10)),
        point(3, measured(0.8, 0.1, 0.45)),
        point(4, measured(0.5, 0.05, 0.05)),
    ]
    for objectives, number in ((("accuracy", "size"), 2), (("accuracy", "latency"), 3)):
        assert [p.record.number for p in pick_points(points, knee=True, objectives=objectives)] == [number]


@pytest.mark.parametrize(
    ("limits", "lines"),
    [
        ({"max_latency_ms": 1.0}, ["latency_ms: asked at most 1, the front's least is 2"]),
        ({"max_latency_ratio": 0.1}, ["latency_ratio: asked at most 0.1, the front's least is 0.2"]),
        ({"max_size_mb": 0.5}, ["size_mb: asked at most 0.5, the front's least is 1"]),
        ({"max_drop": -0.1}, ["drop: asked at most -0.1, the front's least is 0"]),
        ({"min_accuracy": 0.95}, ["accuracy: asked at least 0.95, the front's best is 0.9"]),
        (
            {"min_accuracy": 0.95, "max_size_mb": 0.5, "max_latency_ms": 2.0},
            [
                "size_mb: asked at most 0.5, the front's least is 1",
                "accuracy: asked at least 0.95, the front's best is 0.9",
            ],
        ),
        (
            {"max_latency_ms": 2.0, "min_accuracy": 0.9},
            ["each of them is kept by some point, but no point keeps all"],
        ),
    ],
)
def test_the_nearest_miss_of_every_limit_is_told(limits: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(NoFeasiblePointError) as caught:
        pick_points(POINTS, **limits)
    assert caught.value.message.splitlines() == [
        "no point of the front keeps these limits",
        *(f"  {line}" for line in lines),
    ]
    assert caught.value.hint == "relax a limit, or search longer"


def test_an_empty_front_has_no_nearest_miss() -> None:
    with pytest.raises(NoFeasiblePointError) as caught:
        pick_points([], min_accuracy=0.5)
    assert caught.value.message == "no point of the front keeps these limits"


def test_a_point_s_object_holds_what_was_measured(tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path / "my study")
    record = trial(7, measured(0.8, 0.5, 0.25, report=0.7, ci=0.01), parent=2, started_from=3, train_steps=9)
    found = point_json(paths, record)
    figures = RunFigures(memory_bytes=7, missing={"energy_mj": "no counter"}).flat()
    assert {name: value for name, value in found.items() if name not in {*figures, "recipe"}} == {
        "trial": 7, "label": "", "origin": "tpe", "fidelity": "search", "parent": 2, "started_from": 3, "rung": 1,
        "accuracy": 0.7, "accuracy_ci": (0.7 - 0.01, 0.7 + 0.01), "accuracy_search": 0.8, "metric": "accuracy",
        "latency_ms": 5.0, "latency_p95_ms": None, "latency_ratio": 0.5, "latency_ratio_ci": (0.5, 0.5),
        "latency_noisy": False, "size_bytes": 1_000_000, "size_ratio": 0.25, "params": 1000, "macs": 2000,
        "int8_layers": 1, "layers": 4, "as_asked": 0.75, "ran": {}, "not_as_asked": {"a": ""}, "train_steps": 9,
        "artifact": None, "export_command": "autoprune export 'my study' --trial 7 --to DIR",
    }  # fmt: skip
    assert found["recipe"] == record.recipe.content() if record.recipe else None
    assert (found["memory_bytes"], found["not_measured"]["energy_mj"]) == (7, "no counter")
    paths.artifact(7).mkdir(parents=True)
    assert point_json(paths, record)["artifact"] == str(paths.artifact(7))
    there = point_json(paths.on_target("torch:cuda"), record)
    assert there["artifact"] is None
    assert there["export_command"] == "autoprune export 'my study' --trial 7 --target torch:cuda --to DIR"
    before = point_json(paths, trial(7, measured(0.8, 0.5, 0.25)))
    assert (before["accuracy"], before["accuracy_ci"]) == (None, None)
    assert point_json(paths, trial(7, measured(0.8, 0.5, 0.25), recipe=None))["recipe"] is None
    with pytest.raises(ValueError, match="trial 8 was not measured"):
        point_json(paths, trial(8, None, state="failed"))


def test_reasons_come_before_names_of_layers(tmp_path: Path) -> None:
    figures = measured(0.8, 0.5, 0.25)
    told = figures.model_copy(
        update={"executed": figures.executed.model_copy(update={"reasons": {"a": "no kernel"}})}
    )
    assert point_json(StudyPaths(tmp_path), trial(1, told))["not_as_asked"] == {"a": "no kernel"}


def test_a_table_has_one_row_for_each_point(tmp_path: Path) -> None:
    final = FrontPoint(
        trial(1, measured(0.8, 0.5, 0.25, report=0.7, ci=0.01, ratio_ci=0.1)),
        on_front=True,
        tie_with=(2, 5),
        baseline=True,
    )
    frame = to_frame([final, point(2, measured(0.8, 0.4, 0.25))], StudyPaths(tmp_path / "study"))
    first, second = frame.to_dict("records")
    assert (first["trial"], first["tie_with"], first["baseline"]) == (1, "2 5", True)
    assert (first["accuracy_ci_low"], first["accuracy_ci_high"]) == pytest.approx((0.69, 0.71))
    assert (first["latency_ratio_ci_low"], first["latency_ratio_ci_high"]) == pytest.approx((0.4, 0.6))
    assert "energy_mj: no counter" in first["not_measured"] and "; " in first["not_measured"]
    assert (second["tie_with"], second["baseline"]) == ("", False)
    assert frame["accuracy_ci_low"].isna().tolist() == [False, True]
    assert not {"recipe", "accuracy_ci", "latency_ratio_ci"} & set(frame.columns)


def test_a_drop_counts_from_the_best_where_the_dense_network_is_not_known() -> None:
    points = [point(number, measured(accuracy, 0.5, 0.25)) for number, accuracy in ((1, 0.8), (2, 0.7))]
    assert [p.record.number for p in pick_points(points, max_drop=0.05)] == [1]
    with pytest.raises(NoFeasiblePointError) as caught:
        pick_points([], max_drop=0.05)
    assert caught.value.message == "no point of the front keeps these limits"
