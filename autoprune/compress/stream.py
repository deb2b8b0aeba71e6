"""Training batches with what the dense network says of them, computed once for all recipes of a study."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autoprune.compress.features import FeatureLayer, feature_layers, maps_of
from autoprune.compress.layers import device_of
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
        self._maps: dict[int, dict[str, Tensor]] = {}
        self._feature_layers: tuple[FeatureLayer, ...] = ()

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

    def feature_layers(self) -> tuple[FeatureLayer, ...]:
        """Return the teacher's layers whose features are compared; see :func:`.features.feature_layers`.

        Raises:
            UsageError: If it has none.
        """
        if not self._feature_layers:
            inputs = self.split.training_batch(0, self.batch_size, self.seed)[0][:2]
            self._feature_layers = feature_layers(self._source, inputs.to(device_of(self._source)))
        return self._feature_layers

    def maps(self, step: int, inputs: Tensor, parts: int = 1) -> dict[str, Tensor]:
        """Return the teacher's attention maps at ``step`` by layer, ``(n, places)`` each, on the device, in float32.

        They share the memory of the outputs, which the same run of the teacher gives.

        Args:
            step: Number of the batch.
            inputs: Its inputs, on the device.
            parts: Pieces in which the teacher takes it.

        Raises:
            UsageError: If the teacher has no layer to compare.
        """
        kept = self._maps.get(step)
        if kept is None:
            kept = self._look(step, inputs, parts)
        return {name: own.to(self.device).float() for name, own in kept.items()}

    def _look(self, step: int, inputs: Tensor, parts: int) -> dict[str, Tensor]:
        layers = self.feature_layers()
        pieces, outputs = [], []
        for piece in inputs.chunk(parts):
            with maps_of(self._ready_teacher(inputs), layers) as found:
                outputs.append(self._run(piece))
            pieces.append(found)
        if step not in self._outputs and all(isinstance(o, Tensor) and o.dim() > 1 for o in outputs):
            self._keep(step, torch.cat([_logits(o) for o in outputs]).to(torch.float16))
        maps = {
            layer.name: torch.cat([found[layer.name] for found in pieces]).to(torch.float16)
            for layer in layers
        }
        size = sum(own.numel() * own.element_size() for own in maps.values())
        if self.cached_bytes + size <= self.cache_bytes:
            self._maps[step] = {name: own.cpu() for name, own in maps.items()}
            self.cached_bytes += size
        return maps

    def _keep(self, step: int, outputs: Tensor) -> None:
        size = outputs.numel() * outputs.element_size()
        if self.cached_bytes + size <= self.cache_bytes:
            self._outputs[step] = outputs.cpu()
            self.cached_bytes += size

    def _taught(self, step: int, inputs: Tensor, parts: int) -> Tensor:
        kept = self._outputs.get(step)
        if kept is not None:
            return kept.to(self.device).float()
        outputs = torch.cat([self._ask(piece) for piece in inputs.chunk(parts)]).to(torch.float16)
        self._keep(step, outputs)
        return outputs.float()  # rounded also where it was just computed, so that it is the same every time

    def _ready_teacher(self, inputs: Tensor) -> nn.Module:
        if self._teacher is None:
            keep_freed_memory()
            self._layout = memory_format(self._source, lambda: inputs)
            teacher = deepcopy(self._source).eval().to(self.device)
            self._teacher = teacher.to(memory_format=self._layout)
        return self._teacher

    @torch.no_grad()
    def _run(self, inputs: Tensor) -> Any:
        teacher = self._ready_teacher(inputs)
        images = inputs.to(memory_format=self._layout) if inputs.dim() == 4 else inputs
        with autocast(self.device):
            return teacher(images)

    def _ask(self, inputs: Tensor) -> Tensor:
        outputs = self._run(inputs)
        if not isinstance(outputs, Tensor) or outputs.dim() < 2:
            raise CompressionError(
                f"distillation needs a network that returns one tensor (n, classes, ...), got {type(outputs).__name__}",
                "set the recovery's distill to 0, or give a training step of your own",
            )
        return _logits(outputs)


def _logits(outputs: Tensor) -> Tensor:
    """Return outputs in float32, within the range of float16."""
    limit = torch.finfo(torch.float16).max
    return outputs.float().clamp(-limit, limit)
