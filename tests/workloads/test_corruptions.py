"""Corruptions against their formulas on images small enough to check, and that splits are read as promised."""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from autoprune.config import make_config
from autoprune.errors import UsageError
from autoprune.workloads.corruptions import CORRUPTIONS, CorruptedSplit, corrupt
from autoprune.workloads.data import load_data
from autoprune.workloads.objects import data_from_objects
from autoprune.workloads.splits import Split
from autoprune.workloads.splitting import Limits


def images(count: int = 2, channels: int = 3, side: int = 8) -> NDArray[np.float32]:
    # Of one colour and smooth, far from 0 and 1, so that nothing is clipped where strengths are small.
    random = np.random.default_rng(0)
    return (0.4 + 0.2 * random.random((count, channels, side, side))).astype(np.float32)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_zero_is_the_image_itself(name: str) -> None:
    assert corrupt(images(), name, 0) is not None
    assert np.array_equal(corrupt(images(), name, 0), images())


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_severity_moves_images_further_and_stays_within_bounds(name: str, channels: int) -> None:
    sharp = np.zeros((2, channels, 32, 32), np.float32)
    sharp[:, :, 4:28, 10:20] = 0.9
    sharp[:, :, 12:16, 2:30] = 0.35
    moved = [np.abs(corrupt(sharp, name, severity) - sharp).mean() for severity in range(1, 6)]
    assert moved == sorted(moved) and moved[0] > 0 and moved[4] > moved[0]
    for severity in range(1, 6):
        found = corrupt(sharp, name, severity)
        assert found.dtype == np.float32 and found.shape == sharp.shape
        assert found.min() >= 0 and found.max() <= 1


def test_strengths_are_those_of_cifar_c_and_imagenet_c() -> None:
    flat = np.full((400, 1, 8, 8), 0.5, np.float32)
    assert np.std(corrupt(flat, "gaussian_noise", 5) - flat) == pytest.approx(0.10, rel=0.02)
    large = np.full((2, 1, 96, 96), 0.5, np.float32)
    assert np.std(corrupt(large, "gaussian_noise", 1) - large) == pytest.approx(0.08, rel=0.03)


def test_contrast_draws_each_channel_to_its_mean() -> None:
    one = images(1)
    found = corrupt(one, "contrast", 2)
    for channel in range(3):
        mean = one[0, channel].mean()
        assert np.allclose(found[0, channel], (one[0, channel] - mean) * 0.5 + mean, atol=1e-6)


def test_blur_is_the_sum_with_a_gaussian_and_repeats_the_border() -> None:
    one = images(1, 1)
    sigma = 0.8  # severity 4 of small images
    radius = math.floor(4 * sigma + 0.5)
    kernel = np.array([math.exp(-(i**2) / (2 * sigma**2)) for i in range(-radius, radius + 1)])
    kernel /= kernel.sum()
    padded = np.pad(one[0, 0].astype(np.float64), radius, mode="edge")
    rows = sum(w * padded[:, i : i + 8] for i, w in enumerate(kernel))
    expected = sum(w * rows[i : i + 8] for i, w in enumerate(kernel))
    assert np.allclose(corrupt(one, "gaussian_blur", 4)[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_what_pillow_writes_and_reads(channels: int) -> None:
    one = images(1, channels, 16)
    pixels = np.rint(one[0] * 255).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)).save(file, "JPEG", quality=58)
    read = np.asarray(Image.open(file))
    found = corrupt(one, "jpeg", 3)[0]
    assert np.allclose(found[0] if channels == 1 else found.transpose(1, 2, 0), read / 255.0, atol=1e-6)
    assert not np.allclose(found, one[0], atol=0.5 / 255)


def test_noise_depends_on_the_seed_and_the_number_of_the_image_alone() -> None:
    same = np.repeat(images(1), 4, axis=0)
    whole = corrupt(same, "gaussian_noise", 3, seed=5)
    assert np.array_equal(corrupt(same[2:], "gaussian_noise", 3, seed=5, first=2), whole[2:])
    assert not np.array_equal(whole[0], whole[1])
    assert not np.array_equal(corrupt(same, "gaussian_noise", 3, seed=6), whole)
    # The same noise at every severity, but for its scale.
    mild = corrupt(same, "gaussian_noise", 1, seed=5)
    assert np.allclose((mild - same) / 0.04, (whole - same) / 0.08, atol=1e-4)


def every(split: Split, size: int) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*split.batches(size), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def test_normalised_images_are_corrupted_as_pixels() -> None:
    config = make_config({"model": "cifar_resnet20", "data": "digits", "report_examples": 40})
    report = load_data(config).report.unseal()
    inputs, targets = every(report, 40)
    preparation = report.preparation  # type: ignore[attr-defined]
    mean = torch.tensor(preparation.mean).view(3, 1, 1)
    std = torch.tensor(preparation.std).view(3, 1, 1)
    pixels = (inputs * std + mean).clamp(0, 1).numpy()
    for name in CORRUPTIONS:
        expected = (torch.from_numpy(corrupt(pixels, name, 3, seed=1)) - mean) / std
        found, same = every(CorruptedSplit(report, name, 3, seed=1), 7)
        assert torch.allclose(found, expected, atol=1e-5), "whatever the size of batches"
        assert torch.equal(same, targets)
    untouched, _ = every(CorruptedSplit(report, "jpeg", 0), 7)
    assert torch.equal(untouched, inputs)
    assert len(CorruptedSplit(report, "jpeg", 1)) == 40
    assert CorruptedSplit(report, "jpeg", 1).fingerprint != report.fingerprint


def own(inputs: Tensor) -> Split:
    targets = torch.arange(len(inputs)) % 2
    data = data_from_objects(
        ((inputs, targets), (inputs, targets)), name="own", seed=0, limits=Limits(20, 20, 10)
    )
    return data.report.unseal()


def test_images_of_one_channel_in_bounds_are_taken_as_they_are() -> None:
    inputs = torch.rand(60, 1, 8, 8)
    split = own(inputs)
    read, _ = every(split, 8)
    for name in CORRUPTIONS:
        found, _ = every(CorruptedSplit(split, name, 5), 8)
        assert np.allclose(found.numpy(), corrupt(read.numpy(), name, 5), atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.rand(60, 1, 8, 8) * 4 - 2, "run from -.* corruptions are defined for 0 to 1"),
        (torch.rand(60, 5, 8, 8), r"shape \(2, 5, 8, 8\); allowed: \(n, 1 or 3, height, width\)"),
        (torch.rand(60, 12), r"shape \(2, 12\)"),
    ],
)
def test_what_is_no_image_is_refused_before_anything_runs(inputs: Tensor, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        CorruptedSplit(own(inputs), "jpeg", 1)


def test_nothing_is_trained_on_corrupted_images() -> None:
    with pytest.raises(UsageError, match="not there to train on"):
        CorruptedSplit(own(torch.rand(60, 1, 8, 8)), "jpeg", 1).training_batch(0, 4, 0)
