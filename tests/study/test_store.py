"""The record of a study, in SQLite and PostgreSQL alike: resumed whole, never doubled, refused where it must be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoprune.errors import StorageError, UsageError
from autoprune.measure.record import Measurement, RunFigures
from autoprune.naming import studies_root
from autoprune.space.recipe import uniform_recipe
from autoprune.study.decode import Plan
from autoprune.study.store import StudyStore
from tests.study.made import GROUPS, add, make_measurement, open_for_writing

pytestmark = pytest.mark.usefixtures("storage")


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
    with pytest.raises(StorageError, match="being run by another"):
        open_for_writing("locked")
    with pytest.raises(StorageError, match="being run by another"):
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


def test_a_study_folder_that_cannot_be_made_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot be written"):
        open_for_writing("nowhere")


def test_metric_names_are_there_for_the_dashboard(storage: str) -> None:
    import optuna

    store = open_for_writing("named")
    add(store, 0.5)
    store.release()
    url = f"sqlite:///{store.paths.database}"
    if storage != "sqlite":
        url = storage.replace("postgresql:", "postgresql+psycopg:")
    study = optuna.load_study(study_name="named", storage=url)
    assert study.metric_names == ["accuracy", "latency_ratio", "size_ratio"]
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]


_LOOP = """
import sys
from tests.study.made import add, open_for_writing
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
