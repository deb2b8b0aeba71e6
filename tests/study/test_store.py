"""The record of a study: resumed whole, never doubled, refused where it must be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoprune.config import StudyConfig
from autoprune.errors import StorageError, UsageError
from autoprune.measure.record import Measurement, RunFigures
from autoprune.naming import StudyPaths, studies_root
from autoprune.space.recipe import uniform_recipe
from autoprune.study.decode import Plan
from autoprune.study.listing import list_studies
from autoprune.study.store import StudyStore
from tests.search.fakes import make_groups, make_measurement

GROUPS = make_groups()


def config(name: str, **changes: object) -> StudyConfig:
    return StudyConfig.model_validate({"model": "m", "data": "d", "study": name, **changes})


def open_for_writing(name: str, *, fresh: bool = False, **changes: object) -> StudyStore:
    settings = config(name, **changes)
    return StudyStore.create_or_resume(settings, StudyPaths.of(name), fresh=fresh)


def add(store: StudyStore, ratio: float, label: str = "") -> int:
    recipe = uniform_recipe(GROUPS, ratio, 8)
    trial = store.ask()
    store.begin(trial, Plan(recipe, "tpe", label))
    store.complete(trial, make_measurement(recipe, GROUPS), train_steps=7, duration_s=1.5)
    return int(trial.number)


def test_a_finished_trial_comes_back_as_it_was() -> None:
    store = open_for_writing("one")
    number = add(store, 0.5, "half")
    store.release()
    record = StudyStore.open("one").record(number)
    recipe = uniform_recipe(GROUPS, 0.5, 8)
    assert record.recipe == recipe
    assert record.measurement == make_measurement(recipe, GROUPS)
    assert (record.label, record.train_steps, record.duration_s, record.state) == ("half", 7, 1.5, "complete")


def test_peak_memory_of_an_earlier_version_is_read() -> None:
    recorded = make_measurement(uniform_recipe(GROUPS, 0.5, 8), GROUPS).model_dump(mode="json")
    del recorded["figures"]
    for memory_bytes in (5_000_000, None):
        earlier = Measurement.model_validate({**recorded, "memory_bytes": memory_bytes})
        assert earlier.figures == RunFigures(memory_bytes=memory_bytes)
        assert Measurement.model_validate_json(earlier.model_dump_json()) == earlier


def test_what_a_killed_run_left_running_is_lost_and_told_so() -> None:
    store = open_for_writing("killed")
    trial = store.ask()
    store.begin(trial, Plan(uniform_recipe(GROUPS, 0.5, 8), "tpe"))
    store.ask()
    store.release()
    records = open_for_writing("killed").records()
    assert [(r.state, r.failure_kind) for r in records] == [("failed", "lost"), ("failed", "lost")]
    assert records[0].recipe == uniform_recipe(GROUPS, 0.5, 8)


def test_a_changed_setting_is_refused_with_the_difference() -> None:
    open_for_writing("settings").release()
    with pytest.raises(UsageError, match=r"seed: 0 -> 3"):
        open_for_writing("settings", seed=3)
    open_for_writing("settings", budget="2h").release()


def test_fresh_keeps_the_old_study_aside() -> None:
    store = open_for_writing("again")
    add(store, 0.5)
    store.release()
    store = open_for_writing("again", fresh=True, seed=9)
    assert store.records() == []
    store.release()
    assert len(StudyStore.open("again.1").records()) == 1


def test_a_second_driver_is_refused() -> None:
    store = open_for_writing("locked")
    with pytest.raises(StorageError, match="another process"):
        open_for_writing("locked")
    with pytest.raises(StorageError, match="another process"):
        open_for_writing("locked", fresh=True)
    store.release()
    open_for_writing("locked").release()


def test_a_final_trial_is_recorded_once() -> None:
    store = open_for_writing("final")
    parent = store.record(add(store, 0.5))
    measurement = make_measurement(uniform_recipe(GROUPS, 0.5, 8), GROUPS, report=True)
    numbers = {
        store.add_final(
            parent,
            measurement,
            recipe=uniform_recipe(GROUPS, 0.5, 8),
            train_steps=99,
            duration_s=2.0,
            label="x",
        )
        for _ in range(2)
    }
    assert len(numbers) == 1
    finals = [r for r in store.records() if r.fidelity == "final"]
    assert [(r.number, r.parent, r.train_steps, r.state) for r in finals] == [(1, 0, 99, "complete")]


def test_an_unknown_study_names_its_neighbours() -> None:
    open_for_writing("resnet18-digits").release()
    with pytest.raises(UsageError, match="did you mean 'resnet18-digits'"):
        StudyStore.open("resnet18-digit")


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 100])
def test_a_damaged_database_is_named(content: bytes) -> None:
    open_for_writing("damaged").release()
    paths = StudyPaths.of("damaged")
    for extra in ("-wal", "-shm"):
        paths.database.with_name(paths.database.name + extra).unlink(missing_ok=True)
    paths.database.write_bytes(content)
    with pytest.raises(StorageError, match=r"study\.db"):
        StudyStore.open("damaged").records()
    assert list_studies()[0]["phase"].startswith("unreadable")


def test_a_truncated_database_is_set_aside_for_its_copy_and_refused_without_one() -> None:
    store = open_for_writing("cut")
    for ratio in (0.2, 0.4, 0.6):
        add(store, ratio)
    before = store.records()
    store.release()
    paths = StudyPaths.of("cut")
    half = paths.database.read_bytes()[: paths.database.stat().st_size // 2]
    paths.database.write_bytes(half)
    with pytest.raises(StorageError, match="study.db"):
        StudyStore.open("cut")
    store = open_for_writing("cut")
    assert store.records() == before
    assert paths.database.with_name("study.db.damaged-1").read_bytes() == half
    store.release()
    paths.database.write_bytes(half)
    paths.database_copy.unlink()
    with pytest.raises(StorageError, match="study.db"):
        open_for_writing("cut")
    assert paths.database.read_bytes() == half


def test_a_study_folder_that_cannot_be_made_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot be written"):
        open_for_writing("nowhere")


def test_metric_names_are_there_for_the_dashboard() -> None:
    import optuna

    store = open_for_writing("named")
    add(store, 0.5)
    store.release()
    study = optuna.load_study(study_name="named", storage=f"sqlite:///{store.paths.database}")
    assert study.metric_names == ["accuracy", "latency_ratio", "size_ratio"]
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]


_LOOP = """
import sys
from tests.study.test_store import add, open_for_writing
store = open_for_writing("murdered")
while True:
    print(add(store, 0.5), flush=True)
"""


def test_kill_at_any_moment_loses_and_doubles_nothing(repository: Path) -> None:
    acknowledged: list[int] = []
    for delay_s in (0.05, 0.13, 0.21):
        process = subprocess.Popen(
            [sys.executable, "-c", _LOOP],
            stdout=subprocess.PIPE,
            text=True,
            cwd=repository,
            env={**os.environ, "AUTOPRUNE_STUDIES": str(studies_root())},
        )
        assert process.stdout is not None
        acknowledged.append(int(process.stdout.readline()))
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split("\n")[:-1]
        acknowledged += [int(line) for line in rest]
    records = open_for_writing("murdered").records()
    complete = {r.number for r in records if r.state == "complete"}
    assert len(acknowledged) == len(set(acknowledged)) >= 3
    assert set(acknowledged) <= complete
    assert all(r.state != "running" for r in records)
    assert [r.number for r in records] == list(range(len(records)))
