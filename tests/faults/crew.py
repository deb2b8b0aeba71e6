"""Studies of several processes: a real driver, record and executor; workers of :mod:`tests.faults.labour`.

:func:`run` is the driver's process, forked from a warm one and killed as tests like; :class:`Crew` is its study.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune.errors import AutopruneError
from autoprune.study.artifacts import verify
from autoprune.study.store import StudyStore
from tests.faults import labour, records
from tests.faults.harness import Run, Study, assert_intact
from tests.faults.labour import Labour

# Modules that drivers are forked from.
WARM = ("tests.faults.crew", "autoprune.search.driver", "autoprune.search.executors.start", "tests.search.fakes",
        "sqlalchemy.dialects.sqlite", "optuna.samplers._tpe.sampler")  # fmt: skip


@dataclass(frozen=True)
class Shift:
    """What a driver's process is told, as JSON.

    Attributes:
        name: Of the study.
        labour: What its workers are told.
        workers: How many.
        budget: Of the study.
        worker_lease_s: Seconds without a sign of life after which a worker is given up.
        lease_s: Seconds after which a driver loses a study in PostgreSQL.
        limit_s: Seconds after which a trial counts as hung.
        ray: Address of a cluster; None runs workers of this machine.
        artifacts: Folder through which artifacts are exchanged; None lets workers write into the study's own.
        measures: Whether latency is measured on a node that offers it.
        cpus: Processors of a trial on Ray.
        storage: URL of the database; None for the study's own file.
    """

    name: str
    labour: dict[str, Any]
    workers: int = 2
    budget: str = "12trials"
    worker_lease_s: float = 30.0
    lease_s: float = 60.0
    limit_s: float = 60.0
    ray: str | None = None
    artifacts: str | None = None
    measures: bool = False
    cpus: float = 1.0
    storage: str | None = None


class Crew(Study):
    """A study under fault whose trials are done by workers."""

    shift = Shift("crew", {})
    environment: Mapping[str, str] = {}

    def prepared(self, *, environment: Mapping[str, str] | None = None, **changes: Any) -> Crew:
        """Return it with another shift; ``trial_s`` and ``plan`` are those of its labour."""
        if environment is not None:
            self.environment = environment
        own: dict[str, Any] = {key: changes.pop(key) for key in ("trial_s", "plan") if key in changes}
        given = {**self.shift.labour, "log": str(self.log), **own}
        self.shift = dataclasses.replace(self.shift, name=self.name, labour=given, **changes)
        return self

    def begin(self, **changes: Any) -> Run:
        """Start its driver."""
        self.prepared(**changes)
        self.runs += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        output, errors = (self.folder / f"{self.name}.{self.runs}.{kind}" for kind in ("out", "err"))
        number, pid = self.forker.fork(
            entry="tests.faults.crew:run",
            words=[json.dumps(dataclasses.asdict(self.shift))],
            environment={
                "AUTOPRUNE_STUDIES": str(self.folder / "studies"),
                records.LOG: str(self.log),
                "AUTOPRUNE_STORAGE": self.shift.storage or "",
                **self.environment,
            },
            setups=[],
            output=str(output),
            errors=str(errors),
        )
        return Run(self, number, pid, errors, output)

    def end(self, **changes: Any) -> Run:
        """Run its driver to a good end."""
        run = self.begin(**changes)
        assert run.wait() == 0, run.said
        return run

    @property
    def workers(self) -> list[int]:
        """Processes of all workers that began so far, of all its runs."""
        return [line["worker"] for line in self.lines if "worker" in line]


def alive(pids: list[int]) -> list[int]:
    """Return those processes that are there; dead ones that nobody took note of are not."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.append(pid)
    return found


def assert_whole(crew: Crew, *, ended: bool = True) -> Counter[str]:
    """Check what :func:`assert_intact` checks, and that each artifact is that of its own recipe."""
    counts = assert_intact(crew, ended=False)
    found = crew.store().records()
    counts["retried"] = sum(r.failure_kind == "worker-lost" for r in found)
    for folder in crew.paths.artifacts.glob("trial-*"):
        record = found[int(folder.name.removeprefix("trial-"))]
        assert record.recipe is not None
        assert (folder / labour.MODEL).read_bytes() == labour.content(record.recipe), (
            "half a file, or another's"
        )
        verify(folder)
        counts["verified"] += 1
    if ended:
        assert crew.store().phase == "done"
        assert not [r.number for r in found if r.state == "running"], "trials are left running"
        assert not [p for p in crew.paths.root.rglob("*") if "unfinished" in p.name]
        began = Counter(json.dumps(line["token"]) for line in crew.lines if "began" in line)
        counts["evaluations"] = sum(began.values())
    return counts


# -- the driver's process ------------------------------------------------------------------------


def run(words: list[str]) -> int:
    """Run a driver as the command line does, as far as faults are concerned; return the exit code."""
    given = json.loads(words[0])
    shift = Shift(**{**given, "labour": given["labour"]})
    # Spawned workers are to import what they need, not what this process was forked from.
    program = sys.modules["__main__"]
    program.__spec__ = None
    vars(program).pop("__file__", None)
    records.log_store()
    try:
        return _search(shift)
    except KeyboardInterrupt:
        print("autoprune: interrupted; the same command again resumes", file=sys.stderr)
        return 130
    except AutopruneError as error:
        print(f"autoprune: {error.message}\n{error.hint}", file=sys.stderr)
        return error.exit_code


def _search(shift: Shift) -> int:
    from autoprune.clock import SystemClock
    from autoprune.config import StudyConfig, parse_budget
    from autoprune.execution import Execution
    from autoprune.naming import StudyPaths
    from autoprune.search.budget import Timekeeper
    from autoprune.search.driver import Driver
    from autoprune.search.executors.start import WorkerTrials, running
    from autoprune.search.interrupt import Interrupt
    from autoprune.search.replay import spent_s
    from autoprune.search.shelf import Shelf
    from autoprune.space.space_files import load_space
    from tests.search.fakes import FakeBench

    class Bench(FakeBench):
        def adopt_dense(self, folder: Path, record: Any) -> None:
            assert (folder / labour.MODEL).is_file()

    execution = Execution(
        engine="local" if shift.ray is None else "ray",
        workers=shift.workers,
        artifacts=shift.artifacts,
        address=shift.ray,
        cpus_per_trial=None if shift.ray is None else shift.cpus,
    )
    config = StudyConfig.model_validate(
        {"model": "m", "data": "d", "study": shift.name, "sampler": "random", "budget": shift.budget,
         "execution": execution}
    )  # fmt: skip
    store = StudyStore.create_or_resume(config, StudyPaths.of(shift.name), lease_s=shift.lease_s)
    interrupt, clock = Interrupt(), SystemClock()
    keeper = Timekeeper(parse_budget(shift.budget), config.final_share, clock, spent_s(store))
    bench: Any = Bench(labour.GROUPS, config)
    try:
        with interrupt.listening():
            store.note("groups", labour.GROUPS.model_dump_json())
            executor, outer = _executor(shift, config, store.paths)
            with running(executor, interrupt):
                trials = WorkerTrials(outer, bench, store.paths)
                driver = Driver(
                    store, load_space("default"), bench, keeper, interrupt, lambda progress: None, clock,
                    run=trials.run, adopt_dense=trials.adopt_dense, executor=outer,
                    shelf=Shelf.of(config, store.paths),
                )  # fmt: skip
                store.phase = "search"
                driver.search(lambda: 0.0)
                driver.shelf.tidy(at_once=True)
                print(
                    json.dumps({"refused": getattr(executor, "refused", 0), "lost": _lost(outer)}), flush=True
                )
            if not interrupt():
                store.end_round(keeper.spent_s, shift.budget)
    finally:
        store.set_spent(keeper.spent_s)
        store.release()
    if interrupt.requested:
        raise KeyboardInterrupt
    return 0


def _lost(executor: Any) -> int:
    return sum(state.lost for state in executor.states())


def _executor(shift: Shift, config: Any, paths: Any) -> tuple[Any, Any]:
    given = Labour(**{**shift.labour, "log": Path(shift.labour["log"])})
    if shift.ray is not None:
        from tests.faults.crew_ray import make

        made: tuple[Any, Any] = make(shift, given, config, paths)
        return made
    from autoprune.search.executors.limits import RequestLimits
    from autoprune.search.executors.local import LocalExecutor, seats

    executor = LocalExecutor(
        given,
        seats(shift.workers),
        RequestLimits(lambda: None, shift.limit_s),
        labour.serve,
        shift.worker_lease_s,
    )
    return executor, executor
