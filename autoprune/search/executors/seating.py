"""Workers as they are known from what they do and say: who works on what, who fell silent, how busy each has been."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from autoprune.errors import TrialError, WorkerError
from autoprune.search.events import WorkerState
from autoprune.search.executors.contract import WORKER_LOST, Reply

_MAX_STARTS = 5
_log = logging.getLogger(__name__)


class Occupation:
    """What a worker does, and the share of its time in which it had work.

    Args:
        doing: What it does at first.

    Attributes:
        lost: Requests that were lost with it.
    """

    def __init__(self, doing: str) -> None:
        self.lost = 0
        self._doing, self._is_busy = doing, False
        self._first_s = self._since_s = time.monotonic()
        self._busy_s = 0.0

    def set(self, doing: str, *, busy: bool = False) -> None:
        """Note that it does something else from now on; ``busy`` if that is a request."""
        now_s = time.monotonic()
        if self._is_busy:
            self._busy_s += now_s - self._since_s
        self._doing, self._is_busy, self._since_s = doing, busy, now_s

    def state(self, name: str, node: str) -> WorkerState:
        """Return what is shown of it now."""
        now_s = time.monotonic()
        busy_s = self._busy_s + (now_s - self._since_s if self._is_busy else 0.0)
        return WorkerState(
            name=name,
            node=node,
            doing=self._doing,
            since_s=now_s - self._since_s,
            busy_share=min(1.0, busy_s / max(now_s - self._first_s, 1e-9)),
            lost=self.lost,
            is_busy=self._is_busy,
        )


@dataclass
class Waiting:
    """A request that somebody waits for.

    Attributes:
        name: What it does, for people.
        answers: Gets its reply, or why there is none.
        taken_s: When a worker took it; None before.
    """

    name: str
    answers: queue.SimpleQueue[Reply | TrialError] = field(default_factory=queue.SimpleQueue)
    taken_s: float | None = None


@dataclass
class _Place:
    """What is known of one seat.

    Attributes:
        occupation: What its worker does.
        node: Host and process of its worker; empty where none is known.
        heard_s: When it gave a sign of life last.
        token: Request that it works on.
        is_ready: Whether its worker can take requests.
        starts: Starts in a row of workers that did not become ready.
    """

    occupation: Occupation = field(default_factory=lambda: Occupation("waiting for a node"))
    node: str = ""
    heard_s: float = field(default_factory=time.monotonic)
    token: int | None = None
    is_ready: bool = False
    starts: int = 0

    def free(self, doing: str) -> None:
        """Note that its worker has no request any more."""
        self.token = None
        self.occupation.set(doing)


class Seating:
    """The seats of workers that take requests by themselves and are heard of by messages alone.

    Args:
        size: Seats.
        lease_s: Seconds without a sign of life after which a worker is given up.
        dismiss: Lets the worker of a seat, on that node, end as soon as it is heard of.
        fail: Ends the search.

    Attributes:
        refused: Replies that came after their worker, or their request, was given up.
        last_ready_s: When a worker became ready last.
    """

    def __init__(
        self,
        size: int,
        lease_s: float,
        dismiss: Callable[[int, str], object],
        fail: Callable[[WorkerError], None],
    ) -> None:
        self.refused = 0
        self.last_ready_s = time.monotonic()
        self._lease_s, self._dismiss, self._fail = lease_s, dismiss, fail
        self._lock = threading.Lock()
        self._waiting: dict[int, Waiting] = {}
        self._places = [_Place() for _ in range(size)]

    # -- who waits ---------------------------------------------------------------------------

    def wait_for(self, token: int, name: str) -> Waiting:
        """Note that somebody waits for a request from now on."""
        with self._lock:
            waiting = self._waiting[token] = Waiting(name)
        return waiting

    def forget(self, token: int) -> None:
        """Note that nobody waits for a request any more; a late reply is refused."""
        with self._lock:
            self._waiting.pop(token, None)

    def give_up(self, token: int) -> None:
        """Let the worker that hangs in a request be ended, and another take its seat."""
        with self._lock:
            for seat, place in enumerate(self._places):
                if place.token == token:
                    place.free("hung")
                    place.occupation.lost += 1
                    self._empty(seat, place)

    def is_anybody_ready(self) -> bool:
        """Return whether any worker can take requests."""
        with self._lock:
            return any(place.is_ready for place in self._places)

    def states(self) -> tuple[WorkerState, ...]:
        """Return what each worker does now."""
        with self._lock:
            return tuple(
                place.occupation.state(f"seat {number}", place.node.partition(":")[0])
                for number, place in enumerate(self._places)
            )

    # -- what workers say --------------------------------------------------------------------

    def hear(self, events: Iterable[tuple[str, int, str, Any]]) -> None:
        """Take up what workers said, and look for those that say nothing.

        Args:
            events: What happened (``join``, ``ready``, ``failed``, ``beat``, ``take`` or ``reply``), the seat, the
                worker's node, and what belongs to it.
        """
        with self._lock:
            for kind, seat, node, content in events:
                self._hear(self._places[seat], kind, node, content)
            for seat, place in enumerate(self._places):
                if place.node and place.is_ready and time.monotonic() - place.heard_s > self._lease_s:
                    self._lose(place, f"worker on {place.node} gave no sign of life for {self._lease_s:g} s")
                    self._empty(seat, place)

    def _hear(self, place: _Place, kind: str, node: str, content: Any) -> None:
        if kind == "join":
            self._join(place, node)
        elif node != place.node:
            if kind == "reply":
                self._refuse(node)
            elif kind == "take":
                self._untake(node, content)
            return
        place.heard_s = time.monotonic()
        if kind == "ready":
            place.is_ready, place.starts, self.last_ready_s = True, 0, place.heard_s
            place.occupation.set("idle")
        elif kind == "failed":
            self._cannot_start(place, content)
        elif kind == "take":
            self._take(place, content)
        elif kind == "reply":
            place.free("idle")
            waiting = self._waiting.get(content.token)
            if waiting is None:
                self._refuse(node)
            else:
                waiting.answers.put(content)

    def _join(self, place: _Place, node: str) -> None:
        self._lose(place, f"worker on {place.node} ended")
        place.node, place.is_ready = node, False
        place.starts += 1
        place.occupation.set("starting")
        if place.starts > _MAX_STARTS:
            how = f"died {_MAX_STARTS} times in a row while they started, last on {node}"
            hint = "trials may want more memory than a worker has: fewer --workers, or more --cpus-per-trial"
            self._fail(WorkerError(f"workers of a seat {how}", f"{hint}; the finished trials are kept"))

    def _cannot_start(self, place: _Place, why: tuple[str, str]) -> None:
        place.occupation.set("cannot start")
        if any(each.is_ready for each in self._places):
            _log.warning("a worker on %s cannot start and is left out: %s", place.node, why[0])
        else:
            self._fail(WorkerError(f"a worker on {place.node} cannot start: {why[0]}", why[1]))

    def _take(self, place: _Place, token: int) -> None:
        place.token = token
        waiting = self._waiting.get(token)
        place.occupation.set(waiting.name if waiting is not None else "what nobody waits for", busy=True)
        if waiting is not None:
            waiting.taken_s = place.heard_s

    def _untake(self, node: str, token: int) -> None:
        """Give up what a worker took in the moment in which it was given up itself: nobody else gets it."""
        waiting = self._waiting.pop(token, None)
        if waiting is not None:
            waiting.answers.put(TrialError(WORKER_LOST, f"worker on {node} was given up as it took this"))

    def _refuse(self, node: str) -> None:
        self.refused += 1
        _log.warning("a late result from %s is refused: its request was given up", node)

    def _lose(self, place: _Place, reason: str) -> None:
        """Note that a worker is lost, and give up what it works on, if anything."""
        token = place.token
        place.free("lost")
        if token is None:
            return
        place.occupation.lost += 1
        waiting = self._waiting.pop(token, None)
        if waiting is not None:
            waiting.answers.put(TrialError(WORKER_LOST, reason))

    def _empty(self, seat: int, place: _Place) -> None:
        self._dismiss(seat, place.node)
        place.node, place.is_ready = "", False
