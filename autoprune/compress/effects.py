"""Effects of cutting one group alone: what the metric loses, and how far the outputs move."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.compress.distillation import distillation_loss
from autoprune.compress.sensitivity import SensitivityMeter


@dataclass(frozen=True)
class Effect:
    """What one network is worth beside the uncut one.

    Attributes:
        capability: The metric on the meter's unseen examples.
        divergence: Mean Kullback-Leibler divergence of its outputs from the uncut network's, in nats; growth of the
            task's loss where outputs are no logits of classes.
    """

    capability: float
    divergence: float


class EffectMeter:
    """Measures the metric along with the divergence, in full precision.

    The reference is the uncut network after the same recovery: BatchNorm statistics of a few hundred images change
    the metric by themselves, which is no cut's doing.

    Args:
        meter: Cuts and recovers.
        score: The metric of outputs ``(n, …)`` and targets ``(n, …)``; higher is better.
    """

    def __init__(self, meter: SensitivityMeter, score: Callable[[Tensor, Tensor], float]) -> None:
        self._meter, self._score = meter, score
        dense, targets = self._run(deepcopy(meter.dense).to(meter.device))
        self.dense = float(score(dense, targets))
        self._reference, _ = self._run(meter.uncut())
        self.uncut = float(score(self._reference, targets))

    def of_cut(self, group: str, kept: int, criterion: str) -> Effect:
        """Return the effect of ``group`` keeping ``kept`` units, ranked by ``criterion``; 0 takes out its block."""
        outputs, targets = self._run(self._meter.cut(group, kept, criterion))
        if self._meter.compares_outputs:
            divergence = float(distillation_loss(outputs, self._reference, temperature=1.0))
        else:
            loss = self._meter.loss
            divergence = float(loss(outputs, targets)) - float(loss(self._reference, targets))
        return Effect(float(self._score(outputs, targets)), divergence)

    def _run(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        found = [(outputs.cpu(), targets.cpu()) for outputs, targets in self._meter.outputs(model)]
        outputs, targets = zip(*found, strict=True)
        return torch.cat(outputs), torch.cat(targets)
