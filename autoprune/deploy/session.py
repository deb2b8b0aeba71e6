"""Sessions: model files ready to run, the same for scoring, timing and reading back what runs. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autoprune.target import Target

Floats = NDArray[np.float32]
# Runs one inference and returns its seconds.
Timer = Callable[[], float]


class Session(Protocol):
    """A model file that one runtime opened.

    Attributes:
        fixed_batch: Examples that one inference has to have; None where their number is free.
    """

    fixed_batch: int | None

    def run(self, inputs: Floats) -> Floats:
        """Return the outputs of one inference, ``(n, …)``."""
        ...

    def timer(self, inputs: Floats) -> Timer:
        """Return what runs these inputs once and tells the seconds, what the caller converts left out."""
        ...


@dataclass(frozen=True)
class NodeTime:
    """What one executed node took.

    Attributes:
        name: Its name in the executed graph.
        operator: What it does.
        durations_s: Seconds of each inference, cold ones left out.
    """

    name: str
    operator: str
    durations_s: tuple[float, ...]


def load_runtime(target: Target) -> None:
    """Load the library of a target's runtime, which every session of it shares."""
    import_module(f"autoprune.deploy.sessions.{target.runtime}")


def open_session(target: Target, model: Path | bytes, threads: int | None = None) -> Session:
    """Open a model file, or its content, in the target's runtime.

    Args:
        target: How it is run.
        model: The file.
        threads: Threads of one inference; the target's if not given.
    """
    module = import_module(f"autoprune.deploy.sessions.{target.runtime}")
    opened: Session = module.open_session(target, model, threads or target.threads)
    return opened


def node_times(
    target: Target, model: Path, inputs: Floats, runs: int, limit_s: float
) -> list[NodeTime] | None:
    """Return what each node takes, in the order of execution; None where the runtime does not tell.

    Args:
        target: How the model is run.
        model: The file.
        inputs: Inputs of one inference.
        runs: Most inferences.
        limit_s: Seconds after which no further one begins.
    """
    module = import_module(f"autoprune.deploy.sessions.{target.runtime}")
    measure: Any = getattr(module, "node_times", None)
    return None if measure is None else measure(target, model, inputs, runs, limit_s)


def opening(target: Target) -> dict[str, str]:
    """Return the settings with which a session has to be opened anywhere to give the figures that were measured."""
    module: Any = import_module(f"autoprune.deploy.sessions.{target.runtime}")
    return {name: str(value) for name, value in module.opening(target).items()}


def run_all(session: Session, inputs: Floats) -> Floats:
    """Run any number of examples; see :func:`in_pieces`."""
    return in_pieces(session.run, inputs, session.fixed_batch)


def in_pieces(run: Callable[[Floats], Floats], inputs: Floats, fixed: int | None) -> Floats:
    """Run any number of examples; a graph with a fixed batch gets them in pieces, the last one filled up."""
    if fixed is None:
        return run(inputs)
    pieces = []
    for start in range(0, len(inputs), fixed):
        piece = inputs[start : start + fixed]
        filled = np.concatenate([piece, np.repeat(piece[-1:], fixed - len(piece), axis=0)])
        pieces.append(run(filled)[: len(piece)])
    return np.concatenate(pieces)


def wall_timer(run: Callable[[], object]) -> Timer:
    """Return what calls ``run`` and tells the seconds on the wall."""

    def once() -> float:
        begun = time.perf_counter_ns()
        run()
        return (time.perf_counter_ns() - begun) / 1e9

    return once
