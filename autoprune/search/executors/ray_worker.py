"""The parts of a Ray cluster: the desk where requests lie, the seats whose workers take them, and who measures.

Ray Tune runs the workers, not the trials: each of its trials is a *seat* that stays for the whole study and takes one
request of ours after the other, which costs milliseconds instead of the half second of a Tune trial. Tune places
seats by their resources, keeps those waiting that a node has no room for yet, and starts a lost one elsewhere.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune

# Seconds between two signs of life of a worker, and those that it waits for a request before it asks again.
BEAT_S = 2.0
_TAKE_S = 5.0
# Seconds of work after which a seat tells Tune that it is there.
_STEP_S = 30.0
# How long a node's first try to start its bench may be away from the desk.
_CALL_S = 60.0
# Model files that a measuring node keeps besides those that it measures now; the dense one is sent again at worst.
_KEPT_FILES = 16


class Desk:
    """Where the driver lays requests and workers leave replies; an actor beside the driver.

    It decides nothing and may be lost with the driver: the study's record is elsewhere.

    Args:
        given: What workers are made of, as a reference in a list, so that it is fetched by them alone.
    """

    def __init__(self, given: list[Any]) -> None:
        self._given = given
        self._requests: deque[Any] = deque()
        self._events: deque[tuple[str, int, str, Any]] = deque()
        self._reference: Any = None
        self._measurers: list[Any] = []
        self._int8_bits: dict[str, int] = {}
        self._nodes: dict[int, str] = {}
        self._stopping = False
        self._ended = False
        self._more = asyncio.Event()
        self._told = asyncio.Event()

    # -- the driver's side -------------------------------------------------------------------

    async def lay(self, request: Any) -> None:
        """Lay a request for the next free worker."""
        self._requests.append(request)
        self._more.set()

    async def withdraw(self, token: int) -> None:
        """Take back a request that no worker took."""
        self._requests = deque(r for r in self._requests if r.token != token)

    async def dismiss(self, seat: int, node: str) -> None:
        """Let a worker that was given up do nothing more; it ends as soon as it asks."""
        if self._nodes.get(seat) == node:
            del self._nodes[seat]

    async def refer(self, reference: Any) -> None:
        """Set what candidates are measured against."""
        self._reference = reference

    async def let_measure(self, measurers: list[Any], int8_bits: dict[str, int]) -> None:
        """Set who measures, and the bits that int8 kernels add up rightly there."""
        self._measurers, self._int8_bits = measurers, int8_bits

    async def collect(self, timeout_s: float) -> list[tuple[str, int, str, Any]]:
        """Return what workers said since the last call; waits until there is something."""
        if not self._events:
            self._told.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), timeout_s)
        found = list(self._events)
        self._events.clear()
        return found

    async def ask_to_end(self, *, at_once: bool) -> None:
        """Let trainings end in order; with ``at_once`` let workers go."""
        self._stopping = True
        self._ended = self._ended or at_once
        self._more.set()

    # -- the workers' side -------------------------------------------------------------------

    async def join(self, seat: int, node: str) -> tuple[list[Any], list[Any], dict[str, int]]:
        """Let a worker in; return what it is made of, who measures, and the bits of int8 kernels there."""
        self._nodes[seat] = node
        self._say("join", seat, node, None)
        return self._given, self._measurers, self._int8_bits

    async def take(self, seat: int, node: str) -> tuple[str, Any, Any]:
        """Return ``("do", request, reference)``, or ``("wait", …)`` or ``("end", …)``."""
        deadline = time.monotonic() + _TAKE_S
        while self._is_idle(seat, node) and time.monotonic() < deadline:
            self._more.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._more.wait(), max(0.0, deadline - time.monotonic()))
        if self._nodes.get(seat) != node:
            return "leave", None, None
        if self._ended:
            return "end", None, None
        if not self._requests:
            return "wait", None, None
        request = self._requests.popleft()
        self._say("take", seat, node, request.token)
        return "do", request, self._reference

    def _is_idle(self, seat: int, node: str) -> bool:
        return not self._requests and not self._ended and self._nodes.get(seat) == node

    async def tell(self, kind: str, seat: int, node: str, content: Any) -> str:
        """Take a message; return ``go on``, ``stop`` (training is to end) or ``leave`` (the worker was given up)."""
        self._say(kind, seat, node, content)
        if self._nodes.get(seat) != node:
            return "leave"
        return "stop" if self._stopping else "go on"

    def _say(self, kind: str, seat: int, node: str, content: Any) -> None:
        self._events.append((kind, seat, node, content))
        self._told.set()


class Seat(tune.Trainable):  # type: ignore[misc]  # ray has no types
    """A worker for the whole study; a step is half a minute of requests."""

    def setup(self, config: dict[str, Any]) -> None:
        """Find the desk; everything that may fail or take long is left to the first step."""
        self._seat = int(config["seat"])
        self._serve: Callable[[Any], Callable[[Any, Any], Any]] = config["serve"]
        self._desk = ray.get_actor(config["desk"], namespace=config["namespace"])
        self._node = f"{socket.gethostname()}:{os.getpid()}"
        self._stop = False
        self._answer: Callable[[Any, Any], Any] | None = None

    def step(self) -> dict[str, Any]:
        """Do requests for a while."""
        if self._answer is None and not self._start():
            return {"done": True}
        begun_s = time.monotonic()
        done = 0
        while time.monotonic() - begun_s < _STEP_S:
            what, request, reference = ray.get(self._desk.take.remote(self._seat, self._node))
            if what == "leave":  # another worker takes the seat
                os._exit(1)
            if what == "end":
                return {"done": True, "requests": done}
            if what == "do" and self._answer is not None:
                if reference is not None:
                    self._answer(reference, lambda: self._stop)
                reply = self._answer(request, lambda: self._stop)
                ray.get(self._desk.tell.remote("reply", self._seat, self._node, reply))
                done += 1
        return {"done": False, "requests": done}

    def _start(self) -> bool:
        given, measurers, int8_bits = ray.get(self._desk.join.remote(self._seat, self._node))
        threading.Thread(target=self._beat, daemon=True).start()
        if measurers:
            measure_there(measurers, int8_bits)
        try:
            self._answer = self._serve(ray.get(given[0]))
        except Exception as error:  # whatever a user's own model or data raises has to reach the user
            ray.get(self._desk.tell.remote("failed", self._seat, self._node, _told(error)))
            return False
        ray.get(self._desk.tell.remote("ready", self._seat, self._node, None))
        return True

    def _beat(self) -> None:
        while True:
            with suppress(ray.exceptions.RayError):
                word = ray.get(self._desk.tell.remote("beat", self._seat, self._node, None), timeout=_CALL_S)
                if word == "leave":  # whatever it does: it was given up, and another worker takes the seat
                    os._exit(1)
                self._stop = word == "stop"
            time.sleep(BEAT_S)


def _told(error: Exception) -> tuple[str, str]:
    from autoprune.errors import AutopruneError

    if isinstance(error, AutopruneError):
        return error.message, error.hint
    return f"{type(error).__name__}: {error}", ""


class Measurer:
    """Measures on its node, one session at a time; an actor that holds the target's device there."""

    def __init__(self) -> None:
        self._files: dict[str, Path] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="autoprune-measure-"))
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)

    def host(self) -> dict[str, Any]:
        """Return what this machine is, by which machines that measure alike are told."""
        from autoprune.measure.host import describe_host

        return describe_host()

    def int8_bits(self) -> dict[str, int]:
        """Return the bits that int8 kernels add up rightly here, by runtime."""
        from autoprune.deploy.saturation import bits_here

        return bits_here()

    def lacks(self, digests: list[str]) -> list[str]:
        """Return those of the files that were not sent yet."""
        return [digest for digest in digests if digest not in self._files]

    def measure(
        self, job: dict[str, Any], names: dict[str, tuple[str, str]], sent: dict[str, bytes], timeout_s: float
    ) -> dict[str, Any]:
        """Run a job of the measuring process.

        Args:
            job: The job, with the sender's paths.
            names: Digest and file name by path.
            sent: Content by digest of what :meth:`lacks` named.
            timeout_s: Seconds after which it has failed.
        """
        from autoprune.measure.process import run_here

        for digest, content in sent.items():
            folder = self._folder / digest
            folder.mkdir(exist_ok=True)
            name = next(name for own, name in names.values() if own == digest)
            (folder / name).write_bytes(content)
            self._files[digest] = folder / name
            while len(self._files) > _KEPT_FILES + len(names):
                oldest = next(each for each in self._files if each not in {own for own, _ in names.values()})
                shutil.rmtree(self._files.pop(oldest).parent, ignore_errors=True)
        places = {path: str(self._files[digest]) for path, (digest, _) in names.items()}
        return run_here(moved(job, places), timeout_s)


def moved(value: Any, places: dict[str, str]) -> Any:
    """Return a job with other paths, as keys too."""
    if isinstance(value, dict):
        return {places.get(key, key): moved(each, places) for key, each in value.items()}
    if isinstance(value, list):
        return [moved(each, places) for each in value]
    return places.get(value, value) if isinstance(value, str) else value


def paths_in(value: Any) -> set[str]:
    """Return the files that a job names: model files alone are named by whole paths."""
    if isinstance(value, dict):
        return set().union(*(paths_in(each) for each in value.values()))
    if isinstance(value, list):
        return set().union(*(paths_in(each) for each in value))
    return {value} if isinstance(value, str) and value.startswith("/") and Path(value).is_file() else set()


def measure_there(measurers: list[Any], int8_bits: dict[str, int]) -> None:
    """Let this process's measurements be done by the actors that hold the target's device, and its files fit there.

    Args:
        measurers: Handles of :class:`Measurer`, all on machines that measure alike.
        int8_bits: What :meth:`Measurer.int8_bits` gives there.
    """
    from autoprune.deploy.saturation import also_run_elsewhere
    from autoprune.measure.process import measure_elsewhere

    also_run_elsewhere(int8_bits)
    turn = iter(range(os.getpid(), 2**62))

    def run(job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        from autoprune.errors import TrialError
        from autoprune.study.retries import WORKER_LOST

        measurer = measurers[next(turn) % len(measurers)]
        paths = sorted(paths_in(job))
        contents = {path: Path(path).read_bytes() for path in paths}
        names = {path: (hashlib.sha256(contents[path]).hexdigest(), Path(path).name) for path in paths}
        by_digest = {names[path][0]: contents[path] for path in paths}
        try:
            lacking = ray.get(measurer.lacks.remote(list(by_digest)), timeout=timeout_s)
            sent = {digest: by_digest[digest] for digest in lacking}
            result: dict[str, Any] = ray.get(
                measurer.measure.remote(job, names, sent, timeout_s), timeout=timeout_s
            )
        except TrialError:
            raise
        except ray.exceptions.GetTimeoutError as error:
            raise TrialError(
                "latency", f"the measuring node had no time for it in {timeout_s:g} s"
            ) from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, TrialError):
                raise error.cause from None
            kind = (
                WORKER_LOST if isinstance(error.cause, KeyError) else "latency"
            )  # it was started anew meanwhile
            raise TrialError(kind, f"the measuring node failed: {str(error.cause)[:200]}") from error
        except ray.exceptions.RayError as error:
            raise TrialError(WORKER_LOST, f"the measuring node is gone: {str(error)[:200]}") from error
        return result

    measure_elsewhere(run)
