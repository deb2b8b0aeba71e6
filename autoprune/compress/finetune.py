"""Fine-tuning with distillation from the dense network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.compress.distillation import distillation_loss, rate_factor
from autoprune.compress.features import FeatureLayer, attention_loss, check_own_step, maps_of
from autoprune.compress.layers import has_batchnorm, has_layernorm
from autoprune.compress.speed import autocast, keep_freed_memory, low_precision, memory_format
from autoprune.compress.stream import TeacherStream
from autoprune.errors import TrialError, first_line
from autoprune.space.recipe import Recovery

__all__ = ["FinetuneResult", "TeacherStream", "Trainer", "finetune"]

Loss = Callable[[Tensor, Tensor], Tensor]
TrainingStep = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]

_MOMENTUM = 0.9
_WEIGHT_DECAY = 1e-4
# Learning rates are given for SGD; AdamW's steps are about this much too long for them.
_ADAMW_RATE = 0.05
# Reading the loss waits for the GPU, so it is read only now and then there.
_STEPS_BETWEEN_CHECKS = {"cuda": 10}


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning came to.

    Attributes:
        steps: Gradient steps taken.
        final_loss: Loss of the last step that was checked; NaN if there was none.
    """

    steps: int
    final_loss: float


class Trainer:
    """One network in training, whose steps can be taken in slices under one learning-rate schedule.

    SGD with Nesterov momentum 0.9 and weight decay 1e-4; AdamW where the network has LayerNorms and no
    BatchNorm. Multiplications are in the type that is fastest on the device, weights in float32. A batch that
    does not fit into memory is halved once for good; the gradient is still that of the whole batch.

    Args:
        model: The network to train; a copy is trained.
        stream: Batches and the teacher's outputs.
        recovery: Learning rate, schedule, distillation and clipping.
        loss: The task's loss, ``(outputs, targets)`` to a scalar.
        device: Where to train.
        training_step: The user's own ``(model, (inputs, targets))`` to a loss, which replaces both losses.
        start_step: Number of the first batch.
        total_steps: Steps that the schedule spans in :meth:`run`.
    """

    def __init__(
        self,
        model: nn.Module,
        stream: TeacherStream,
        recovery: Recovery,
        *,
        loss: Loss,
        device: torch.device,
        training_step: TrainingStep | None = None,
        start_step: int = 0,
        total_steps: int | None = None,
    ) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        self.stream = stream
        self.recovery = recovery
        self.loss = loss
        self.device = device
        self.training_step = training_step
        self.start_step = start_step
        self.total_steps = total_steps if total_steps is not None else recovery.finetune_steps
        self.steps = 0
        # Share of the training that is over, before the step that is taken.
        self.progress = 0.0
        self.final_loss = math.nan
        self._last: Tensor | None = None
        self._starts: list[Callable[[nn.Module], None]] = []
        self.parts = 1
        self._layout = memory_format(model, lambda: stream.inputs(start_step)[0])
        copy = deepcopy(model).to(device).train()
        self.model: nn.Module = copy.to(memory_format=self._layout)
        self._features = _feature_layers(recovery, stream, training_step)
        self._weights = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer, self._peak = _optimizer(self.model, self._weights, recovery.learning_rate)
        self._scaler = torch.amp.GradScaler(device.type, enabled=low_precision(device.type) is torch.float16)

    def run(self, steps: int, *, stop: Callable[[], bool] | None = None) -> FinetuneResult:
        """Take up to ``steps`` steps of the ``total_steps`` that the schedule spans.

        Args:
            steps: Steps of this slice.
            stop: Returns True once training has to stop; asked before every step.

        Returns:
            The steps of this slice and the last loss.

        Raises:
            TrialError: If the loss becomes NaN or infinite, or half a batch does not fit into memory.
        """
        first = self.steps
        with self._own_generators():
            while self.steps < first + steps and not (stop is not None and stop()):
                self._step(self.steps / max(1, self.total_steps))
        return self._result(first)

    def run_for(self, progress: Callable[[], float], *, stop: Callable[[], bool] | None = None) -> int:
        """Train until ``progress`` reaches 1, with the rate following it: a schedule over time, not steps.

        Args:
            progress: Returns the share of the time that is over; asked before every step.
            stop: Returns True once training has to stop.

        Returns:
            Steps taken.

        Raises:
            TrialError: As :meth:`run`.
        """
        first = self.steps
        with self._own_generators():
            while (share := progress()) < 1.0 and not (stop is not None and stop()):
                self._step(share)
        return self._result(first).steps

    def finish(self) -> nn.Module:
        """Return the trained network on the CPU in evaluation mode, without gradients."""
        self._optimizer.zero_grad(set_to_none=True)
        return self.model.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload,no-any-return]

    def observe(
        self,
        *,
        start: Callable[[nn.Module], None] | None = None,
        before: Callable[[nn.Module], None] | None = None,
        after: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Call functions with the network in training around every change of its weights.

        Args:
            start: Called before the network is run for a step.
            before: Called with the step's gradients there, scaled down to the largest norm.
            after: Called with the new weights, which it may change.
        """
        if start is not None:
            self._starts.append(start)
        if before is not None:
            self._optimizer.register_step_pre_hook(lambda *_: before(self.model))
        if after is not None:
            self._optimizer.register_step_post_hook(lambda *_: after(self.model))

    # -- one step ----------------------------------------------------------------------------

    def _step(self, progress: float) -> None:
        self.progress = progress
        for start in self._starts:
            start(self.model)
        for settings in self._optimizer.param_groups:
            settings["lr"] = self._peak * rate_factor(self.recovery.schedule, progress)
        number = self.start_step + self.steps
        # Dropout depends on the seed and the step alone, however the training is sliced.
        torch.manual_seed(self.stream.seed * 1_000_003 + number)
        try:
            loss = self._gradients(number)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if self.parts > 1:
                raise TrialError(
                    "out-of-memory",
                    f"half a batch of {self.stream.batch_size} does not fit: {first_line(error)[:200]}",
                ) from error
            loss = None
        if loss is None:  # outside of except, whose traceback would keep the failed step's tensors alive
            self.parts = 2
            self._optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._step(progress)
            return
        self._scaler.unscale_(self._optimizer)
        nn.utils.clip_grad_norm_(self._weights, self.recovery.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        if self.steps % _STEPS_BETWEEN_CHECKS.get(self.device.type, 1) == 0:
            self._check(float(loss), number)
        self._last = loss
        self.steps += 1

    def _gradients(self, number: int) -> Tensor:
        """Add up the gradients of one batch in as many parts as fit, and return its loss."""
        wanted = self.recovery.distill > 0 and self.training_step is None
        batch = self.stream.batch(number, self.parts) if wanted else self.stream.inputs(number)
        taught_maps = self.stream.maps(number, batch[0], self.parts) if self._features else {}
        maps = {name: own.chunk(self.parts) for name, own in taught_maps.items()}
        size = len(batch[0])
        total = torch.zeros((), device=self.device)
        pieces = zip(*(tensor.chunk(self.parts) for tensor in batch), strict=True)
        for part, piece in enumerate(pieces):
            share = len(piece[0]) / size
            loss = self._loss(*piece, maps={name: own[part] for name, own in maps.items()}) * share
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _loss(
        self, inputs: Tensor, targets: Tensor, taught: Tensor | None = None, *, maps: Mapping[str, Tensor]
    ) -> Tensor:
        if inputs.dim() == 4:
            inputs = inputs.to(memory_format=self._layout)
        if self.training_step is not None:
            with autocast(self.device):
                return self.training_step(self.model, (inputs, targets)).float()
        with autocast(self.device), maps_of(self.model, self._features) as seen:
            outputs = self.model(inputs)
        share = self.recovery.distill
        loss = torch.zeros((), device=self.device)
        if taught is not None:
            outputs = outputs.float()
            loss = loss + share * distillation_loss(outputs, taught, self.recovery.temperature)
        if share < 1.0:
            loss = loss + (1.0 - share) * self.loss(_as_float(outputs), targets)
        if seen:
            loss = loss + self.recovery.feature_distill * attention_loss(seen, maps)
        return loss

    def _check(self, loss: float, number: int) -> None:
        self.final_loss = loss
        if not math.isfinite(loss):
            kind = "nan" if math.isnan(loss) else "inf"
            rate = self.recovery.learning_rate
            raise TrialError(kind, f"the loss is {loss} at step {number} (learning rate {rate:g})")

    def _result(self, first: int) -> FinetuneResult:
        if self.steps > first and self._last is not None:
            self._check(float(self._last), self.start_step + self.steps - 1)
        return FinetuneResult(self.steps - first, self.final_loss)

    @contextmanager
    def _own_generators(self) -> Iterator[None]:
        """Leave the caller's random generators as they were."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield


def finetune(
    model: nn.Module,
    stream: TeacherStream,
    recovery: Recovery,
    *,
    loss: Loss,
    device: torch.device,
    start_step: int = 0,
    steps: int | None = None,
    deadline: Callable[[], bool] | None = None,
    training_step: TrainingStep | None = None,
    watch: Callable[[Trainer], None] | None = None,
) -> tuple[nn.Module, FinetuneResult]:
    """Fine-tune a copy of ``model``; see :class:`Trainer`.

    Args:
        model: The network to train.
        stream: Batches and the teacher's outputs.
        recovery: Learning rate, schedule, distillation and clipping.
        loss: The task's loss.
        device: Where to train.
        start_step: Number of the first batch.
        steps: Steps to take; the recovery's if not given.
        deadline: Returns True once training has to stop.
        training_step: The user's own step.
        watch: Called with the trainer before its first step.

    Returns:
        The trained network on the CPU in evaluation mode, and what the training came to.

    Raises:
        TrialError: If the loss becomes NaN or infinite, or half a batch does not fit into memory.
        UsageError: If features are to be compared and the network has none, or a training step is given.
    """
    count = recovery.finetune_steps if steps is None else steps
    trainer = Trainer(
        model,
        stream,
        recovery,
        loss=loss,
        device=device,
        training_step=training_step,
        start_step=start_step,
        total_steps=count,
    )
    if watch is not None:
        watch(trainer)
    result = trainer.run(count, stop=deadline)
    return trainer.finish(), result


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory is used up; the CPU's allocator says so in a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def _feature_layers(
    recovery: Recovery, stream: TeacherStream, training_step: TrainingStep | None
) -> tuple[FeatureLayer, ...]:
    """Return the layers whose features are compared; none where the recovery does not ask for it."""
    if recovery.feature_distill == 0:
        return ()
    check_own_step(training_step is not None)
    return stream.feature_layers()


def _optimizer(
    model: nn.Module, weights: list[nn.Parameter], rate: float
) -> tuple[torch.optim.Optimizer, float]:
    """Return the optimizer and its peak learning rate."""
    if has_layernorm(model) and not has_batchnorm(model):
        rate *= _ADAMW_RATE
        return torch.optim.AdamW(weights, lr=rate, weight_decay=_WEIGHT_DECAY, fused=True), rate
    made = torch.optim.SGD(
        weights, lr=rate, momentum=_MOMENTUM, nesterov=True, weight_decay=_WEIGHT_DECAY, fused=True
    )
    return made, rate


def _as_float(outputs: Tensor) -> Tensor:
    return outputs.float() if isinstance(outputs, Tensor) else outputs
