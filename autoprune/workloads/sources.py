"""Images by specification, as they are found: embedded, in a folder, or downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autoprune.errors import UsageError
from autoprune.naming import data_root
from autoprune.workloads.catalog import Spec
from autoprune.workloads.download import Say, fetch, unpack
from autoprune.workloads.folders import FolderPart, ImageFolder, scan_folder
from autoprune.workloads.images import ArraySource, FolderSource, ImageSource, Pixels
from autoprune.workloads.splitting import content_hash

# The archive of 320 pixel images that torchvision's Imagenette data set names, with its MD5.
IMAGENETTE_URL = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"
IMAGENETTE_MD5 = "3df6f0d01a2c9592104656642f5e78a3"
OFFLINE = (
    "without a network: unpack the data into the folder that AUTOPRUNE_DATA names, "
    "or --data imagefolder:DIR for images of your own, or --data digits, which needs no download"
)
_DIGITS_SIDE = 32


@dataclass(frozen=True)
class Images:
    """Images of one part with their classes.

    Attributes:
        count: Number of images.
        targets: Class of each, ``(n,)``.
        fingerprint: Hash of the content.
        open: Makes the source of pixels, for a side, a resize length and an interpolation.
    """

    count: int
    targets: NDArray[np.int64]
    fingerprint: str
    open: Callable[[int, int, str], ImageSource]


@dataclass(frozen=True)
class Collection:
    """Images as they are found, before they are split.

    Attributes:
        classes: Names of the classes.
        train: Images to train with.
        search: Images for the search, where the data sets them apart.
        report: Images to report on, where the data sets them apart.
        side: Side that these images are used at by default; None for the network's own.
        small: Whether the images are scaled as they are, without cutting a border.
        natural: Whether a mirrored image is still one of its class.
    """

    classes: tuple[str, ...]
    train: Images
    search: Images | None
    report: Images | None
    side: int | None
    small: bool
    natural: bool


def find_images(spec: Spec, say: Say, root: Path | None = None) -> Collection:
    """Find the images of a specification; downloads them where they are missing.

    Args:
        spec: What was named.
        say: Gets progress of a download.
        root: Folder of data sets; :func:`autoprune.naming.data_root` if not given.
    """
    root = data_root() if root is None else root
    if spec.kind == "digits":
        return _digits()
    if spec.kind == "cifar10":
        return _cifar10(say, root)
    if spec.kind == "imagenette":
        return _from_folder(scan_folder(_imagenette(say, root)))
    if spec.kind == "imagenet":
        folder = root / "imagenet"
        if not folder.is_dir():
            raise UsageError(
                f"data 'imagenet' needs the folder {str(folder)!r} with train and val, one folder for each class; "
                "it cannot be downloaded",
                OFFLINE,
            )
        return _from_folder(scan_folder(folder))
    return _from_folder(scan_folder(Path(spec.name)))


def folder_of(spec: Spec, root: Path) -> Path | None:
    """Return the folder that holds the images of a specification; None where there is none, nothing is downloaded.

    Args:
        spec: A data set by name, or a folder.
        root: Folder of data sets.
    """
    if spec.kind == "cifar10":
        import torchvision

        folder = root / torchvision.datasets.CIFAR10.base_folder
    elif spec.kind == "imagenette":
        found = _imagenette_in(root)
        return found[0] if found else None
    elif spec.kind in ("imagenet", "folder"):
        folder = root / "imagenet" if spec.kind == "imagenet" else Path(spec.name)
    else:
        return None
    return folder if folder.is_dir() else None


def _imagenette_in(root: Path) -> list[Path]:
    folders = sorted(root.glob("imagenette2*"))
    return [folder for folder in folders if (folder / "train").is_dir() and (folder / "val").is_dir()]


def _from_folder(folder: ImageFolder) -> Collection:
    def images(part: FolderPart) -> Images:
        return Images(len(part.files), part.targets, part.fingerprint, lambda *how: FolderSource(part, *how))

    return Collection(
        folder.classes,
        images(folder.train),
        images(folder.search) if folder.search else None,
        images(folder.report) if folder.report else None,
        folder.native_side,
        small=folder.native_side is not None,
        natural=True,
    )


def _array_images(pixels: Pixels, targets: NDArray[np.int64]) -> Images:
    """Wrap images ``(n, 3, side, side)`` in memory; other sizes are scaled when they are asked for."""

    def source(side: int, resize: int, interpolation: str) -> ImageSource:
        if side == pixels.shape[-1]:
            return ArraySource(pixels)
        kind = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
        scaled = np.empty((len(pixels), 3, side, side), np.uint8)
        for image, result in zip(pixels, scaled, strict=True):
            resized = Image.fromarray(image.transpose(1, 2, 0)).resize((side, side), kind)
            result[:] = np.asarray(resized).transpose(2, 0, 1)
        return ArraySource(scaled)

    return Images(len(pixels), targets, content_hash([pixels.tobytes(), targets.tobytes()]), source)


def _digits() -> Collection:
    """Return scikit-learn's 1,797 scans of 8 x 8 pixels with 17 shades."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = np.round(found.images * (255.0 / 16.0)).astype(np.uint8)
    pixels = np.ascontiguousarray(np.repeat(grey[:, None], 3, axis=1))
    classes = tuple(str(name) for name in found.target_names)
    images = _array_images(pixels, found.target.astype(np.int64))
    return Collection(classes, images, None, None, _DIGITS_SIDE, small=True, natural=False)


def _cifar10(say: Say, root: Path) -> Collection:
    import torchvision

    kind: Any = torchvision.datasets.CIFAR10
    if not (root / kind.base_folder).is_dir():
        archive = fetch(
            kind.url,
            root / kind.filename,
            purpose="data 'cifar10'",
            offline=OFFLINE,
            digest=("md5", kind.tgz_md5),
            say=say,
        )
        unpack(archive, root / kind.base_folder)
    folder = root / kind.base_folder
    try:
        train, test = kind(root, train=True), kind(root, train=False)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise UsageError(f"data 'cifar10' in {str(folder)!r} cannot be read: {error}", OFFLINE) from error
    parts = [
        _array_images(
            np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)), np.asarray(part.targets, np.int64)
        )
        for part in (train, test)
    ]
    return Collection(tuple(train.classes), parts[0], None, parts[1], 32, small=True, natural=True)


def _imagenette(say: Say, root: Path) -> Path:
    """Return the folder of Imagenette, in any of its sizes; downloads the middle one if there is none."""
    found = _imagenette_in(root)
    if found:
        return found[0]
    archive = root / IMAGENETTE_URL.rpartition("/")[2]
    fetch(
        IMAGENETTE_URL,
        archive,
        purpose="data 'imagenette'",
        offline=OFFLINE,
        digest=("md5", IMAGENETTE_MD5),
        say=say,
    )
    return unpack(archive, root / archive.stem)
