"""Splits: disjoint parts of the data, read in batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoprune.errors import UsageError
from autoprune.workloads.images import ImageSource, Pixels
from autoprune.workloads.splitting import content_hash, generator

Batch = tuple[Tensor, Tensor]


class Split(Protocol):
    """One disjoint part of the data.

    Attributes:
        name: ``train``, ``calibration``, ``search`` or ``report``.
        fingerprint: Hash of the content.
    """

    @property
    def name(self) -> str:
        """Name of the split."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the content."""
        ...

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield inputs ``(n, …)`` and targets ``(n, …)`` in a fixed order, without augmentation.

        Args:
            size: Examples in a batch; the last one may hold fewer.
            limit: Most examples in all.
        """
        ...

    def training_batch(self, step: int, size: int, seed: int) -> Batch:
        """Return the augmented batch of one training step: a pure function of content and arguments.

        Every example comes once before any comes again.
        """
        ...


class SealedSplit:
    """A split that cannot be read until it is unsealed: the report split during a search.

    Args:
        split: The split.
    """

    def __init__(self, split: Split) -> None:
        self._split = split

    @property
    def name(self) -> str:
        """Name of the split."""
        return self._split.name

    @property
    def fingerprint(self) -> str:
        """Hash of the content."""
        return self._split.fingerprint

    def __len__(self) -> int:
        """Return the number of examples, which is no secret."""
        return len(self._split)

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self._split)

    def batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Raise, at the call and not at the first batch."""
        raise UsageError(f"the {self.name} split is sealed during the search")

    def training_batch(self, step: int, size: int, seed: int) -> Batch:
        """Raise."""
        raise UsageError(f"the {self.name} split is sealed during the search")

    def unseal(self) -> Split:
        """Return the split itself; for the final measurement alone."""
        return self._split


class Epochs:
    """A stream of examples, each epoch in another order that depends on content, seed and epoch.

    Args:
        count: Number of examples.
        fingerprint: Hash of the content.
    """

    def __init__(self, count: int, fingerprint: str) -> None:
        self._count, self._fingerprint = count, fingerprint
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}

    def positions(self, step: int, size: int, seed: int) -> NDArray[np.int64]:
        """Return the examples of one step, ``(size,)``; a batch may reach into the next epoch."""
        places = np.arange(step * size, (step + 1) * size)
        epochs = places // self._count
        result = np.empty(size, np.int64)
        for epoch in np.unique(epochs):
            result[epochs == epoch] = self._order(int(epoch), seed)[places[epochs == epoch] % self._count]
        return result

    def _order(self, epoch: int, seed: int) -> NDArray[np.int64]:
        key = (epoch, seed)
        if key not in self._orders:
            while len(self._orders) >= 4:
                self._orders.pop(next(iter(self._orders)))
            self._orders[key] = generator(self._fingerprint, seed, epoch, 2).permutation(self._count)
        return self._orders[key]


@dataclass(frozen=True)
class Preparation:
    """How pixels become inputs, and what training does to them first.

    Attributes:
        mean: Mean of each channel, for values in 0..1.
        std: Standard deviation of each channel.
        shift: Most pixels that a training image is moved by, each way; the border is black.
        flip: Whether half of the training images are mirrored.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    shift: int = 0
    flip: bool = False


class ImageSplit:
    """A split of images.

    Args:
        name: Name of the split.
        source: Where the pixels are.
        indices: The split's images in ``source``, ``(n,)``.
        targets: Class of each, ``(n,)``.
        preparation: How pixels become inputs.
        fingerprint: Hash of what ``source`` holds.
    """

    def __init__(
        self,
        name: str,
        source: ImageSource,
        indices: NDArray[np.int64],
        targets: NDArray[np.int64],
        preparation: Preparation,
        fingerprint: str,
    ) -> None:
        self.name = name
        self.indices, self.targets = indices, targets
        self.preparation = preparation
        self.fingerprint = content_hash(
            [fingerprint, indices.tobytes(), targets.tobytes(), repr(preparation)]
        )
        self._source = source
        self._epochs = Epochs(len(indices), self.fingerprint)
        self._scale = 1.0 / (255.0 * torch.tensor(preparation.std)).view(1, 3, 1, 1)
        self._offset = -(torch.tensor(preparation.mean) / torch.tensor(preparation.std)).view(1, 3, 1, 1)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.indices)

    def batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield inputs ``(n, 3, side, side)`` and classes ``(n,)`` in a fixed order; see :class:`Split`."""
        count = len(self) if limit is None else min(limit, len(self))
        for start in range(0, count, size):
            chosen = slice(start, min(start + size, count))
            yield self._inputs(self._source.read(self.indices[chosen])), torch.tensor(self.targets[chosen])

    def check(self) -> None:
        """Find images that cannot be decoded; nothing is scored.

        Raises:
            UsageError: If there is one; names it.
        """
        self._source.check(self.indices)

    def training_batch(self, step: int, size: int, seed: int) -> Batch:
        """Return an augmented batch; see :class:`Split`."""
        chosen = self._epochs.positions(step, size, seed)
        pixels = self._source.read(self.indices[chosen])
        pixels = augment(pixels, self.preparation, generator(self.fingerprint, seed, step, 3))
        return self._inputs(pixels), torch.tensor(self.targets[chosen])

    def _inputs(self, pixels: Pixels) -> Tensor:
        return torch.from_numpy(pixels).float().mul_(self._scale).add_(self._offset)


def augment(pixels: Pixels, preparation: Preparation, random: np.random.Generator) -> Pixels:
    """Move and mirror images at random.

    Args:
        pixels: Images, ``(n, 3, side, side)``.
        preparation: How far and whether.
        random: Source of chance.

    Returns:
        A new array of the same shape.
    """
    count, _, height, width = pixels.shape
    mirrored = random.random(count) < 0.5
    moves = random.integers(-preparation.shift, preparation.shift + 1, (count, 2))
    if preparation.flip:
        pixels[mirrored] = pixels[mirrored][..., ::-1]
    if not preparation.shift:
        return pixels
    result = np.zeros_like(pixels)
    # 128 images of 32 x 32: 0.2 ms by one block copy an image, 1.4 ms by one gather with index arrays.
    for image, moved, (dy, dx) in zip(pixels, result, moves.tolist(), strict=True):
        moved[:, max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = image[
            :, max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)
        ]
    return result


@dataclass(frozen=True)
class Data:
    """Data in disjoint splits, fixed by content and seed.

    Attributes:
        name: What the data was called.
        train: What networks are trained on.
        calibration: Ranges, statistics and least squares; never trained on here.
        search: What candidates are scored on.
        report: What the front is reported on; sealed until the search is over.
        input_shape: Shape of one input, without the batch.
        classes: Names of the classes; empty where targets are no classes.
        fingerprint: Hash of content, splits and preparation.
        search_from_train: Whether the search split was cut from the training images, so that a network from
            elsewhere may have been trained on it.
    """

    name: str
    train: Split
    calibration: Split
    search: Split
    report: SealedSplit
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    fingerprint: str
    search_from_train: bool = True
