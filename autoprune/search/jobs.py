"""Jobs: what a driver is given to run, and the words for what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autoprune.measure.record import Measurement
from autoprune.search.baselines import Baseline
from autoprune.search.outcome import Outcome
from autoprune.space.recipe import Recipe, Recovery

# Steps from which on the learning rate of a space is right; over fewer steps a network settles at a smaller one.
_LONG_TRAINING = 800

Strategy = Callable[[Sequence[Baseline]], None]
# Takes a recipe, the folder for its artifact, the folder of the network that it starts from, and the trial's number.
TrialFunction = Callable[[Recipe, Path, Path | None, int], Outcome]


@dataclass(frozen=True)
class Job:
    """A trial to run; the fields are those of :class:`~autoprune.study.records.TrialRecord`.

    Attributes:
        recipe: The candidate; None lets the study's sampler choose.
        origin: Who proposed it.
        label: For people.
        rung: Training rung.
        started_from: Trial whose recovered network is cut further or trained on; None for the dense network.
        screened: Capability that it lost at the screen.
        weights: What the sampler over the solver's weights chose for it.
    """

    recipe: Recipe | None
    origin: str
    label: str = ""
    rung: int = 1
    started_from: int | None = None
    screened: float | None = None
    weights: Mapping[str, float] = field(default_factory=dict)


def describe(number: int, measurement: Measurement) -> str:
    """Return one line on a measured trial."""
    score = measurement.report or measurement.search
    return (
        f"#{number} {score.name} {score.value:.4f}  latency x{measurement.latency.ratio:.3f}"
        f"  size x{measurement.size_ratio:.3f}"
    )


def with_steps(recovery: Recovery, steps: int) -> Recovery:
    """Return ``recovery`` with another number of fine-tuning steps."""
    return Recovery.model_validate({**recovery.model_dump(), "finetune_steps": steps})


def brief(recovery: Recovery, steps: int) -> Recovery:
    """Return ``recovery`` over a few steps, which have to be smaller for the network to settle."""
    rate = recovery.learning_rate * min(1.0, (steps / _LONG_TRAINING) ** 0.5)
    return with_steps(recovery, steps).model_copy(update={"learning_rate": rate})
