"""Training of lottery tickets: networks under masks, from any step of one course of the learning rate on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from autoprune.compress.distillation import rate_factor
from autoprune.compress.finetune import Loss, TeacherStream, Trainer
from autoprune.compress.recovery import refresh_batchnorm
from autoprune.compress.speed import memory_format
from autoprune.compress.ticket_masks import Masks, hold
from autoprune.space.recipe import Recovery

_SCHEDULE: Literal["onecycle"] = "onecycle"
# Where on its course the rate of fine-tuning is taken: near the end, but not at the end, where it is next to zero.
_LAST = 0.9
# A cosine over so many steps does not move.
_ENDLESS = 10**9


@dataclass(frozen=True)
class Course:
    """One training from random weights to the end, parts of which are taken again and again.

    Attributes:
        stream: Its batches by number.
        loss: The task's loss.
        device: Where to train.
        rate: Peak learning rate for SGD; AdamW, where the network calls for it, takes a part of it.
        steps: Steps from the random weights to the end.
    """

    stream: TeacherStream
    loss: Loss
    device: torch.device
    rate: float
    steps: int

    @property
    def last_rate(self) -> float:
        """The small rate near the end of the course."""
        return self.rate * rate_factor(_SCHEDULE, _LAST)


def train(
    model: nn.Module,
    course: Course,
    *,
    first: int = 0,
    last: int | None = None,
    masks: Masks | None = None,
    at_last_rate: bool = False,
    stop: Callable[[], bool] | None = None,
) -> nn.Module | None:
    """Train a copy of ``model`` over a part of the course; its momentum begins at zero.

    Args:
        model: The network.
        course: Batches and learning rates by step.
        first: Step to begin with: its batch and its rate.
        last: Step to end before; the end of the course if not given.
        masks: Weights that stay; the others are zero from the beginning to the end.
        at_last_rate: Whether all steps are taken at the small rate from near the end of the course.
        stop: Returns True once training has to stop.

    Returns:
        The trained network on the CPU in evaluation mode; None if it was stopped before its end.

    Raises:
        TrialError: If the loss becomes NaN or infinite, or memory is used up.
    """
    last = course.steps if last is None else last
    recovery = Recovery(
        finetune_steps=course.steps,
        learning_rate=course.last_rate if at_last_rate else course.rate,
        schedule="cosine" if at_last_rate else _SCHEDULE,
        distill=0.0,
    )
    trainer = Trainer(
        model,
        course.stream,
        recovery,
        loss=course.loss,
        device=course.device,
        total_steps=_ENDLESS if at_last_rate else course.steps,
    )
    trainer.steps = first
    hold(trainer.model, masks or {})
    trainer.run(last - first, stop=stop)
    return trainer.finish() if trainer.steps >= last else None


@torch.no_grad()
def outputs_on(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    calibration: Iterable[Tensor],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return outputs and targets of a split, BatchNorm statistics estimated anew before.

    After a few steps the running statistics still hold some of the first ones, more so in a short training.

    Args:
        model: The network; its BatchNorm statistics are changed.
        batches: The split, ``(inputs, targets)``.
        calibration: Inputs for the BatchNorm statistics.
        device: Where to run.

    Returns:
        Outputs ``(n, ...)`` in float32 and targets ``(n, ...)``, on the CPU.
    """
    refresh_batchnorm(model, calibration)
    held = list(batches)
    layout = memory_format(model, lambda: held[0][0][:2])
    running = model.eval().to(device)
    outputs = [
        running(inputs.to(device, memory_format=layout) if inputs.dim() == 4 else inputs.to(device))
        for inputs, _ in held
    ]
    model.to("cpu")
    return torch.cat([o.float().cpu() for o in outputs]), torch.cat([targets for _, targets in held])
