"""Progress of a search as plain values, for whoever renders it. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class WorkerState:
    """What one worker does at one moment.

    Attributes:
        name: Such as ``worker 2``.
        node: Host that it runs on.
        doing: What it does, such as ``trial 17``; ``idle``, ``starting``, or why it is gone.
        since_s: Seconds that it has done so.
        busy_share: Share of its time so far in which it had work, in ``[0, 1]``.
        lost: Trials that it took down with it.
        is_busy: Whether it has work.
    """

    name: str
    node: str
    doing: str
    since_s: float
    busy_share: float
    lost: int = 0
    is_busy: bool = False


@dataclass(frozen=True)
class Progress:
    """The state of a search at one moment.

    Attributes:
        phase: ``load``, ``dense``, ``groups``, ``space``, ``baselines``, ``search``, ``final``, ``measure`` or
            ``done``.
        message: One line on what just happened or begins.
        trials: Finished trials so far, failed ones included.
        front: Points on the front so far.
        hypervolume: Of the front so far, against the reference of the study; 0 before the first trial.
        failures: Failed trials by kind.
        left_s: Seconds of budget left; None where the budget counts trials.
        workers: What each worker does; empty where trials run in the driver's own process.
        last: Last result for people, such as ``#7 accuracy 0.861 latency x0.52 size x0.16``; empty at first.
    """

    phase: str
    message: str
    trials: int = 0
    front: int = 0
    hypervolume: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)
    left_s: float | None = None
    last: str = ""
    workers: tuple[WorkerState, ...] = ()

    @property
    def efficiency(self) -> float | None:
        """Share of all workers' time in which they had work; None without workers."""
        if not self.workers:
            return None
        return sum(worker.busy_share for worker in self.workers) / len(self.workers)


Listener = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Listen to nothing."""
