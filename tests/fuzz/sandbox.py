"""A folder that a case may do anything in, and what must hold of whatever it did."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.zygote import ACCEPTED, STOPS

CODES = (0, 2, 3, 4, 5, 6)
# The promise of the issue. Time is that of the processor, so that a busy machine changes nothing; one slow run in
# three is forgiven.
LIMIT_S = 2.0
LIMIT_BYTES = 300 * 2**20
# Empty, made with O_NOFOLLOW, and the same for all users of a machine.
MACHINE_LOCK = "/tmp/autoprune-measure.lock"
LONGEST_MESSAGE = 12_000


@dataclass
class Outcome:
    """What a case did.

    Attributes:
        code: Exit code; 77 where real work would have begun, negative for a signal.
        out: Standard output.
        err: Standard error.
        events: What the process did to files, programs and connections; see :func:`tests.fuzz.zygote.watch`.
        cpu_s: Seconds of the processor.
        wall_s: Seconds.
        memory: Bytes beyond what the program had loaded before.
    """

    code: int
    out: str
    err: str
    events: list[list[str]]
    cpu_s: float
    wall_s: float
    memory: int


@dataclass
class Sandbox:
    """A folder with a home, a place to work and a place that nobody may touch.

    Attributes:
        root: The folder.
        process: The process that runs cases.
        template: Files by their path in the working folder that each case begins with.
    """

    root: Path
    process: subprocess.Popen[str]
    template: Path
    cases: int = 0

    @property
    def work(self) -> Path:
        """The working folder of a case."""
        return self.root / "work"

    @classmethod
    def start(cls, root: Path, template: Path) -> Sandbox:
        """Start the process that runs cases; each begins with a copy of ``template``."""
        home = Path(__file__).resolve().parents[2]
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg", "COLUMNS": "200"}
        environment = {**os.environ, **quiet, "PYTHONPATH": str(home), "MPLCONFIGDIR": str(root / "cache")}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.zygote"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=home,
        )  # fmt: skip
        sandbox = cls(root, process, template)
        sandbox.reset()
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"ready": True}
        return sandbox

    def stop(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=30)

    def reset(self) -> None:
        """Bring the folder back to what a case begins with."""
        for name in ("home", "cache", "tmp", "outside", "data"):
            shutil.rmtree(self.root / name, ignore_errors=True)
            (self.root / name).mkdir(parents=True)
        (self.root / "outside" / "kept").write_text("nobody may touch this", encoding="utf-8")
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.template, self.work, symlinks=True)
        os.mkfifo(self.work / "fifo")

    def environment(self) -> dict[str, str]:
        """Return the variables that keep a case inside of the sandbox."""
        places = {
            "HOME": "home", "TMPDIR": "tmp", "AUTOPRUNE_CACHE": "cache", "AUTOPRUNE_DATA": "data",
            "AUTOPRUNE_STUDIES": "work/studies", "XDG_CACHE_HOME": "cache", "TORCH_HOME": "cache",
        }  # fmt: skip
        return {name: str(self.root / place) for name, place in places.items()}

    def execute(self, case: dict[str, Any]) -> Outcome:
        """Run one case: ``words`` of the command line, or ``call`` with ``arguments``."""
        whole = {"stops": STOPS, **case, "folder": str(self.work), "environment": self.environment()}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(whole) + "\n")
        self.process.stdin.flush()
        self.cases += 1
        return Outcome(**json.loads(self.process.stdout.readline()))

    def check(
        self,
        words: Sequence[str] = (),
        *,
        may_write: Sequence[str] = (),
        case: dict[str, Any] | None = None,
        codes: Sequence[int] = CODES,
    ) -> Outcome:
        """Run a case and hold it to the promise: a message and the right exit code, nothing else touched or run.

        Args:
            words: Of the command line.
            may_write: Paths below the working folder that it may write to or make.
            case: A whole case instead of words.
            codes: Exit codes that are right.
        """
        given = case or {"words": list(words)}
        allowed = [os.path.normpath(self.work / name) for name in may_write]
        outcome, faults = self._once(given, allowed, codes)
        for _ in range(2):  # alone, so that what earlier cases left behind does not count
            if not faults:
                break
            outcome, faults = self._once({**given, "fresh": True}, allowed, codes)
        assert not faults, f"{given}: {'; '.join(faults)}\n{outcome}"
        return outcome

    def _once(
        self, case: dict[str, Any], allowed: list[str], codes: Sequence[int]
    ) -> tuple[Outcome, list[str]]:
        before = tree(self.root)
        outcome = self.execute(case)
        after = tree(self.root)
        faults = [*faults_of(outcome, codes), *self._written(outcome, allowed, before, after)]
        if after != before:
            self.restore(before, after)
        return outcome, faults

    def restore(self, before: dict[str, str], after: dict[str, str]) -> None:
        """Take away what a case made; bring back the template where it changed that."""
        for name in sorted(set(after) - set(before), reverse=True):
            place = self.root / name
            if place.is_symlink() or not place.is_dir():
                place.unlink(missing_ok=True)
            else:
                shutil.rmtree(place, ignore_errors=True)
        if any(after.get(name) != content for name, content in before.items()):
            self.reset()

    def _written(
        self, outcome: Outcome, allowed: list[str], before: dict[str, str], after: dict[str, str]
    ) -> list[str]:
        free = [str(self.root / name) for name in ("cache", "tmp", "data")]
        changed = [n for n in {**before, **after} if before.get(n) != after.get(n)]
        paths = [str(self.root / name) for name in changed]
        paths += [event[1] for event in outcome.events if event[0] == "write"]
        faults = [
            f"wrote {path!r}"
            for path in dict.fromkeys(paths)
            if not path.startswith(("/dev/", "/proc/self"))
            and path != MACHINE_LOCK
            and not any(_is_in(path, place) for place in (*free, *allowed))
        ]
        if (self.root / "outside" / "kept").read_text(encoding="utf-8") != "nobody may touch this":
            faults.append("touched what is outside")
        if any((self.root / "tmp").glob("autoprune-*.log")):
            faults.append("left a traceback")
        return faults


def _is_in(path: str, place: str) -> bool:
    ends_open = place.endswith(".unfinished-")
    return path == place or path.startswith(place if ends_open else place + "/")


def faults_of(outcome: Outcome, codes: Sequence[int]) -> list[str]:
    """Return what is wrong with the exit code, the message, the time and the memory of a case."""
    faults = []
    if outcome.code not in (*codes, ACCEPTED):
        faults.append(f"exit code {outcome.code}")
    if "Traceback" in outcome.err + outcome.out or "bug of autoprune" in outcome.err:
        faults.append("a traceback or a bug")
    if outcome.code in codes and outcome.code != 0:
        begins = [line for line in outcome.err.splitlines() if line.startswith("autoprune: ")]
        if len(begins) != 1:
            faults.append(f"{len(begins)} messages")
        if len(outcome.err) > LONGEST_MESSAGE:
            faults.append(f"a message of {len(outcome.err)} characters")
        if outcome.out.strip():
            faults.append("output beside the message")
    faults += [f"{event[0]} {event[1:]}" for event in outcome.events if event[0] in ("exec", "pickle")]
    if outcome.cpu_s > LIMIT_S:
        faults.append(f"slow: {outcome.cpu_s:.1f} s")
    if outcome.memory > LIMIT_BYTES:
        faults.append(f"memory: {outcome.memory / 2**20:.0f} MiB")
    return faults


def tree(folder: Path) -> dict[str, str]:
    """Return every path below a folder with what tells its content; without caches and temporary files."""
    found: dict[str, str] = {}
    for top, folders, files in os.walk(folder):
        relative = os.path.relpath(top, folder)
        if relative == ".":
            folders[:] = [name for name in folders if name not in ("cache", "tmp", "data")]
        for name in (*folders, *files):
            path = Path(top) / name
            status = path.lstat()
            kind = (
                "d" if path.is_dir() and not path.is_symlink() else f"{status.st_size} {status.st_mtime_ns}"
            )
            found[os.path.normpath(os.path.join(relative, name))] = kind
    return found


def scratch() -> Path:
    """Return a new folder outside of pytest's, whose paths are long."""
    return Path(tempfile.mkdtemp(prefix="autoprune-fuzz-"))
