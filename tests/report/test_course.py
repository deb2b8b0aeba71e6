"""How a default search went, told from its records."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoprune.report.course import course_block, course_lines, course_of
from autoprune.report.view import group_rows, recipe_summary, view_of
from autoprune.space.groups import Group, Groups, Member
from autoprune.space.recipe import GroupChoice, Recipe
from autoprune.study.records import TrialRecord
from autoprune.study.screens import Screen, append_screens
from tests.report.studies import FakeStore, make_study, recipe


def study(tmp_path: Path, sampler: str) -> FakeStore:
    store = make_study(tmp_path / "study")
    assert isinstance(store, FakeStore)
    settings = {**store.settings(), "sampler": sampler}
    store.settings = lambda: settings  # type: ignore[method-assign]
    screens = [
        Screen(
            recipe=recipe(0.1 * i), arm="solver" if i % 2 else "moves", lost=0.02 * i, size_ratio=0.5,
            latency_ratio=0.5, duration_s=1.0, ended_s=10.0 + 1.01 * i,
        )
        for i in range(1, 10)
    ]  # fmt: skip
    append_screens(store.paths, screens)
    for number, record in enumerate(store.trials):
        if record.is_trained:
            store.trials[number] = record.model_copy(update={"screened": 0.1 + 0.01 * number})
    return store


def test_plain_samplers_have_no_course(tmp_path: Path) -> None:
    view = view_of(study(tmp_path, "tpe"))  # type: ignore[arg-type]
    assert course_of(view) is None
    assert course_block(view) == ""


def test_the_course_tells_counts_ranks_and_arms(tmp_path: Path) -> None:
    view = view_of(study(tmp_path, "auto"))  # type: ignore[arg-type]
    course = course_of(view)
    assert course is not None
    lines = dict(course_lines(course))
    trained = sum(r.is_trained for r in view.records)
    assert lines["Fidelity"].startswith("9 recipes screened")
    assert f"{trained} trained to rung 1" in lines["Fidelity"]
    assert "moves 4 screened" in lines["Who proposed"]
    assert "solver 5 screened" in lines["Who proposed"]
    assert f"over {trained} recipes" in lines["Rank correlation of what is lost"]
    assert lines["Profile"] == "No profile was kept with this study."
    assert "How the search went" in course_block(view)


def test_engine_overhead_is_what_lies_between(tmp_path: Path) -> None:
    store = study(tmp_path, "auto")
    store.trials = [r for r in store.trials if not r.is_trained]
    screens = [
        Screen(
            recipe=recipe(0.5),
            arm="solver",
            lost=0.1,
            size_ratio=0.5,
            latency_ratio=0.5,
            duration_s=2.0,
            ended_s=500 + 2.1 * i,
        )
        for i in range(20)
    ]
    store.paths.screens.unlink()
    append_screens(store.paths, screens)
    course = course_of(view_of(store))  # type: ignore[arg-type]
    assert course is not None
    assert course.overhead == pytest.approx(0.05)


def test_trials_that_failed_or_changed_bits_alone_are_no_overhead(tmp_path: Path) -> None:
    store = study(tmp_path, "auto")
    ends = [500 + 20.0 * i for i in range(20)]
    store.paths.screens.unlink()
    bits = next(r for r in store.trials if r.label == "int8")
    store.trials = [
        bits.model_copy(update={"number": 100 + i, "duration_s": 20.0, "ended_s": end, "origin": "moves"})
        if i % 2
        else TrialRecord(
            number=100 + i,
            state="failed",
            failure_kind="nan",
            duration_s=20.0,
            ended_s=end,
            recipe=recipe(0.5),
        )
        for i, end in enumerate(ends)
    ]
    # Between int8 alone and the first proposal lies the profile.
    store.trials.append(bits.model_copy(update={"number": 99, "duration_s": 2.0, "ended_s": 100.0}))
    course = course_of(view_of(store))  # type: ignore[arg-type]
    assert course is not None
    assert course.overhead == pytest.approx(0.0)


def test_a_search_without_screens_or_profile_says_who_proposed_and_why(tmp_path: Path) -> None:
    store = study(tmp_path, "auto")
    store.paths.screens.unlink()
    store.words["profile_failure"] = "export: no such operator"
    course = course_of(view_of(store))  # type: ignore[arg-type]
    assert course is not None
    lines = dict(course_lines(course))
    assert "tpe 0 screened, 26 trained" in lines["Who proposed"]
    assert "export: no such operator" in lines["Profile"]
    assert "screened (" not in lines["Fidelity"]


def test_a_group_that_goes_with_a_block_is_not_shown_as_still_there() -> None:
    inner = {"layer1.0.conv1": "layer1.0", "layer1.0.conv2": ""}
    found = Groups(
        groups=tuple(
            Group(
                name=name,
                type="conv",
                size=16,
                members=(
                    Member(layer=name, kind="conv", axis="out", index_map=tuple((i,) for i in range(16))),
                ),
                prunable=True,
                block=block,
            )
            for name, block in inner.items()
        ),
        input_shape=(3, 8, 8),
    )
    gone = Recipe(
        groups={"layer1.0.conv1": GroupChoice(ratio=1.0), "layer1.0.conv2": GroupChoice(ratio=0.25, bits=8)}
    )
    assert [row.kept for row in group_rows(gone, found)] == [0, 0]
    text = recipe_summary(TrialRecord(number=1, state="running", recipe=gone), found)
    assert "blocks taken out: layer1.0" in text
    assert "int8" not in text
