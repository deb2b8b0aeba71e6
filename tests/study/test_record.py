"""What a study's record holds of trials and of itself, in a file: one study for each story."""

from __future__ import annotations

import fcntl
import math
import os
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from autoprune.config import StudyConfig
from autoprune.errors import StorageError, UsageError
from autoprune.naming import StudyPaths
from autoprune.space.recipe import Recipe, uniform_recipe
from autoprune.study import opening
from autoprune.study.artifacts import temporary_folder
from autoprune.study.decode import FAILURE, PLAN, RESULT, Plan, failure_text, record, result_text
from autoprune.study.integrity import seal_line
from autoprune.study.listing import list_studies
from autoprune.study.locking import free_name, move_aside, take_lock
from autoprune.study.place import Place
from autoprune.study.store import StudyStore
from tests.study.made import GROUPS, add, make_measurement, open_for_writing

CUT = uniform_recipe(GROUPS, 0.5, 8)
MEASURED = make_measurement(CUT, GROUPS)


# -- texts of a trial ------------------------------------------------------------------------


def test_a_finished_trial_s_texts_make_its_record() -> None:
    plan = Plan(
        CUT, "tpe", "half", fidelity="final", rung=0, parent=3, started_from=2, round=1, variant="bits4", screened=0.5
    )  # fmt: skip
    texts = {PLAN: plan.text(), RESULT: result_text(MEASURED, 7, 1.5, 4, 9.5)}
    found = record(6, TrialState.COMPLETE, texts)
    assert (found.number, found.state, found.recipe, found.measurement) == (6, "complete", CUT, MEASURED)
    assert (found.origin, found.label, found.fidelity, found.rung) == ("tpe", "half", "final", 0)
    assert (found.parent, found.started_from, found.round, found.variant) == (3, 2, 1, "bits4")
    assert (found.screened, found.train_steps, found.duration_s) == (0.5, 7, 1.5)
    assert (found.repeat_of, found.ended_s) == (4, 9.5)
    plain = record(
        0, TrialState.COMPLETE, {PLAN: Plan(CUT, "tpe").text(), RESULT: result_text(MEASURED, 0, 0.0)}
    )
    assert (plain.fidelity, plain.rung, plain.round, plain.repeat_of, plain.ended_s) == (
        "search",
        1,
        0,
        None,
        0.0,
    )


def test_a_trial_that_failed_or_runs_has_what_is_known_of_it() -> None:
    plan = Plan(CUT, "tpe").text()
    failed = record(1, TrialState.FAIL, {PLAN: plan, FAILURE: failure_text("nan", "why", 2.0, 3.0)})
    assert (failed.state, failed.failure_kind, failed.failure_reason) == ("failed", "nan", "why")
    assert (failed.duration_s, failed.ended_s, failed.recipe, failed.measurement) == (2.0, 3.0, CUT, None)
    pruned = record(1, TrialState.PRUNED, {})
    assert (pruned.state, pruned.failure_kind) == ("failed", "raised")
    assert (pruned.failure_reason, pruned.duration_s) == ("no reason was recorded", 0.0)
    for state in (TrialState.RUNNING, TrialState.WAITING):
        assert record(1, state, {PLAN: plan, RESULT: result_text(MEASURED, 0, 0.0)}).measurement is None
        assert record(1, state, {}).state == "running"


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ({PLAN: Plan(CUT, "tpe").text()}, "'autoprune:result'"),
        ({RESULT: "{"}, "is no object"),
        ({RESULT: "[]"}, "is no object"),
        ({RESULT: result_text(MEASURED, 7, 1.5).replace("7", "8", 1)}, "its checksum differs"),
        ({RESULT: '{"unknown": 1}'}, "1 validation error for TrialRecord"),
        ({RESULT: "[" * 100_000}, "is no object"),
    ],
)
def test_a_trial_that_no_version_wrote_is_named(texts: dict[str, str], says: str) -> None:
    with pytest.raises(StorageError) as caught:
        record(9, TrialState.COMPLETE, texts)
    assert caught.value.message.startswith("trial 9 cannot be read: ") and says in caught.value.message
    assert len(caught.value.message.splitlines()) == 1
    assert "another version of autoprune wrote it" in caught.value.hint


# -- trials of a study -----------------------------------------------------------------------


def test_trials_are_recorded_with_all_that_is_known() -> None:
    store = open_for_writing("known", seed=3)
    assert store.records() == [] and store.place == Place(store.paths)
    assert (store.objectives, store.sampler_name) == (("accuracy", "latency", "size"), "auto")
    fixed = store.ask({"x": 0.25})
    assert fixed.suggest_float("x", 0.0, 1.0) == 0.25
    store.begin(fixed, Plan(CUT, "tpe", "first"))
    running = store.records()
    assert [(r.number, r.state, r.label) for r in running] == [(0, "running", "first")]
    store.complete(fixed, MEASURED, train_steps=7, duration_s=1.5, repeat_of=4, ended_s=9.0)
    lost = store.ask()
    store.begin(lost, Plan(Recipe(), "tpe"))
    store.fail(lost, "nan", "the loss became NaN", duration_s=2.5, ended_s=11.0)
    first, second = store.records()
    assert (first.state, first.measurement, first.train_steps, first.duration_s) == (
        "complete",
        MEASURED,
        7,
        1.5,
    )
    assert (first.repeat_of, first.ended_s) == (4, 9.0)
    assert (second.state, second.failure_kind, second.failure_reason) == (
        "failed",
        "nan",
        "the loss became NaN",
    )
    assert (second.duration_s, second.ended_s) == (2.5, 11.0)
    assert (store.record(0), store.record(1)) == (first, second)
    for number in (-1, 2):
        with pytest.raises(
            UsageError, match=rf"study 'known' has no trial {number}; it has 0 to 1"
        ) as caught:
            store.record(number)
        assert caught.value.hint == "`autoprune front known` lists the front"
    store.release()
    # Optuna's own values are what its samplers and dashboards see.
    study = optuna.load_study(study_name="known", storage=f"sqlite:///{store.paths.database}")
    assert study.trials[0].values == [MEASURED.search.value, MEASURED.latency.ratio, MEASURED.size_ratio]
    assert study.trials[0].params == {"x": 0.25}
    assert StudyStore.open("known").records() == [first, second]
    with pytest.raises(UsageError, match="unknown study 'knwn'; did you mean 'known'"):
        StudyStore.open("knwn")
    store.release()


def test_final_trials_are_once_in_each_round_and_variant() -> None:
    store = open_for_writing("final", objectives=("accuracy", "size"))
    parent = store.record(add(store, 0.5)).model_copy(update={"screened": 0.25})
    report = make_measurement(CUT, GROUPS, report=True)

    def final(**more: Any) -> int:
        given = {"recipe": CUT, "train_steps": 9, "duration_s": 2.0, "label": "last", "ended_s": 7.0, **more}
        return store.add_final(parent, report, **given)

    assert (final(started_from=0), final(), final(variant="bits4"), final(variant="bits4")) == (1, 1, 2, 2)
    found = store.record(1)
    assert (found.state, found.fidelity, found.origin, found.label) == ("complete", "final", "final", "last")
    assert (found.parent, found.started_from, found.round, found.rung, found.variant) == (0, 0, 1, 0, "")
    assert (found.train_steps, found.duration_s, found.ended_s, found.screened) == (9, 2.0, 7.0, 0.25)
    assert (found.recipe, found.measurement) == (CUT, report)
    assert store.record(2).variant == "bits4"
    store.end_round(30.0, "1h")
    assert final() == 3 and store.record(3).round == 2
    study = optuna.load_study(study_name="final", storage=f"sqlite:///{store.paths.database}")
    assert study.trials[1].values == [report.search.value, report.size_ratio]
    assert study.trials[1].params == {}
    store.release()


def test_a_study_knows_its_phase_its_rounds_and_what_was_spent() -> None:
    store = open_for_writing("phases")
    assert (store.phase, store.round, store.ended_rounds_s, store.ended_budget, store.spent_s) == (
        "search", 1, [], "", 0.0,
    )  # fmt: skip
    store.phase = "final"
    store.set_spent(12.5)
    assert (store.phase, store.spent_s) == ("final", 12.5)
    store.end_round(12.5, "1h")
    assert (store.phase, store.round, store.ended_rounds_s, store.ended_budget) == ("done", 2, [12.5], "1h")
    store.phase = "search"
    assert store.phase == "search"
    store.end_round(20.0, "2h")
    assert (store.phase, store.round, store.ended_rounds_s, store.ended_budget) == (
        "done",
        3,
        [12.5, 20.0],
        "2h",
    )
    store.note("data", "digits #1")
    store.note("empty", "")
    assert store.notes() == {"data": "digits #1", "empty": ""}
    settings = store.settings()
    settings["seed"] = 99
    assert store.settings()["seed"] == 0, "what is returned is a copy"
    study = optuna.load_study(study_name="phases", storage=f"sqlite:///{store.paths.database}")
    study.set_user_attr("note:data", "digits #0123456789abcdef")
    study.set_user_attr("spent_s", math.inf)
    with pytest.raises(
        StorageError, match=r"'phases' .* is damaged: note:data: its checksum differs"
    ) as caught:
        StudyStore.open("phases").notes()
    assert "goes on from its copy" in caught.value.hint
    study.set_user_attr("note:data", seal_line("digits"))
    with pytest.raises(StorageError, match="inf are no seconds"):
        _ = StudyStore.open("phases").spent_s
    store.release()


def test_trials_that_were_left_waiting_or_running_are_lost() -> None:
    store = open_for_writing("left")
    add(store, 0.5)
    store.begin(store.ask(), Plan(CUT, "tpe"))
    store.release()
    optuna.load_study(study_name="left", storage=f"sqlite:///{store.paths.database}").enqueue_trial(
        {"x": 1.0}
    )
    again = open_for_writing("left")
    found = again.records()
    assert [(r.number, r.state, r.failure_kind) for r in found[1:]] == [
        (1, "failed", "lost"),
        (2, "failed", "lost"),
    ]
    assert [r.failure_reason for r in found[1:]] == [
        "the run was killed",
        "the run was killed before this trial began",
    ]
    assert found[0].state == "complete" and found[1].recipe == CUT
    again.release()


def test_a_study_is_seen_through_others_eyes() -> None:
    store = open_for_writing("seen")
    add(store, 0.5)
    other = store.paths.on_target("torch")
    seen = store.as_seen(
        lambda r: r.model_copy(update={"label": "seen"}), {**store.settings(), "seed": 5}, other
    )
    assert ([r.label for r in seen.records()], seen.record(0).label) == (["seen"], "seen")
    assert (seen.settings()["seed"], seen.paths, seen.place.paths) == (5, other, other)
    assert store.record(0).label == ""
    store.release()


def test_studies_are_listed_with_their_progress() -> None:
    assert list_studies() == []
    store = open_for_writing("listed")
    add(store, 0.5)
    failed = store.ask()
    store.begin(failed, Plan(CUT, "tpe"))
    store.fail(failed, "nan", "", duration_s=0.0)
    store.add_final(
        store.record(0), make_measurement(CUT, GROUPS, report=True), recipe=CUT, train_steps=1, duration_s=0.0, label=""
    )  # fmt: skip
    store.set_spent(12.34)
    store.release()
    broken = StudyPaths.of("broken")
    broken.root.mkdir()
    broken.database.write_bytes(b"no database" * 500)
    broken.settings.write_text(store.paths.settings.read_text())
    assert list_studies("sqlite") == list_studies()
    rows = {row["study"]: row for row in list_studies()}
    assert rows["listed"] == {
        "study": "listed", "model": "m", "data": "d", "phase": "search", "trials": 3, "failed": 1, "final": 1,
        "spent_s": 12.3,
    }  # fmt: skip
    assert rows["broken"].pop("phase").startswith("unreadable: the record of study 'broken'")
    assert rows["broken"] == {
        "study": "broken", "model": "", "data": "", "trials": 0, "failed": 0, "final": 0, "spent_s": 0.0,
    }  # fmt: skip


# -- folders ---------------------------------------------------------------------------------


def descriptors() -> int:
    """Return how many files this process holds open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_folder_is_set_aside_under_the_next_name_that_is_free_everywhere() -> None:
    paths = StudyPaths.of("mine")
    assert free_name(paths) == "mine.1"
    take = take_lock(paths)
    for number in (1, 2):
        paths.root.with_name(f"mine.{number}").mkdir()
    assert free_name(paths) == "mine.3"
    assert free_name(paths, ("mine.1", "mine.3", "mine.5")) == "mine.4"
    opened = descriptors()
    with pytest.raises(StorageError, match="study 'mine' is being run by another process") as caught:
        take_lock(paths)
    assert caught.value.hint == "wait for it, stop it, or use another --study NAME"
    assert descriptors() == opened
    os.close(take)
    os.close(take_lock(paths))
    (paths.root / "file").write_text("x")
    move_aside(paths, "mine.4")
    assert (paths.root.with_name("mine.4") / "file").read_text() == "x" and not paths.root.exists()
    with pytest.raises(StorageError, match=r"mine' cannot be moved aside: No such file or directory"):
        move_aside(paths, "mine.5")


def test_fresh_sets_the_folder_aside_and_a_first_run_has_nothing_to() -> None:
    config = StudyConfig(model="m", data="d", study="anew")
    paths = StudyPaths.of("anew")
    StudyStore.create_or_resume(config, paths, fresh=True).release()
    assert sorted(path.name for path in paths.root.parent.iterdir()) == ["anew"]
    StudyStore.create_or_resume(config, paths, fresh=True).release()
    assert sorted(path.name for path in paths.root.parent.iterdir()) == ["anew", "anew.1"]


@pytest.mark.parametrize("folder", ["who?", "a%20b", "#1", "{x}", "ü ' \"", "a&b=c"])
def test_a_record_lies_in_its_folder_whatever_that_is_called(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / folder
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(place))
    for name in ("s", "t"):
        store = open_for_writing(name)
        add(store, 0.5)
        store.release()
        assert len(StudyStore.open(name).records()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [folder]
    assert all((place / name / "study.db").stat().st_size > 10_000 for name in ("s", "t"))


def test_a_lock_in_a_folder_that_is_moved_aside_is_none_of_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = StudyPaths.of("moved")
    os.close(take_lock(paths))
    lock = fcntl.flock
    moved: list[str] = []

    def late(descriptor: int, how: int) -> None:
        if not moved:  # another driver gets ahead between the opening of the file and its lock
            moved.append(free_name(paths))
            move_aside(paths, moved[0])
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    opened = descriptors()
    held = take_lock(paths)
    assert descriptors() == opened + 1
    assert os.path.samestat(os.fstat(held), paths.lock.stat())
    monkeypatch.undo()
    with pytest.raises(StorageError, match="is being run by another process"):
        take_lock(paths)
    os.close(held)


def test_a_study_is_set_aside_under_its_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    open_for_writing("aside").release()
    refused: list[str] = []

    def moved(paths: StudyPaths, name: str) -> None:
        with pytest.raises(StorageError, match="is being run by another process"):
            take_lock(paths)
        refused.append(name)
        move_aside(paths, name)

    monkeypatch.setattr(opening, "move_aside", moved)
    open_for_writing("aside", fresh=True).release()
    assert refused == ["aside.1"]


def test_a_study_that_could_not_be_opened_is_not_held() -> None:
    open_for_writing("held").release()
    paths = StudyPaths.of("held")
    before = descriptors()
    with pytest.raises(UsageError, match="was made with other settings"):
        open_for_writing("held", seed=7)
    assert descriptors() == before
    os.close(take_lock(paths))


def test_who_opens_a_study_fails_what_was_running_and_clears_what_was_half_written() -> None:
    store = open_for_writing("left")
    finished = add(store, 0.5)
    store.begin(store.ask(), Plan(Recipe(), "tpe"))
    store.release()
    half = temporary_folder(store.paths.artifacts)
    (half / "model.onnx").write_bytes(b"half")
    StudyStore.open("left").records()
    assert half.is_dir()  # readers clear nothing
    store = open_for_writing("left")
    assert not half.exists()
    first, second = store.records()
    assert (first.number, first.ended_s) == (finished, 0.0)
    assert (second.state, second.failure_kind, second.failure_reason) == (
        "failed",
        "lost",
        "the run was killed",
    )
    assert (second.duration_s, second.ended_s) == (0.0, 0.0)
    store.release()
