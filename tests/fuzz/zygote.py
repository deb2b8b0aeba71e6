"""A process that has imported autoprune and makes a copy of itself for each case, which costs milliseconds.

Run as ``python -m tests.fuzz.zygote``: one case as JSON on each line of the standard input, one outcome on each line of
the standard output. The copy runs the command line with its output caught, and reports what it does to the machine:
which files it opens for writing, which programs and connections it starts, which names a pickle asks for.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

WARM = (
    "autoprune.actions", "autoprune.exporting", "autoprune.api", "autoprune.cli.main", "autoprune.report.writing", "autoprune.report.card",
    "autoprune.report.robustness_view", "autoprune.report.sensitivity_view", "autoprune.report.profile_view",
    "autoprune.report.tickets_view", "autoprune.search.run", "autoprune.search.sensitivity", "autoprune.search.tickets",
    "autoprune.study.listing", "autoprune.study.measurements", "autoprune.deploy.sessions.onnxruntime",
    "autoprune.deploy.sessions.torch", "autoprune.deploy.onnxruntime", "autoprune.deploy.torch",
    "autoprune.workloads.weights", "autoprune.workloads.models", "sklearn.datasets", "plotly.offline", "matplotlib.pyplot",
    "hypothesis",
)  # fmt: skip
# Where real work would begin; a case that gets there was accepted.
STOPS = (
    "autoprune.api.run_search", "autoprune.actions.load_workload", "autoprune.search.sensitivity.load_workload",
    "autoprune.search.tickets.load_workload", "autoprune.cli.truth.measure_tables", "autoprune.cli.doctor.measure_tables",
    "autoprune.cli.doctor._probe_targets", "autoprune.exporting.load_data",
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_PATHS = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod",
    "shutil.rmtree", "shutil.move", "sqlite3.connect",
}  # fmt: skip
_STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile", "pty.spawn"}
WALL_S = 60
ACCEPTED = 77
# Copies are made anew now and then, so that what one case leaves behind reaches few others.
MOST_CASES = 50
MOST_ADDRESSES = 6 * 2**30


class Reached(BaseException):
    """Raised where real work would begin: what was given was accepted."""


def serve() -> None:
    """Answer cases until the input ends."""
    for name in WARM:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    sys.stdout.write(json.dumps({"ready": True}) + "\n")
    sys.stdout.flush()
    copy: Copy | None = None
    for line in sys.stdin:
        if copy is not None and (copy.cases >= MOST_CASES or json.loads(line).get("fresh")):
            copy.end()
            copy = None
        copy = copy or Copy()
        outcome = copy.run(line)
        if outcome["code"] < 0:
            copy = None
        sys.stdout.write(json.dumps(outcome) + "\n")
        sys.stdout.flush()
    if copy is not None:
        copy.end()


class Copy:
    """A copy of this process, which runs cases until it ends or is ended."""

    def __init__(self) -> None:
        self.cases = 0
        self.resident = resident()
        given, self._give = os.pipe()
        self._take, taken = os.pipe()
        self._out, self._err, self._log = (os.memfd_create(name) for name in ("out", "err", "log"))
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._give)
                os.close(self._take)
                work(given, taken, self._out, self._err, self._log)
            finally:
                os._exit(99)
        os.close(given)
        os.close(taken)

    def run(self, line: str) -> dict[str, Any]:
        """Run a case."""
        self.cases += 1
        begun = time.monotonic()
        told: dict[str, Any] = {"code": -99, "cpu_s": 0.0, "peak": self.resident}
        with suppress(BrokenPipeError):
            send(self._give, line.encode())
        answer = receive(self._take, begun + WALL_S)
        if answer:
            told = json.loads(answer)
        else:  # it hangs or has ended
            told["code"], told["cpu_s"] = self._gone()
        texts = [read(descriptor) for descriptor in (self._out, self._err, self._log)]
        if not answer:
            self._close()
        return {
            "code": told["code"],
            "out": texts[0],
            "err": texts[1],
            "events": [json.loads(event) for event in texts[2].splitlines()],
            "cpu_s": told["cpu_s"],
            "wall_s": time.monotonic() - begun,
            "memory": max(0, told["peak"] - self.resident),
        }

    def end(self) -> None:
        """End it."""
        self._gone()
        self._close()

    def _gone(self) -> tuple[int, float]:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        _, status, usage = os.wait4(self._pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return (code if code < 0 else -100 - code), usage.ru_utime + usage.ru_stime

    def _close(self) -> None:
        for descriptor in (self._give, self._take, self._out, self._err, self._log):
            os.close(descriptor)


def resident() -> int:
    """Return the bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def send(descriptor: int, content: bytes) -> None:
    """Write a line to a pipe, whole."""
    content = content.rstrip(b"\n") + b"\n"
    while content:
        content = content[os.write(descriptor, content) :]


def receive(descriptor: int, deadline: float = float("inf")) -> bytes:
    """Return the next line of a pipe; empty where it ends or nothing came until the deadline."""
    content = b""
    while not content.endswith(b"\n"):
        left = deadline - time.monotonic()
        ready, _, _ = select.select([descriptor], [], [], None if left == float("inf") else max(0.0, left))
        piece = os.read(descriptor, 1 << 16) if ready else b""
        if not piece:
            return b""
        content += piece
    return content


def read(descriptor: int) -> str:
    """Return what was written to a file in memory, and empty it."""
    raw = os.pread(descriptor, 2_000_000, 0)
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return raw.decode("utf-8", "backslashreplace")


def work(given: int, taken: int, out: int, err: int, log: int) -> None:
    """Be the copy: run one case after the other."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdin, sys.stdout, sys.stderr = open(os.devnull), open(1, "w"), open(2, "w")  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (addresses + MOST_ADDRESSES, addresses + MOST_ADDRESSES))
    folder: list[str] = [""]
    watch(log, folder)
    while line := receive(given):
        case = json.loads(line)
        os.environ.update(case["environment"])
        os.chdir(case["folder"])
        folder[0] = case["folder"]
        begun = time.process_time()
        code = one(case)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        spent = time.process_time() - begun
        gc.collect()  # closes what the case left open
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        send(taken, json.dumps({"code": code, "cpu_s": spent, "peak": peak}).encode())


def one(case: dict[str, Any]) -> int:
    """Run one case and return its exit code; 77 stands for accepted."""
    put = {stop: replaced(stop, stopper(stop)) for stop in case["stops"]}
    try:
        return target(case)()
    except Reached as reached:
        print(f"reached: {reached}", file=sys.stderr)
        return ACCEPTED
    except BaseException as error:
        print(f"Traceback: {error!r}", file=sys.stderr)
        return 98
    finally:
        for stop, own in put.items():
            replaced(stop, own)


def replaced(path: str, value: Any) -> Any:
    """Put a value in the place of a name of a module, and return what was there."""
    module, _, name = path.rpartition(".")
    found = importlib.import_module(module)
    before = getattr(found, name)
    setattr(found, name, value)
    return before


def target(case: dict[str, Any]) -> Callable[[], int]:
    """Return what a case runs: the command line, or a function of the tests that takes the rest of the case."""
    if "call" in case:
        module, _, name = case["call"].rpartition(".")
        function = getattr(importlib.import_module(module), name)
        return lambda: int(function(*case.get("arguments", ())) or 0)
    from autoprune.cli.main import main

    return lambda: main(case["words"])


def stopper(name: str) -> Callable[..., Any]:
    """Return a function that ends a case."""

    def stop(*_: Any, **__: Any) -> Any:
        raise Reached(name)

    return stop


def watch(log: int, folder: list[str]) -> None:
    """Report what is done from here on to files, programs and connections; none of the last two is started."""

    def tell(*event: str) -> None:
        os.write(log, (json.dumps(event) + "\n").encode())

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes) and isinstance(flags, int) and flags & _WRITES:
                tell("write", os.path.abspath(os.fsdecode(path)))
        elif event == "os.mkdir" and os.path.isdir(args[0]):
            return
        elif event in _PATHS:
            for path in args[: 2 if event in ("os.rename", "os.link", "shutil.move") else 1]:
                if isinstance(path, str | bytes):
                    tell("write", os.path.abspath(os.fsdecode(path)))
        elif event in _STARTS:
            tell("start", event, repr(args)[:300])
            raise Reached(event)
        elif event == "socket.connect":
            tell("connect", repr(args[1:])[:300])
            raise ConnectionRefusedError("connections are refused in this test")
        elif event == "pickle.find_class":
            tell("pickle", f"{args[0]}.{args[1]}")
        elif event == "exec" and str(getattr(args[0], "co_filename", "")).startswith(folder[0]):
            tell("exec", args[0].co_filename)

    sys.addaudithook(hook)


if __name__ == "__main__":
    serve()
