"""The contract of every executor, and the requests and replies that pass between a driver and its workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from autoprune.config import StudyConfig
from autoprune.errors import TrialError
from autoprune.measure.record import Measurement
from autoprune.search.events import WorkerState
from autoprune.search.outcome import Outcome
from autoprune.space.groups import Groups
from autoprune.space.recipe import Recipe, Recovery
from autoprune.study.retries import WORKER_LOST

__all__ = [
    "CRASHED",
    "HUNG",
    "INTERRUPTED",
    "WORKER_LOST",
    "Executor",
    "Reference",
    "Reply",
    "Request",
    "Setup",
]

INTERRUPTED = "interrupted"
HUNG = "hung"
CRASHED = "crashed"


@dataclass(frozen=True)
class Setup:
    """What a worker builds its bench from.

    Attributes:
        config: Settings of the study.
        groups: Its groups.
        gradients: Whether the dense network's statistics hold gradients.
        by_gradient: Whether a criterion of the space needs them.
    """

    config: StudyConfig
    groups: Groups
    gradients: bool
    by_gradient: bool


@dataclass(frozen=True)
class Reference:
    """The dense network's artifact, against which workers measure.

    Attributes:
        folder: Where it lies.
        measurement: What was measured of it.
    """

    folder: Path
    measurement: Measurement


@dataclass(frozen=True)
class Request:
    """One piece of work for a worker.

    Attributes:
        token: Number of the request, never given twice; a reply with another one is late and refused.
        kind: ``trial`` compresses, deploys and measures; ``screen`` scores after closed-form recovery alone;
            ``recover`` continues a network's training for long.
        name: For people, such as ``trial 17``.
        recipe: The candidate.
        folder: Empty folder that gets the artifact; None for a screen.
        start: Artifact folder of the network that is cut further or trained on; None for the dense one.
        examples: Examples of a screen; None for all.
        recovery: How a recovery trains.
        slot_s: Seconds of a recovery's training.
        start_step: Step of the training stream that a recovery begins at.
        own: Artifact folder of the trial that a recovery continues.
    """

    token: int
    kind: Literal["trial", "screen", "recover"]
    name: str
    recipe: Recipe
    folder: Path | None = None
    start: Path | None = None
    examples: int | None = None
    recovery: Recovery | None = None
    slot_s: float = 0.0
    start_step: int = 0
    own: Path | None = None


@dataclass(frozen=True)
class Reply:
    """What came of a request: exactly one of the outcome, the score, the steps and the failure is set.

    Attributes:
        token: Of the request.
        outcome: Of a trial.
        score: Capability of a screen.
        steps: Gradient steps of a recovery.
        failure: Kind and reason.
        fault: Why a file could not be written, which is no trial's failure.
        timings: Seconds of stages that the worker took for it, by stage.
    """

    token: int
    outcome: Outcome | None = None
    score: float | None = None
    steps: int | None = None
    failure: tuple[str, str] | None = None
    fault: str | None = None
    timings: dict[str, list[float]] = field(default_factory=dict)

    def check(self) -> Reply:
        """Return the reply if there is a result in it.

        Raises:
            TrialError: If the work failed.
            OSError: If its files could not be written.
        """
        if self.fault is not None:
            raise OSError(self.fault)
        if self.failure is not None:
            raise TrialError(*self.failure)
        return self


class Executor(Protocol):
    """Runs requests, as many side by side as it has workers. Its methods may be called from several threads."""

    @property
    def size(self) -> int:
        """Requests that run side by side."""
        ...

    def adopt_dense(self, reference: Reference) -> None:
        """Take the dense network's artifact as the reference of every later request."""
        ...

    def run(self, request: Request) -> Reply:
        """Wait for a worker, let it do the work, and return what came of it.

        Raises:
            TrialError: If the work failed; of kind ``worker-lost`` if its worker is gone, ``hung`` if it took too
                long, ``interrupted`` if :meth:`stop` was called.
            OSError: If its files could not be written.
            AutopruneError: If no worker can be started.
        """
        ...

    def next_token(self) -> int:
        """Return a number that no other request has."""
        ...

    def states(self) -> tuple[WorkerState, ...]:
        """Return what each worker does now."""
        ...

    def stop(self) -> None:
        """End all that runs at once."""
        ...

    def close(self) -> None:
        """Let all workers go; nothing of them is left running."""
        ...
