"""What a trial gives. Torch-free, so that it passes between processes cheaply."""

from __future__ import annotations

from dataclasses import dataclass

from autoprune.measure.record import Measurement


@dataclass(frozen=True)
class Outcome:
    """What a trial gives.

    Attributes:
        measurement: All that was measured of its artifact.
        train_steps: Gradient steps that the network took, those of the network that it was cut from included.
        own_steps: Those of this trial.
    """

    measurement: Measurement
    train_steps: int
    own_steps: int
