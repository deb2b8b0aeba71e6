"""Splits are disjoint, stable and sealed; training batches are pure functions."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from autoprune.config import make_config
from autoprune.errors import UsageError
from autoprune.workloads.data import load_data
from autoprune.workloads.images import ArraySource
from autoprune.workloads.objects import data_from_objects
from autoprune.workloads.splits import Data, ImageSplit, Preparation, Split, augment
from autoprune.workloads.splitting import Limits, cut, stratified_order


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data(make_config({"model": "cifar_resnet20", "data": "digits"}))


def _image_split(count: int = 100, **preparation: Any) -> ImageSplit:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)
    targets = np.arange(count, dtype=np.int64)
    return ImageSplit(
        "train", ArraySource(pixels), np.arange(count), targets, Preparation(**preparation), "ab" * 32
    )


def _indices(data: Data) -> list[set[int]]:
    report = data.report.unseal()
    splits = (data.train, data.calibration, data.search, report)
    return [set(split.indices.tolist()) for split in splits if isinstance(split, ImageSplit)]


def test_digits_splits_are_disjoint_whole_and_stratified(digits: Data) -> None:
    parts = _indices(digits)
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 1797
    assert min(len(part) for part in parts) > 100
    for split in (digits.search, digits.report.unseal()):
        targets = torch.cat([target for _, target in split.batches(64)])
        counts = torch.bincount(targets, minlength=10)
        assert counts.max() - counts.min() <= 0.2 * counts.max()


def test_splits_follow_from_content_and_seed(digits: Data) -> None:
    again = load_data(make_config({"model": "cifar_resnet20", "data": "digits"}))
    other = load_data(make_config({"model": "cifar_resnet20", "data": "digits", "seed": 1}))
    assert again.fingerprint == digits.fingerprint != other.fingerprint
    assert _indices(again) == _indices(digits) != _indices(other)


@pytest.mark.parametrize("own_search", [False, True])
@pytest.mark.parametrize("own_report", [False, True])
def test_cut_keeps_limits_and_drops_nothing(own_search: bool, own_report: bool) -> None:
    targets = np.repeat(np.arange(5), 200)
    limits = Limits(search=50, report=70, calibration=30)
    parts = cut(targets, 1000, "ab" * 32, 0, limits, own_search=own_search, own_report=own_report)
    assert len(parts.search) == (0 if own_search else 50)
    assert len(parts.report) == (0 if own_report else 70)
    assert len(parts.calibration) == 30
    every = np.concatenate([parts.train, parts.calibration, parts.search, parts.report])
    assert sorted(every.tolist()) == list(range(1000))


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(UsageError, match="19 examples; at least 20"):
        cut(None, 19, "ab" * 32, 0, Limits())


def test_every_run_of_the_stratified_order_holds_each_class() -> None:
    targets = np.repeat(np.arange(4), [400, 200, 100, 100])
    order = stratified_order(targets, 800, "ab" * 32, 0)
    for start in range(0, 800, 80):
        counts = np.bincount(targets[order[start : start + 80]], minlength=4)
        assert np.abs(counts - [40, 20, 10, 10]).max() <= 1


def test_sealed_split_raises_until_unsealed(digits: Data) -> None:
    for read in (lambda: digits.report.batches(8), lambda: digits.report.training_batch(0, 8, 0)):
        with pytest.raises(UsageError, match="report split is sealed"):
            read()
    assert sum(len(target) for _, target in digits.report.unseal().batches(100)) == len(digits.report)


def test_batches_are_normalised_and_limited() -> None:
    split = _image_split(100)
    batches = list(split.batches(32, limit=70))
    assert [len(target) for _, target in batches] == [32, 32, 6]
    inputs = batches[0][0]
    pixels = inputs * torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) + torch.tensor(
        [0.485, 0.456, 0.406]
    ).view(1, 3, 1, 1)
    source = np.random.default_rng(0).integers(0, 256, (100, 3, 16, 16), dtype=np.uint8)
    assert torch.allclose(pixels * 255, torch.from_numpy(source[:32]).float(), atol=1e-2)


def test_training_batch_is_a_pure_function_and_leaves_global_chance_alone() -> None:
    split, again = _image_split(shift=2, flip=True), _image_split(shift=2, flip=True)
    state = torch.get_rng_state()
    first = split.training_batch(3, 16, seed=1)
    split.training_batch(9, 16, seed=1)
    for other in (split.training_batch(3, 16, seed=1), again.training_batch(3, 16, seed=1)):
        assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])
    assert not torch.equal(first[1], split.training_batch(3, 16, seed=2)[1])
    assert torch.equal(state, torch.get_rng_state())


def test_an_epoch_holds_every_example_once() -> None:
    split = _image_split(100)
    seen = torch.cat([split.training_batch(step, 32, 0)[1] for step in range(25)])
    for epoch in range(8):
        assert sorted(seen[epoch * 100 : epoch * 100 + 100].tolist()) == list(range(100))
    assert seen[:100].tolist() != seen[100:200].tolist()


def test_a_batch_may_be_larger_than_the_split() -> None:
    counts = torch.bincount(_image_split(10).training_batch(0, 25, 0)[1], minlength=10)
    assert counts.min() == 2 and counts.max() == 3


def test_augmentation_moves_and_mirrors_whole_images() -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (200, 3, 8, 8), dtype=np.uint8)
    result = augment(pixels.copy(), Preparation(shift=2, flip=True), np.random.default_rng(1))
    kinds = set()
    for image, moved in zip(pixels, result, strict=True):
        padded = {
            False: np.pad(image, ((0, 0), (2, 2), (2, 2))),
            True: np.pad(image[..., ::-1], ((0, 0), (2, 2), (2, 2))),
        }
        found = [
            (mirrored, dy, dx)
            for mirrored, big in padded.items()
            for dy in range(5)
            for dx in range(5)
            if np.array_equal(big[:, dy : dy + 8, dx : dx + 8], moved)
        ]
        assert len(found) == 1
        kinds.add(found[0])
    assert len(kinds) > 40  # of 50
    assert np.array_equal(augment(pixels.copy(), Preparation(), np.random.default_rng(1)), pixels)


def test_digits_are_never_mirrored(digits: Data) -> None:
    assert isinstance(digits.train, ImageSplit)
    assert not digits.train.preparation.flip and 0 < digits.train.preparation.shift <= 4


def test_training_batch_is_fast() -> None:
    pixels = np.zeros((2000, 3, 32, 32), np.uint8)
    split = ImageSplit(
        "train",
        ArraySource(pixels),
        np.arange(2000),
        np.zeros(2000, np.int64),
        Preparation(shift=4, flip=True),
        "ab" * 32,
    )
    times = []
    for step in range(20):
        begun_s = time.perf_counter()
        split.training_batch(step, 128, 0)
        times.append(time.perf_counter() - begun_s)
    assert min(times) < 0.002


class _Noisy(Dataset[tuple[Tensor, int]]):
    """Items with a random transform that draws from all three global generators."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(1).item() + random.random() + np.random.rand()  # noqa: NPY002
        return torch.full((3,), index + noise / 10), index % 3


def test_users_random_transforms_are_repeatable_and_vary() -> None:
    data = data_from_objects(_Noisy(), name="noisy", seed=0, limits=Limits())
    state = random.getstate()
    first, again, later = (data.train.training_batch(step, 8, 0)[0] for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert random.getstate() == state
    fractions = [set((batch % 1).flatten().tolist()) for batch in (first, later)]
    assert not fractions[0] & fractions[1]
    whole = [torch.cat([x for x, _ in data.search.batches(size)]) for size in (3, 5)]
    assert torch.equal(*whole)


@pytest.mark.parametrize("form", ["pair", "arrays", "dataset", "loader", "subset"])
def test_every_form_of_a_users_data_gives_the_same_examples(form: str) -> None:
    inputs, targets = torch.arange(300.0).view(100, 3), torch.arange(100) % 4
    pair = TensorDataset(inputs, targets)
    given: Any = {
        "pair": (inputs, targets),
        "arrays": (inputs.numpy().astype(np.float64), targets.numpy()),
        "dataset": pair,
        "loader": DataLoader(pair, batch_size=7),
        "subset": Subset(pair, range(100)),
    }[form]
    data = data_from_objects(given, name="given", seed=0, limits=Limits())
    assert data.input_shape == (3,) and data.classes == ("0", "1", "2", "3")
    rows = []
    for split in (data.train, data.calibration, data.search, data.report.unseal()):
        for batch, target in split.batches(8):
            assert batch.dtype == torch.float32
            assert torch.equal((batch[:, 0] / 3).long() % 4, target)
            rows += batch[:, 0].tolist()
    assert sorted(rows) == inputs[:, 0].tolist()


def test_own_parts_are_used_as_they_are() -> None:
    def part(start: int, count: int) -> tuple[Tensor, Tensor]:
        return torch.arange(start, start + count).float().view(-1, 1), torch.arange(count) % 2

    given = {
        "train": part(0, 50),
        "test": part(1000, 30),
        "search": part(2000, 20),
        "calibration": part(3000, 10),
    }
    data = data_from_objects(given, name="given", seed=0, limits=Limits())
    for split, start, count in ((data.train, 0, 50), (data.search, 2000, 20), (data.calibration, 3000, 10)):
        values = sorted(torch.cat([x for x, _ in split.batches(9)]).flatten().tolist())
        assert values == list(range(start, start + count))
    assert not data.search_from_train
    assert data_from_objects(
        (part(0, 50), part(1000, 30)), name="g", seed=0, limits=Limits()
    ).search_from_train


class _Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(10))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("text", "train data is a str; allowed: a torch Dataset"),
        (_Stream(), "train data is a _Stream; allowed"),
        ((1, 2, 3), "data holds 3 things"),
        ({"training": 1}, "data has the parts training; allowed: train"),
        ([], "data holds 0 things"),
        ((torch.zeros(30, 2), torch.zeros(29)), "30 inputs and 29 targets"),
        ([1.0] * 40, "data holds 40 things"),
        ({"train": [(torch.zeros(2), "cat")] * 40}, "does not make two tensors"),
        ({"train": [(torch.zeros(i), 0) for i in range(40)]}, "train data"),
        (
            (
                TensorDataset(torch.zeros(30, 2), torch.zeros(30)),
                TensorDataset(torch.zeros(9, 3), torch.zeros(9)),
            ),
            "shape",
        ),
    ],
)
def test_other_forms_are_refused_by_name(given: Any, message: str) -> None:
    def read() -> None:
        list(data_from_objects(given, name="given", seed=0, limits=Limits()).train.batches(64))

    with pytest.raises(UsageError, match=message):
        read()


def test_a_loader_s_sampler_decides_what_belongs_to_a_part() -> None:
    inputs, targets = torch.randn(200, 3, 4, 4), torch.arange(200) % 2
    inputs[:, 0, 0, 0] = torch.arange(200)
    whole = TensorDataset(inputs, targets)
    train = DataLoader(whole, batch_size=8, sampler=SubsetRandomSampler(range(150)))
    test = DataLoader(whole, batch_sampler=BatchSampler(SubsetRandomSampler(range(150, 200)), 8, False))
    data = data_from_objects((train, test), name="given", seed=0, limits=Limits(20, 1000, 20))

    def content(split: Split) -> set[int]:
        return {int(value) for x, _ in split.batches(64) for value in x[:, 0, 0, 0]}

    assert content(data.report.unseal()) == set(range(150, 200))
    assert content(data.train) | content(data.search) | content(data.calibration) == set(range(150))
    weighted = DataLoader(whole, sampler=WeightedRandomSampler([1.0] * 200, 10))
    with pytest.raises(UsageError, match=r"draws by a WeightedRandomSampler; allowed: SequentialSampler"):
        data_from_objects((weighted, test), name="given", seed=0, limits=Limits(20, 1000, 20))
