"""Training batches with what the dense network says of them, computed once for all recipes of a study."""

from __future__ import annotations

from copy import deepcopy
from typing import Protocol

import torch
from torch import Tensor, nn

from autoprune.compress.speed import autocast, keep_freed_memory, memory_format
from autoprune.errors import CompressionError


class TrainingSplit(Protocol):
    """The part of a split that training reads."""

    def training_batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return an augmented batch that depends on nothing but the content and the arguments."""
        ...


class TeacherStream:
    """Batches by step number: inputs, targets and the teacher's outputs.

    Inputs are made anew at each call, because the split makes the same ones again; outputs are kept in
    float16 up to ``cache_bytes``. What comes first is kept: every trial starts at step 0.

    Args:
        model: The teacher, the dense network; a copy is taken.
        split: Source of the batches.
        seed: Seed of the batches.
        batch_size: Examples in a batch.
        device: Where the teacher runs and the batches lie.
        cache_bytes: Most memory for outputs, bytes.
    """

    def __init__(
        self,
        model: nn.Module,
        split: TrainingSplit,
        *,
        seed: int,
        batch_size: int,
        device: torch.device | None = None,
        cache_bytes: int = 512 << 20,
    ) -> None:
        self.split = split
        self.seed = seed
        self.batch_size = batch_size
        self.device = device or torch.device("cpu")
        self.cache_bytes = cache_bytes
        self.cached_bytes = 0
        self._source = model
        self._teacher: nn.Module | None = None
        self._layout = torch.contiguous_format
        self._outputs: dict[int, Tensor] = {}

    def inputs(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of ``step``, on the device."""
        inputs, targets = self.split.training_batch(step, self.batch_size, self.seed)
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def batch(self, step: int, parts: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, targets and the teacher's outputs of ``step``, on the device; outputs in float32.

        Args:
            step: Number of the batch.
            parts: Pieces in which the teacher takes it, where the whole does not fit into memory.
        """
        inputs, targets = self.inputs(step)
        return inputs, targets, self._taught(step, inputs, parts)

    def _taught(self, step: int, inputs: Tensor, parts: int) -> Tensor:
        kept = self._outputs.get(step)
        if kept is not None:
            return kept.to(self.device).float()
        outputs = torch.cat([self._ask(piece) for piece in inputs.chunk(parts)]).to(torch.float16)
        size = outputs.numel() * outputs.element_size()
        if self.cached_bytes + size <= self.cache_bytes:
            self._outputs[step] = outputs.cpu()
            self.cached_bytes += size
        return outputs.float()  # rounded also where it was just computed, so that it is the same every time

    @torch.no_grad()
    def _ask(self, inputs: Tensor) -> Tensor:
        if self._teacher is None:
            keep_freed_memory()
            self._layout = memory_format(self._source, lambda: inputs)
            teacher = deepcopy(self._source).eval().to(self.device)
            self._teacher = teacher.to(memory_format=self._layout)
        images = inputs.to(memory_format=self._layout) if inputs.dim() == 4 else inputs
        with autocast(self.device):
            outputs = self._teacher(images)
        if not isinstance(outputs, Tensor) or outputs.dim() < 2:
            raise CompressionError(
                f"distillation needs a network that returns one tensor (n, classes, ...), got {type(outputs).__name__}",
                "set the recovery's distill to 0, or give a training step of your own",
            )
        limit = torch.finfo(torch.float16).max
        return outputs.float().clamp(-limit, limit)
