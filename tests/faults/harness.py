"""Studies under fault: started by one function, killed, resumed, and checked by one function."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoprune.naming import StudyPaths
from autoprune.search.baselines import effective_key
from autoprune.space.groups import Groups
from autoprune.study.artifacts import artifact_folder, verify
from autoprune.study.records import TrialRecord
from autoprune.study.store import StudyStore
from tests.faults import misbehaviour, records

_HERE = Path(__file__).parent
_REPOSITORY = _HERE.parents[1]
_LIMIT_S = 120.0
MAX_TRIES = 3


class Forker:
    """The warm process that studies are forked from.

    Args:
        folder: Gets the compiled shim.
        modules: What it imports; what a search needs if none is given.
    """

    def __init__(self, folder: Path, *modules: str) -> None:
        self.shim = shim(folder)
        preload = {"LD_PRELOAD": str(self.shim)} if self.shim is not None else {}
        path = os.pathsep.join(p for p in (str(_REPOSITORY), os.environ.get("PYTHONPATH", "")) if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forker", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=_REPOSITORY,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **preload},
        )
        self._count = 0
        self._statuses: dict[int, int] = {}
        self._pids: dict[int, int] = {}
        self._read()

    def fork(self, **request: Any) -> tuple[int, int]:
        """Start a command; return its number and its process id."""
        self._count += 1
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"id": self._count, **request}) + "\n")
        while self._count not in self._pids:
            self._read()
        return self._count, self._pids[self._count]

    def wait(self, number: int) -> int:
        """Return the exit code of a command, negative for the signal that ended it."""
        while number not in self._statuses:
            self._read()
        return os.waitstatus_to_exitcode(self._statuses[number])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the forker died"
        answer = json.loads(line)
        if "started" in answer:
            self._pids[answer["started"]] = answer["pid"]
        elif "ended" in answer:
            self._statuses[answer["ended"]] = answer["status"]


def shim(folder: Path) -> Path | None:
    """Return the library that gives a process a full disk or another clock; None where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    made = folder / "shim.so"
    words = [compiler, "-O1", "-shared", "-fPIC", "-o", str(made), str(_HERE / "shim.c"), "-ldl"]
    return made if subprocess.run(words, check=False, capture_output=True).returncode == 0 else None


@dataclass
class Run:
    """One run of a study's command."""

    study: Study
    number: int
    pid: int
    errors: Path
    output: Path

    def wait(self) -> int:
        """Return its exit code."""
        return self.study.forker.wait(self.number)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal; one that has ended gets none."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def said(self) -> str:
        """What it wrote on the standard error."""
        return self.errors.read_text(errors="replace")


@dataclass
class Study:
    """A study under fault.

    Attributes:
        forker: Where its runs are forked from.
        folder: Holds its studies folder, cache and logs.
        name: Its name.
        budget: Its budget.
        extra: Words of its command besides.
    """

    forker: Forker
    folder: Path
    name: str = "fault"
    budget: str = "2trials"
    sampler: str = "tpe"
    extra: Sequence[str] = ()
    final_share: float = 0.1
    runs: int = 0
    seen: dict[int, str] = field(default_factory=dict)

    @property
    def paths(self) -> StudyPaths:
        return StudyPaths(self.folder / "studies" / self.name)

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(
        self,
        *words: str,
        fault: str = "",
        trials: str = "",
        setups: Sequence[tuple[str, Sequence[Any]]] = (),
        environment: Mapping[str, str] | None = None,
        verb: Sequence[str] | None = None,
    ) -> Run:
        """Start the study's command; the one way in which any test here starts a study.

        Args:
            words: Further words.
            fault: Where it ends itself, see :mod:`autoprune.faults`.
            trials: What its trials do, see :mod:`tests.faults.misbehaviour`.
            setups: Functions of :mod:`tests.faults.setups` and their arguments, run before.
            environment: Further variables.
            verb: Another command than the search.
        """
        self.runs += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        own = [
            "search",
            "--model",
            f"{_HERE / 'network.py'}:build",
            "--data",
            f"{_HERE / 'network.py'}:images",
        ]
        own += [
            "--trust-code",
            "--study",
            self.name,
            "--space",
            str(_HERE / "space.yaml"),
            "--budget",
            self.budget,
        ]
        own += ["--sampler", self.sampler, "front_points=2", f"final_share={self.final_share}", *self.extra]
        output, errors = (self.folder / f"{self.name}.{self.runs}.{kind}" for kind in ("out", "err"))
        number, pid = self.forker.fork(
            words=[*(own if verb is None else verb), *words],
            environment={
                "AUTOPRUNE_STUDIES": str(self.folder / "studies"),
                "AUTOPRUNE_CACHE": str(self.folder / "cache"),
                "AUTOPRUNE_DATA": str(self.folder / "data"),
                records.LOG: str(self.log),
                **({"AUTOPRUNE_FAULT": fault} if fault else {}),
                misbehaviour.TRIALS: trials,
                **(environment or {}),
            },
            setups=[list(each) for each in setups],
            output=str(output),
            errors=str(errors),
        )
        return Run(self, number, pid, errors, output)

    def run(self, *words: str, **how: Any) -> Run:
        """Run the study's command and wait; see :meth:`start`."""
        run = self.start(*words, **how)
        run.wait()
        return run

    def finish(self, **how: Any) -> Run:
        """Run the study's command to its end, which has to be a good one."""
        run = self.run(**how)
        assert run.wait() == 0, run.said
        return run

    # -- what it wrote -----------------------------------------------------------------------

    @property
    def records(self) -> list[TrialRecord]:
        """Its trials."""
        return self.store().records()

    def store(self) -> StudyStore:
        """Open it for reading."""
        before = os.environ.get("AUTOPRUNE_STUDIES")
        os.environ["AUTOPRUNE_STUDIES"] = str(self.folder / "studies")
        try:
            return StudyStore.open(self.name)
        finally:
            if before is None:
                del os.environ["AUTOPRUNE_STUDIES"]
            else:
                os.environ["AUTOPRUNE_STUDIES"] = before

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What it logged; see :mod:`tests.faults.records`."""
        return records.read(self.log)

    @property
    def told(self) -> dict[int, str]:
        """Hash of each trial that was acknowledged."""
        return {line["told"]: line["digest"] for line in self.lines if "told" in line}

    @property
    def evaluations(self) -> list[str]:
        """Keys of the recipes whose evaluation began, in order."""
        return [line["began"] for line in self.lines if "began" in line]

    @property
    def steps(self) -> int:
        """Steps of training taken in all runs."""
        place = Path(f"{self.log}.steps")
        return place.stat().st_size if place.exists() else 0


def key_of(record: TrialRecord, groups: Groups) -> str:
    """Return what makes two trials the same."""
    assert record.recipe is not None
    return effective_key(record.recipe, groups)


def assert_intact(study: Study, *, ended: bool = True, unread: Collection[Path] = ()) -> Counter[str]:
    """Check that nothing acknowledged is lost, nothing doubled, nothing left half, and that the study ended.

    Args:
        study: A study, none of whose runs is under way.
        ended: Whether its last run came to a good end; else only what holds at any time is checked.
        unread: Folders that were damaged, and that the study had no reason to read since.

    Returns:
        Counts of what was checked, for the summary.
    """
    store = study.store()
    found = store.records()
    told = study.told
    assert [r.number for r in found] == list(range(len(found)))
    for number, digest in told.items():
        assert number < len(found), f"acknowledged trial {number} is lost"
        assert records.digest(found[number]) == digest, f"acknowledged trial {number} changed"
    complete = [r for r in found if r.state == "complete"]
    groups = (
        Groups.model_validate_json(store.notes()["groups"]) if complete else Groups(groups=(), input_shape=())
    )
    own = Counter(
        (key_of(r, groups), r.rung) for r in complete if r.fidelity == "search" and r.repeat_of is None
    )
    assert not [key for key, count in own.items() if count > 1], (
        "a recipe was evaluated twice at one fidelity"
    )
    finals = Counter((r.parent, r.round, r.variant) for r in complete if r.fidelity == "final")
    assert not [key for key, count in finals.items() if count > 1], "a final point is doubled"
    # The dense network is tried until it is measured: without it there is no study.
    tries = Counter(key for key in study.evaluations if not key.startswith("dense|[{}"))
    assert max(tries.values(), default=0) <= MAX_TRIES, "a recipe was tried more often than twice more"
    half = [p for p in study.paths.root.rglob("*") if "unfinished" in p.name]
    manifests = [p.parent for p in study.paths.artifacts.glob("trial-*/manifest.json")]
    counts = Counter(told=len(told), trials=len(found), lost=sum(r.failure_kind == "lost" for r in found))
    if not ended:
        return counts
    assert store.phase == "done"
    assert not [r.number for r in found if r.state == "running"], "trials are left running"
    assert not half, f"half-written files are left: {half}"
    for record in complete:
        if record.fidelity == "final":
            verify(artifact_folder(study.paths, record))
            counts["verified"] += 1
    for folder in manifests:
        if ".damaged-" not in folder.name and folder not in unread:
            verify(folder)
    assert any(r.fidelity == "final" and r.origin == "final" for r in complete)
    return counts


def until(condition: Any, limit_s: float = _LIMIT_S) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)
