"""Data by specification, cut into splits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoprune.config import StudyConfig
from autoprune.errors import UsageError
from autoprune.naming import data_root
from autoprune.workloads.catalog import Spec, parse_data, parse_model
from autoprune.workloads.download import Say
from autoprune.workloads.folders import SMALL_SIDE
from autoprune.workloads.models import Preset, choose_weights, preset
from autoprune.workloads.objects import data_from_objects
from autoprune.workloads.sources import Collection, Images, find_images
from autoprune.workloads.splits import Data, ImageSplit, Preparation, SealedSplit
from autoprune.workloads.splitting import Limits, content_hash, cut, select
from autoprune.workloads.user_code import accepted, call_user, load_function


def say_on_stderr(message: str) -> None:
    """Print one line of progress."""
    print(message, file=sys.stderr, flush=True)


def load_data(config: StudyConfig, say: Say = say_on_stderr, root: Path | None = None) -> Data:
    """Load the data that the settings name, cut into splits.

    The model's settings count too: they decide on the size of images and their normalisation.

    Args:
        config: Settings of the study.
        say: Gets progress of a download.
        root: Folder of data sets; :func:`autoprune.naming.data_root` if not given.

    Raises:
        UsageError: If the data is unknown, missing, damaged or too small, or cannot be downloaded.
    """
    model = parse_model(config.model)
    spec = data_spec(config)
    limits = Limits(config.search_examples, config.report_examples, config.calibration_examples)
    if spec.kind == "code":
        what = f"--data {spec.name}:{spec.function}"
        function = load_function(spec.name, spec.function, "--data", trusted=config.trust_code)
        given = call_user(function, what, **accepted(function, {"seed": config.seed}, what))
        return data_from_objects(
            given, name=f"{Path(spec.name).name}:{spec.function}", seed=config.seed, limits=limits
        )
    found = find_images(spec, say, root)
    wanted = preset(model, choose_weights(model, config.weights, found.classes))
    return split_images(found, spec.name, wanted, config.pixels, config.seed, limits)


def data_spec(config: StudyConfig) -> Spec:
    """Return the data that the settings name, or the model's usual data as it is found on this machine."""
    return parse_data(config.data) if config.data is not None else _usual_data(parse_model(config.model))


def _usual_data(model: Spec) -> Spec:
    """Return the data that a network is made for: CIFAR-10, or ImageNet's images in the data folder."""
    if model.kind == "cifar_resnet":
        return Spec("cifar10", "cifar10")
    if model.kind == "code":
        raise UsageError(
            "a model of your own needs data: --data", "try --data digits or --data imagefolder:DIR"
        )
    imagenet = data_root() / "imagenet"
    whole = (imagenet / "train").is_dir() and ((imagenet / "val").is_dir() or (imagenet / "test").is_dir())
    return Spec("imagenet", "imagenet") if whole else Spec("imagenette", "imagenette")


def split_images(
    found: Collection, name: str, wanted: Preset, image_size: int | None, seed: int, limits: Limits
) -> Data:
    """Cut images into splits and prepare them as the network expects them.

    Args:
        found: The images.
        name: What the data is called.
        wanted: What the network expects.
        image_size: Side of the images; None for the data's or the network's own.
        seed: Seed of the splits.
        limits: Most examples of the splits.
    """
    side, resize = choose_size(found, wanted, image_size)
    preparation = Preparation(
        wanted.mean, wanted.std, shift=side // 8 if found.natural else side // 10, flip=found.natural
    )
    fingerprint = found.train.fingerprint
    parts = cut(
        found.train.targets,
        found.train.count,
        fingerprint,
        seed,
        limits,
        own_search=found.search is not None,
        own_report=found.report is not None,
    )
    source = found.train.open(side, resize, wanted.interpolation)

    def split(part: str, indices: NDArray[np.int64]) -> ImageSplit:
        content = f"{fingerprint}{side}-{resize}"
        return ImageSplit(part, source, indices, found.train.targets[indices], preparation, content)

    def own(part: str, images: Images, limit: int) -> ImageSplit:
        chosen = select(images.targets, images.count, images.fingerprint, seed, limit)
        pixels = images.open(side, resize, wanted.interpolation)
        content = f"{images.fingerprint}{side}-{resize}"
        return ImageSplit(part, pixels, chosen, images.targets[chosen], preparation, content)

    train, calibration = split("train", parts.train), split("calibration", parts.calibration)
    search = own("search", found.search, limits.search) if found.search else split("search", parts.search)
    report = own("report", found.report, limits.report) if found.report else split("report", parts.report)
    for made in (calibration, search, report):
        made.check()
    return Data(
        name=name,
        train=train,
        calibration=calibration,
        search=search,
        report=SealedSplit(report),
        input_shape=(3, side, side),
        classes=found.classes,
        fingerprint=content_hash([s.fingerprint for s in (train, calibration, search, report)]),
        search_from_train=found.search is None,
    )


def choose_size(found: Collection, wanted: Preset, image_size: int | None) -> tuple[int, int]:
    """Return the side of the images and the length that their shorter side is scaled to first.

    Raises:
        UsageError: If the network cannot take images of the size that was asked for.
    """
    side = image_size or found.side or wanted.side
    if side < wanted.min_side:
        if image_size is not None:
            raise UsageError(
                f"image_size {image_size} is too small for this network; allowed: from {wanted.min_side}"
            )
        side = -(-wanted.min_side // 32) * 32
    if found.small or side <= SMALL_SIDE:
        return side, side
    return side, wanted.resize if side == wanted.side else round(side * 256 / 224)
