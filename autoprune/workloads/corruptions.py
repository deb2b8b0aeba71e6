"""Corruptions of images: what cameras, screens and files do to them, applied as the images are read.

References:
    [Hendrycks2019] Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from autoprune.errors import UsageError
from autoprune.workloads.splits import Batch, Preparation, Split

Images = NDArray[np.float32]

SMALL_SIDE = 64
SEVERITIES = (1, 3, 5)
# Normalising and undoing it is not exact in float32.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Corruption:
    """One corruption, with a strength for each of five severities.

    Attributes:
        apply: Takes images ``(n, channels, height, width)`` in 0..1, the strength, the seed and the number of the
            first image; returns images of the same shape, not clipped.
        large: Strengths of severities 1 to 5 in ImageNet-C.
        small: The same in CIFAR-10-C, for images of at most 64 pixels.
    """

    apply: Callable[[Images, float, int, int], Images]
    large: tuple[float, ...]
    small: tuple[float, ...]


def gaussian_noise(images: Images, strength: float, seed: int, first: int) -> Images:
    """Add normal noise of the standard deviation ``strength``.

    The noise of an image depends on the seed and the image's number alone, and is the same, but for its scale, at
    every severity.
    """
    noise = np.empty_like(images)
    for place in range(len(images)):
        random = np.random.default_rng([seed, first + place])
        noise[place] = random.standard_normal(images.shape[1:], dtype=np.float32)
    return images + np.float32(strength) * noise


def gaussian_blur(images: Images, strength: float, seed: int, first: int) -> Images:
    """Blur by a Gaussian of ``strength`` pixels, cut at four deviations; pixels at the border are repeated."""
    blurred: Images = gaussian_filter(images, sigma=(0, 0, strength, strength), mode="nearest", truncate=4.0)
    return blurred


def contrast(images: Images, strength: float, seed: int, first: int) -> Images:
    """Draw each channel of each image to its mean: ``(x - mean) * strength + mean``."""
    mean = images.mean(axis=(2, 3), keepdims=True)
    drawn: Images = (images - mean) * np.float32(strength) + mean
    return drawn


def jpeg(images: Images, strength: float, seed: int, first: int) -> Images:
    """Write each image as a JPEG file of quality ``strength`` and read it back."""
    result = np.empty_like(images)
    for place, pixels in enumerate(np.rint(images * 255).astype(np.uint8)):
        file = BytesIO()
        grey = len(pixels) == 1
        Image.fromarray(pixels[0] if grey else pixels.transpose(1, 2, 0)).save(
            file, "JPEG", quality=int(strength)
        )
        read = np.asarray(Image.open(file), dtype=np.float32) / 255
        result[place] = read[None] if grey else read.transpose(2, 0, 1)
    return result


# Strengths are those of the authors' make_imagenet_c.py and make_cifar_c.py.
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(
        gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)
    ),
    "gaussian_blur": Corruption(gaussian_blur, (1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1.0)),
    "contrast": Corruption(contrast, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "jpeg": Corruption(jpeg, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
}


def corrupt(images: Images, corruption: str, severity: int, *, seed: int = 0, first: int = 0) -> Images:
    """Corrupt images as [Hendrycks2019]_ does.

    Unlike the benchmark's files the results are not rounded to 8 bits and saved once more as JPEG.

    Args:
        images: ``(n, channels, height, width)`` in 0..1, with 1 or 3 channels.
        corruption: One of :data:`CORRUPTIONS`.
        severity: 1 to 5; 0 gives the images themselves.
        seed: Seed of the noise.
        first: Number of the first image.

    Returns:
        Images of the same shape, clipped to 0..1.
    """
    if severity == 0:
        return images
    chosen = CORRUPTIONS[corruption]
    strengths = chosen.small if max(images.shape[2:]) <= SMALL_SIDE else chosen.large
    changed = chosen.apply(images, strengths[severity - 1], seed, first)
    return np.clip(changed, 0.0, 1.0).astype(np.float32)


class CorruptedSplit:
    """A split whose images are corrupted as they are read: normalisation is undone for it, and done again.

    Args:
        split: The split; its inputs are images that autoprune normalised itself, or lie in 0..1.
        corruption: One of :data:`CORRUPTIONS`.
        severity: 0 to 5; 0 reads the images as they are.
        seed: Seed of the noise.

    Raises:
        UsageError: If the inputs cannot be images; says what they are.
    """

    def __init__(self, split: Split, corruption: str, severity: int, seed: int = 0) -> None:
        self._split = split
        self._corruption, self._severity, self._seed = corruption, severity, seed
        preparation = getattr(split, "preparation", None)
        self._mean, self._std = torch.zeros(1), torch.ones(1)
        if isinstance(preparation, Preparation):
            self._mean = torch.tensor(preparation.mean).view(-1, 1, 1)
            self._std = torch.tensor(preparation.std).view(-1, 1, 1)
        self._pixels(next(split.batches(2, limit=2))[0])

    @property
    def name(self) -> str:
        """Name of the split that is read."""
        return self._split.name

    @property
    def fingerprint(self) -> str:
        """Hash of the content before it is corrupted, and of the corruption."""
        return f"{self._split.fingerprint}:{self._corruption}:{self._severity}:{self._seed}"

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._split)

    def batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield corrupted inputs and targets; see :class:`~autoprune.workloads.splits.Split`."""
        first = 0
        for inputs, targets in self._split.batches(size, limit):
            if self._severity:
                pixels = corrupt(
                    self._pixels(inputs), self._corruption, self._severity, seed=self._seed, first=first
                )
                changed = (torch.from_numpy(pixels) - self._mean) / self._std
            else:
                changed = inputs
            yield changed, targets
            first += len(inputs)

    def training_batch(self, step: int, size: int, seed: int) -> Batch:
        """Raise: what is corrupted is for measuring."""
        raise UsageError(f"the corrupted {self.name} split is not there to train on")

    def _pixels(self, inputs: Tensor) -> Images:
        """Return inputs as images in 0..1."""
        if inputs.dim() != 4 or inputs.shape[1] not in (1, 3):
            raise UsageError(
                f"robustness is measured on images; inputs of the {self.name} split have the shape "
                f"{tuple(inputs.shape)}; allowed: (n, 1 or 3, height, width)"
            )
        pixels = inputs.float() * self._std + self._mean
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= -_ROUNDING and high <= 1.0 + _ROUNDING):
            raise UsageError(
                f"images of the {self.name} split run from {low:.3g} to {high:.3g}; corruptions are defined for 0 to 1",
                "give images in 0..1 and put their normalisation into the network's first layer",
            )
        found: Images = pixels.clamp(0.0, 1.0).numpy()
        return found
