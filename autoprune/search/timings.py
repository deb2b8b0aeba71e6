"""How long the stages of trials take, from which the final phase plans."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import median


@dataclass
class Timings:
    """Seconds that the stages of trials took so far, from which the final phase plans.

    A few trials take far longer than the others, when the machine is busy; medians are not misled by them.

    Attributes:
        deploy: Export and quantization of one artifact.
        example: Scoring one example by an artifact.
        step: One step of fine-tuning.
        latency: Timing one artifact, its processes included.
    """

    deploy: list[float] = field(default_factory=list)
    example: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)

    def seconds(self) -> dict[str, list[float]]:
        """Return all that was timed, by stage."""
        return {f.name: list(getattr(self, f.name)) for f in fields(self)}

    def add(self, seconds: Mapping[str, Sequence[float]]) -> None:
        """Take up what a worker timed."""
        for name, values in seconds.items():
            getattr(self, name).extend(values)

    def text(self) -> str:
        """Return the medians, for a later run that goes straight to the final phase."""
        return json.dumps(
            {f.name: [median(seen)] if (seen := getattr(self, f.name)) else [] for f in fields(self)}
        )

    def take(self, text: str) -> None:
        """Take an earlier run's medians where nothing was timed yet."""
        for name, values in json.loads(text).items():
            seen = getattr(self, name)
            seen += [] if seen else values

    def step_s(self) -> float:
        """Return the expected seconds of one step; 0 before the first training."""
        return median(self.step) if self.step else 0.0

    def artifacts_s(self, count: int, examples: int, figures_s: float = 0.0) -> float:
        """Return the expected seconds to export, score and measure the artifacts of the final front.

        Args:
            count: Artifacts, the dense network, which is the slowest, among them.
            examples: Examples that each is scored on.
            figures_s: Seconds that each may take for what is measured besides latency and memory.
        """
        timing = self.timing_s() + figures_s
        deploy = median(self.deploy) if self.deploy else 1.0
        usual, slowest = (median(self.example), max(self.example)) if self.example else (0.0, 0.0)
        return count * (timing + deploy + examples * usual) + examples * (slowest - usual)

    def timing_s(self) -> float:
        """Return the expected seconds to time one artifact of the final front and to measure its memory."""
        # The final protocol runs about three times as long as a trial's.
        return 3.0 * median(self.latency) if self.latency else 5.0
