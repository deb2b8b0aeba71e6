"""Many processes at once: drivers of studies of their own with readers, and one study that all of them write."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from autoprune.naming import StudyPaths, studies_root
from autoprune.study.database import open_storage
from autoprune.study.place import Place
from autoprune.study.store import StudyStore
from tests.study.made import open_for_writing

pytestmark = pytest.mark.usefixtures("storage")

_DRIVER = """
import sys
from tests.study.made import add, open_for_writing
name, trials = sys.argv[1], int(sys.argv[2])
store = open_for_writing(name)
for _ in range(trials):
    assert add(store, 0.5) == len(store.records()) - 1
store.release()
"""

_READER = """
import sys, time
from autoprune.errors import StorageError, UsageError
from autoprune.study.store import StudyStore
name, trials = sys.argv[1], int(sys.argv[2])
while True:
    try:
        store = StudyStore.open(name)
        break
    except (UsageError, StorageError):  # not whole yet
        time.sleep(0.05)
seen = 0
while seen < trials:
    records = store.records()
    assert [r.number for r in records] == list(range(len(records))), records
    complete = sum(r.state == "complete" for r in records)
    assert complete >= seen
    seen = complete
"""

# Without a lease, as Optuna itself lets many processes write one study.
_SHARED = """
import sys
import optuna
from autoprune.naming import StudyPaths
from autoprune.study.database import open_storage
from autoprune.study.place import Place
name, trials = sys.argv[1], int(sys.argv[2])
storage = open_storage(Place.of(StudyPaths.of("shared")), create=True)
study = optuna.load_study(study_name="shared", storage=storage, sampler=optuna.samplers.RandomSampler())
for each in range(trials):
    trial = study.ask()
    trial.suggest_float("x", 0.0, 1.0)
    trial.set_user_attr("who", f"{name}:{each}")
    study.tell(trial, [0.5, 0.5, 0.5])
    print(trial.number, name, each, flush=True)
"""


def run_all(code: Sequence[tuple[str, str]], trials: int, repository: Path) -> list[str]:
    """Run pieces of code with their names, each as a process; return what they printed."""
    env = {**os.environ, "AUTOPRUNE_STUDIES": str(studies_root())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", text, name, str(trials)],
            cwd=repository, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for text, name in code
    ]  # fmt: skip
    told = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(code), "\n".join(err for _, err in told)
    assert [err for _, err in told if "locked" in err] == []
    return [line for out, _ in told for line in out.splitlines()]


def many(processes: int, trials: int, repository: Path) -> None:
    names = [f"s{number}" for number in range(processes)]
    run_all([(code, name) for code in (_DRIVER, _READER) for name in names], trials, repository)
    for name in names:
        records = StudyStore.open(name).records()
        assert [(r.number, r.state) for r in records] == [(n, "complete") for n in range(trials)]


def one(processes: int, trials: int, repository: Path) -> None:
    open_for_writing("shared").release()
    shared = [(_SHARED, f"s{number}") for number in range(processes)]
    told = [line.split() for line in run_all(shared, trials, repository)]
    opened = open_storage(Place.of(StudyPaths.of("shared")), create=False)
    found = opened.get_all_trials(opened.get_study_id_from_name("shared"))
    assert [trial.number for trial in found] == list(range(processes * trials))
    assert {(str(t.number), t.user_attrs["who"]) for t in found} == {(n, f"{who}:{i}") for n, who, i in told}
    assert len({t.user_attrs["who"] for t in found}) == processes * trials
    assert all(t.state.name == "COMPLETE" and set(t.params) == {"x"} for t in found)


@pytest.mark.slow
def test_drivers_and_readers_share_a_database(repository: Path) -> None:
    many(2, 5, repository)


def test_processes_share_a_study(repository: Path) -> None:
    one(3, 10, repository)


@pytest.mark.slow
def test_eight_drivers_and_eight_readers(repository: Path) -> None:
    many(8, 400, repository)


@pytest.mark.slow
def test_eight_processes_share_a_study(repository: Path) -> None:
    one(8, 400, repository)
