"""Progress of a search as plain values, for whoever renders it. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


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


Listener = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Listen to nothing."""
