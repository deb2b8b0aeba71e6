"""Folders of small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeFolder = Callable[..., Path]


def write_images(root: Path, classes: Sequence[str], count: int, side: int = 32, seed: int = 0) -> Path:
    """Write noisy images whose brightness tells the class."""
    random = np.random.default_rng(seed)
    for place, name in enumerate(classes):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        level = 30 + 190 * place // max(1, len(classes) - 1)
        for number in range(count):
            pixels = np.clip(level + random.integers(-30, 30, (side, side, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    return root


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Return a function that writes a folder of images: parts, classes, images of each class, side."""

    def make(
        parts: Sequence[str] = ("train", "test"),
        classes: Sequence[str] = ("a", "b"),
        count: int = 20,
        side: int = 32,
    ) -> Path:
        root = tmp_path / "images"
        for seed, part in enumerate(parts or ("",)):
            write_images(root / part, classes, count, side, seed)
        return root

    return make
