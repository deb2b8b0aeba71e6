"""Where the pixels of image data come from: an array, or files that are decoded once."""

from __future__ import annotations

import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autoprune.naming import cache_root
from autoprune.workloads.folders import SMALL_SIDE, FolderPart, check_decodable, decode, fit

Pixels = NDArray[np.uint8]

MEMORY_LIMIT = 1_500_000_000
_DECODE_THREADS = 2
_log = logging.getLogger(__name__)


class ImageSource(Protocol):
    """Images by index."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def read(self, indices: NDArray[np.int64]) -> Pixels:
        """Return the images at ``indices``, a copy, ``(n, 3, side, side)``."""
        ...

    def check(self, indices: NDArray[np.int64]) -> None:
        """Raise a ``UsageError`` that names the file if one of the images cannot be decoded."""
        ...


class ArraySource:
    """Images in memory.

    Args:
        images: Pixels, ``(n, 3, side, side)``.
    """

    def __init__(self, images: Pixels) -> None:
        self._images = images

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    def read(self, indices: NDArray[np.int64]) -> Pixels:
        """Return the images at ``indices``, a copy."""
        return self._images[indices]

    def check(self, indices: NDArray[np.int64]) -> None:
        """Find nothing: they are decoded."""


class FolderSource:
    """Image files, each decoded once where all of them fit into memory.

    A part of small images is decoded as a whole on the first read, and kept decoded in the cache folder;
    larger images are decoded as they are read.

    Args:
        part: The files.
        side: Side of the images that are returned, in pixels.
        resize: Length that the shorter side is scaled to before the centre is cut.
        interpolation: ``bilinear`` or ``bicubic``.
    """

    def __init__(self, part: FolderPart, side: int, resize: int, interpolation: str = "bilinear") -> None:
        self._part, self._side, self._resize, self._interpolation = part, side, resize, interpolation
        self._shape = (len(part.files), 3, side, side)
        self._fits = int(np.prod(self._shape)) <= MEMORY_LIMIT
        self._whole = self._fits and side <= SMALL_SIDE
        self._images: Pixels | None = None
        self._done = np.zeros(len(part.files), dtype=bool)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._part.files)

    def read(self, indices: NDArray[np.int64]) -> Pixels:
        """Return the images at ``indices``, a copy.

        Raises:
            UsageError: If a file cannot be decoded; names it.
        """
        if not self._fits:
            return self._decode(indices)
        if self._images is None:
            # Memory is only taken where it is written.
            self._images = self._load_cache() if self._whole else None
            self._done[:] = self._images is not None
            if self._images is None:
                self._images = np.empty(self._shape, np.uint8)
        wanted = np.arange(len(self)) if self._whole else np.unique(indices)
        missing = wanted[~self._done[wanted]]
        if len(missing):
            self._images[missing] = self._decode(missing)
            self._done[missing] = True
            if self._whole:
                self._save_cache()
        return self._images[indices]

    def _decode(self, indices: NDArray[np.int64]) -> Pixels:
        result = np.empty((len(indices), *self._shape[1:]), np.uint8)

        def fill(positions: range) -> None:
            for position in positions:
                image = decode(self._part.root / self._part.files[int(indices[position])])
                result[position] = fit(image, self._side, self._resize, self._interpolation)

        if len(indices) < 2 * _DECODE_THREADS:
            fill(range(len(indices)))
            return result
        with ThreadPoolExecutor(_DECODE_THREADS) as pool:
            for _ in pool.map(
                fill, [range(t, len(indices), _DECODE_THREADS) for t in range(_DECODE_THREADS)]
            ):
                pass
        return result

    def check(self, indices: NDArray[np.int64]) -> None:
        """Find damaged images now instead of when they are first read, which may be after hours.

        Raises:
            UsageError: If one cannot be decoded; names it.
        """
        if self._whole:
            return  # all are decoded at the first read
        paths = [self._part.root / self._part.files[int(index)] for index in indices]
        with ThreadPoolExecutor(_DECODE_THREADS) as pool:
            for _ in pool.map(check_decodable, paths):
                pass

    @property
    def _cache_path(self) -> Path:
        name = f"{self._part.cache_key[:32]}-{self._side}-{self._resize}-{self._interpolation}.npy"
        return cache_root() / "decoded" / name

    def _load_cache(self) -> Pixels | None:
        path = self._cache_path
        if not path.is_file():
            return None
        try:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            _log.warning("ignoring the damaged cache file %s: %s", path, error)
            return None
        return images if images.shape == self._shape and images.dtype == np.uint8 else None

    def _save_cache(self) -> None:
        """Keep the decoded images; a disk that does not take them costs time on the next run and nothing else."""
        path = self._cache_path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
                try:
                    np.save(file, self._images, allow_pickle=False)  # type: ignore[arg-type]
                    file.flush()
                    Path(file.name).replace(path)
                except OSError:
                    Path(file.name).unlink()
                    raise
        except OSError as error:
            _log.warning("decoded images cannot be kept in %s: %s", path.parent, error)
