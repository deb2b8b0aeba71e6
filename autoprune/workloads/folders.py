"""Folders of images: find the layout, name what is wrong with it, decode single files."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from autoprune.errors import UsageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
LAYOUT = "DIR/train/CLASS/*.jpg with DIR/test or DIR/val, or DIR/CLASS/*.jpg"
SMALL_SIDE = 64
_MIN_PER_CLASS = 4
_SAMPLE_FILES = 200
# Files whose ends are part of the fingerprint, spread over the part, and the bytes of each end.
_HASHED_FILES = 20_000
_HASHED_BYTES = 2048
_SAMPLE_LIMIT_S = 1.0
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class FolderPart:
    """The images of one part, ``train`` or ``test``, in sorted order.

    Attributes:
        root: The folder that holds one folder for each class.
        files: Paths relative to ``root``.
        targets: Class of each file, int64 ``(n,)``.
        fingerprint: Hash of names and sizes; the same on every machine.
        cache_key: The fingerprint with the files' times, for the cache of decoded images.
    """

    root: Path
    files: tuple[str, ...]
    targets: NDArray[np.int64]
    fingerprint: str
    cache_key: str


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images, one folder for each class.

    Attributes:
        root: The folder.
        classes: Names of the classes, sorted; a class's target is its place here.
        train: The images to train with; all where nothing is set apart.
        search: The images of ``val`` where there is a ``test`` as well.
        report: The images of ``test``, else ``val``; None where the folder has neither.
        native_side: Side of the images where a sample is all square, alike and small; else None.
    """

    root: Path
    classes: tuple[str, ...]
    train: FolderPart
    search: FolderPart | None
    report: FolderPart | None
    native_side: int | None


def scan_folder(root: Path) -> ImageFolder:
    """Find the layout of a folder and check a sample of its images.

    What was found is kept until a folder inside changes: settings are checked before torch is imported, data are loaded
    after, and reading the ends of many small files takes seconds.

    Args:
        root: Folder in one of the two layouts.

    Raises:
        UsageError: If the folder is missing or empty, has fewer than two classes or too few images, if a part
            lacks a class, or if an image of the sample cannot be decoded; the file is named.
    """
    if "\0" in str(root) or not root.is_dir():
        raise UsageError(f"image folder {str(root)!r} does not exist; allowed: a folder with {LAYOUT}")
    inside = [*root.glob("*/"), *root.glob("*/*/")]
    changes = tuple(sorted((str(path), path.stat().st_mtime_ns) for path in (root, *inside)))
    return _scan(root, changes)


@lru_cache(maxsize=2)
def _scan(root: Path, _changes: tuple[tuple[str, int], ...]) -> ImageFolder:
    parts = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if "train" in parts:
        classes = _class_names(parts["train"])
        train = _scan_part(parts["train"], classes, whole=True)
        others = {
            name: _scan_part(path, classes, whole=False) for name, path in parts.items() if name != "train"
        }
    elif {"val", "test"} & parts.keys():
        raise UsageError(
            f"image folder {str(root)!r} has {', '.join(parts)} and lacks train; allowed: {LAYOUT}"
        )
    else:
        classes = _class_names(root)
        train, others = _scan_part(root, classes, whole=True), {}
    counts = np.bincount(train.targets, minlength=len(classes))
    if counts.min() < _MIN_PER_CLASS:
        name = classes[int(counts.argmin())]
        raise UsageError(
            f"class {name!r} in {str(train.root)!r} has {counts.min()} images; at least {_MIN_PER_CLASS} are needed"
        )
    report = others.get("test", others.get("val"))
    search = others.get("val") if "test" in others else None
    sides = {side for part in (train, *others.values()) for side in _check_sample(part)}
    small = len(sides) == 1 and max(next(iter(sides))) <= SMALL_SIDE and len(set(next(iter(sides)))) == 1
    return ImageFolder(root, classes, train, search, report, next(iter(sides))[0] if small else None)


def _class_names(root: Path) -> tuple[str, ...]:
    names = tuple(sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")))
    if not names:
        what = "is empty" if not any(os.scandir(root)) else "holds no class folders"
        raise UsageError(f"image folder {str(root)!r} {what}; allowed: {LAYOUT}")
    if len(names) < 2:
        raise UsageError(
            f"image folder {str(root)!r} has one class only, {names[0]!r}; at least 2 are needed"
        )
    return names


def _scan_part(root: Path, classes: tuple[str, ...], *, whole: bool) -> FolderPart:
    """List the images of one part; ``whole`` asks for images of every class."""
    extra = {e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")} - set(classes)
    if extra:
        raise UsageError(f"{str(root)!r} has classes that train lacks: {', '.join(sorted(extra)[:5])}")
    files: list[str] = []
    targets: list[int] = []
    stable, timed = hashlib.sha256(), hashlib.sha256(os.fsencode(root.resolve()))
    for target, name in enumerate(classes):
        found = sorted(_images(root / name)) if (root / name).is_dir() else []
        if whole and not found:
            raise UsageError(
                f"class {name!r} in {str(root)!r} holds no images; allowed: {', '.join(IMAGE_SUFFIXES)}"
            )
        for path, status in found:
            if status.st_size == 0:
                raise UsageError(f"image {path!r} is empty (0 bytes)", "remove or replace the file")
            relative = os.path.relpath(path, root).replace(os.sep, "/")
            line = f"{relative}\0{status.st_size}\0".encode("utf-8", "surrogateescape")
            stable.update(line)
            timed.update(line + str(status.st_mtime_ns).encode())
            files.append(relative)
            targets.append(target)
    if not files:
        raise UsageError(f"{str(root)!r} holds no images of the classes that train has", f"allowed: {LAYOUT}")
    for index in np.unique(np.linspace(0, len(files) - 1, min(len(files), _HASHED_FILES)).astype(int)):
        stable.update(_ends(root / files[int(index)]))
    return FolderPart(root, tuple(files), np.array(targets, np.int64), stable.hexdigest(), timed.hexdigest())


def _images(folder: Path) -> list[tuple[str, os.stat_result]]:
    """List the image files below ``folder``, with their status; hidden ones are left out."""
    found: list[tuple[str, os.stat_result]] = []
    pending = [os.fspath(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    found.append((entry.path, _status(entry)))
    return found


def _ends(path: Path) -> bytes:
    """Return a file's first and last bytes."""
    try:
        with path.open("rb") as file:
            first = file.read(_HASHED_BYTES)
            file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - _HASHED_BYTES))
            return first + file.read(_HASHED_BYTES)
    except OSError as error:
        raise UsageError(f"image {str(path)!r} cannot be read: {error.strerror}") from None


def _status(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError as error:
        raise UsageError(f"image {entry.path!r} cannot be read: {error.strerror}") from None


def _check_sample(part: FolderPart) -> set[tuple[int, int]]:
    """Decode images spread over a part, for about a second at most; return their sides."""
    count = min(len(part.files), _SAMPLE_FILES)
    chosen = np.unique(np.linspace(0, len(part.files) - 1, count).astype(int))
    # Coarse steps first, so that a slow disk still sees every class.
    order = np.concatenate([chosen[start::16] for start in range(16)])
    sides: set[tuple[int, int]] = set()
    begun_s = time.monotonic()
    for index in order:
        image = decode(part.root / part.files[int(index)])
        sides.add(image.size)
        if time.monotonic() - begun_s > _SAMPLE_LIMIT_S:
            break
    return sides


def decode(path: Path) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        UsageError: If the file is missing, corrupt, or not an image; names it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UsageError(
            f"image {str(path)!r} cannot be decoded: {reason}", "remove or replace the file"
        ) from None


def check_decodable(path: Path) -> None:
    """Decode an image as coarsely as its format allows, which still reads all of it.

    Raises:
        UsageError: If it cannot be decoded; names it.
    """
    try:
        with Image.open(path) as image:
            image.draft("RGB", (32, 32))
            image.load()
    except OSError:
        decode(path)
        raise


def fit(image: Image.Image, side: int, resize: int, interpolation: str = "bilinear") -> NDArray[np.uint8]:
    """Scale the shorter side to ``resize`` and cut the centre ``side`` by ``side``.

    Returns:
        Pixels, ``(3, side, side)``.
    """
    width, height = image.size
    if (width, height) != (side, side) or resize != side:
        short = min(width, height)
        scaled = (max(side, round(width * resize / short)), max(side, round(height * resize / short)))
        if scaled != (width, height):
            image = image.resize(scaled, _RESAMPLING[interpolation])
        left, top = round((scaled[0] - side) / 2), round((scaled[1] - side) / 2)
        image = image.crop((left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
