"""Maths of the training: the distillation loss and the course of the learning rate."""

from __future__ import annotations

import math

from torch import Tensor, nn

# One-cycle: share of the steps that the rate rises in, where it begins and where it ends.
_RISE, _FIRST, _LAST = 0.3, 1 / 25, 1e-3


def rate_factor(schedule: str, progress: float) -> float:
    """Return the learning rate as a share of its peak.

    Args:
        schedule: ``cosine``: from 1 to 0; ``onecycle``: up from 1/25 over the first 30 %, then down to 1/1000,
            both along a cosine [Smith2018]_.
        progress: Share of the training that is over, clipped to ``[0, 1]``.

    References:
        [Smith2018] Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates.
    """
    share = min(max(progress, 0.0), 1.0)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * share))
    begin, end, part = (
        (_FIRST, 1.0, share / _RISE) if share < _RISE else (1.0, _LAST, (share - _RISE) / (1 - _RISE))
    )
    return end + (begin - end) * 0.5 * (1.0 + math.cos(math.pi * part))


def distillation_loss(outputs: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Return the divergence of softened outputs from the teacher's [Hinton2015]_.

    Args:
        outputs: Logits of the student, ``(n, classes, ...)``.
        taught: Logits of the teacher, same shape.
        temperature: Both are divided by it; the loss is multiplied by its square, so that gradients keep their size.

    Returns:
        Mean over examples (and places), a scalar.

    References:
        [Hinton2015] Distilling the Knowledge in a Neural Network.
    """
    student = nn.functional.log_softmax(outputs / temperature, dim=1)
    teacher = nn.functional.log_softmax(taught / temperature, dim=1)
    divergence = nn.functional.kl_div(student, teacher, reduction="none", log_target=True)
    return divergence.sum(1).mean() * temperature**2
