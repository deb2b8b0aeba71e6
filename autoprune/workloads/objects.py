"""A user's own data: torch data sets, loaders or pairs of tensors, cut into splits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from autoprune.errors import UsageError
from autoprune.workloads.images import MEMORY_LIMIT
from autoprune.workloads.splits import Batch, Data, Epochs, SealedSplit
from autoprune.workloads.splitting import Limits, content_hash, cut, select

ALLOWED = "a torch Dataset, a DataLoader or a pair of tensors (inputs, targets)"
_PARTS = ("train", "test", "search", "calibration")
_HASHED_ITEMS = 32
_HASHED_BYTES = 64_000_000


class Examples:
    """Examples of one part of a user's data, read without leaving a trace in the random generators.

    Args:
        given: A torch ``Dataset``, a ``DataLoader``, or a pair of tensors.
        part: Name of the part, for messages.

    Raises:
        UsageError: If it is something else, is empty, or its items are not pairs of tensors.
    """

    def __init__(self, given: Any, part: str) -> None:
        self.part = part
        collate: Callable[[list[Any]], Any] = default_collate
        if isinstance(given, DataLoader):
            collate = given.collate_fn if given.batch_sampler is not None else default_collate
            given = _sampled(given, part)
        if _is_pair(given):
            inputs, targets = (torch.as_tensor(value) for value in given)
            if len(inputs) != len(targets):
                raise UsageError(f"{part} data has {len(inputs)} inputs and {len(targets)} targets")
            given = TensorDataset(inputs, targets)
        indexed = hasattr(given, "__getitem__") and hasattr(given, "__len__")
        if isinstance(given, IterableDataset | str | bytes) or not indexed:
            raise UsageError(
                f"{part} data is a {type(given).__name__}; allowed: {ALLOWED}, with a length and an index"
            )
        if len(given) == 0:
            raise UsageError(f"{part} data is empty")
        self.dataset: Any = given
        self._collate = collate
        self.targets = _known_targets(given)
        inputs, _ = self.read(np.zeros(1, np.int64), 0)
        self.input_shape = tuple(inputs.shape[1:])
        self.example_bytes = inputs.numel() * inputs.element_size()
        self.fingerprint = self._hash()

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.dataset)

    def read(self, indices: NDArray[np.int64], seed: int) -> Batch:
        """Return the examples at ``indices`` as inputs and targets; random transforms draw from ``seed``."""
        if isinstance(self.dataset, TensorDataset) and len(self.dataset.tensors) == 2:
            chosen = torch.from_numpy(indices)
            inputs, targets = (tensor[chosen] for tensor in self.dataset.tensors)
            return _as_float(inputs), targets
        with _isolated_random():
            items = []
            for index in indices.tolist():
                _seed_all((seed * 1_000_003 + index) % 2**32)
                try:
                    items.append(self.dataset[index])
                except Exception as error:  # a user's data set may raise anything; the item is named
                    reason = f"{type(error).__name__}: {error}"
                    raise UsageError(f"item {index} of the {self.part} data raised {reason}") from error
            try:
                batch = self._collate(items)
            except (RuntimeError, TypeError, ValueError) as error:
                raise UsageError(f"items of the {self.part} data do not make a batch: {error}") from error
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        if not pair or not all(isinstance(value, Tensor) for value in batch):
            raise UsageError(
                f"an item of the {self.part} data is a {type(items[0]).__name__} that does not make two tensors; "
                "allowed: a pair (input tensor, target)",
                "images: transform them to tensors, for example with torchvision.transforms.ToTensor()",
            )
        return _as_float(batch[0]), batch[1]

    def _hash(self) -> str:
        if isinstance(self.dataset, TensorDataset):
            return content_hash(part for tensor in self.dataset.tensors for part in _tensor_parts(tensor))
        chosen = np.unique(np.linspace(0, len(self) - 1, min(len(self), _HASHED_ITEMS)).astype(np.int64))
        content: list[str | bytes] = [
            str(len(self)),
            self.targets.tobytes() if self.targets is not None else b"",
        ]
        for index in chosen:
            for value in self.read(np.array([index]), 0):
                content.extend(_tensor_parts(value))
        return content_hash(content)


def _sampled(loader: DataLoader[Any], part: str) -> Any:
    """Return the examples that a loader draws from: all of its data set, or the subset that its sampler names."""
    sampler = loader.sampler if loader.batch_size is not None else None
    if loader.batch_size is None and type(loader.batch_sampler) is BatchSampler:
        sampler = loader.batch_sampler.sampler
    if isinstance(sampler, SubsetRandomSampler):
        return Subset(loader.dataset, sorted(int(index) for index in sampler.indices))
    if isinstance(sampler, SequentialSampler | RandomSampler) or isinstance(loader.dataset, IterableDataset):
        return loader.dataset
    found = sampler if sampler is not None else loader.batch_sampler
    raise UsageError(
        f"the loader of the {part} data draws by a {type(found).__name__}; "
        "allowed: SequentialSampler, RandomSampler, SubsetRandomSampler",
        "give the data set itself, or a torch.utils.data.Subset of it",
    )


def _is_pair(given: Any) -> bool:
    return (
        isinstance(given, tuple | list)
        and len(given) == 2
        and all(isinstance(value, Tensor | np.ndarray) for value in given)
    )


def _as_float(inputs: Tensor) -> Tensor:
    return inputs.float() if inputs.is_floating_point() else inputs


def _tensor_parts(tensor: Tensor) -> Iterator[str | bytes]:
    """Yield what identifies a tensor: its form, and its bytes or, of a large one, those of a part of its rows."""
    yield f"{tuple(tensor.shape)} {tensor.dtype}"
    size = tensor.numel() * tensor.element_size()
    rows = tensor[:: max(1, size // _HASHED_BYTES)] if tensor.ndim else tensor
    yield rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _known_targets(dataset: Any) -> NDArray[np.int64] | None:
    """Return the classes of all examples where they are known without reading every item."""
    if isinstance(dataset, Subset):
        inner = _known_targets(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices, np.int64)]
    targets = dataset.tensors[1] if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2 else None
    targets = getattr(dataset, "targets", None) if targets is None else targets
    if targets is None:
        return None
    values = np.asarray(targets)
    whole = values.ndim == 1 and len(values) == len(dataset) and np.issubdtype(values.dtype, np.integer)
    return values.astype(np.int64) if whole and values.min() >= 0 else None


@contextmanager
def _isolated_random() -> Iterator[None]:
    """Put the global random generators back afterwards."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - what users' transforms draw from
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


def _seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


class DatasetSplit:
    """A split of a user's data, whose inputs are ready for the model; nothing is added to them.

    Random transforms of the data set stay random from step to step, and alike from run to run.

    Args:
        name: Name of the split.
        examples: Where the examples are.
        indices: The split's examples, ``(n,)``.
    """

    def __init__(self, name: str, examples: Examples, indices: NDArray[np.int64]) -> None:
        self.name = name
        self.indices = indices
        self.fingerprint = content_hash([examples.fingerprint, indices.tobytes()])
        self._examples = examples
        self._epochs = Epochs(len(indices), self.fingerprint)
        self._kept: Batch | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leave out what is kept of the examples: another process reads them again."""
        return {**self.__dict__, "_kept": None}

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.indices)

    def batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield inputs and targets in a fixed order; see :class:`autoprune.workloads.splits.Split`."""
        count = len(self) if limit is None else min(limit, len(self))
        # What is read whole is read again on every trial, so it is kept where it fits.
        fits = len(self) * self._examples.example_bytes <= MEMORY_LIMIT
        if self._kept is None and fits and 2 * count >= len(self):
            self._kept = self._examples.read(self.indices, 0)
        for start in range(0, count, size):
            end = min(start + size, count)
            if self._kept is not None:
                yield self._kept[0][start:end].clone(), self._kept[1][start:end].clone()
            else:
                yield self._examples.read(self.indices[start:end], 0)

    def training_batch(self, step: int, size: int, seed: int) -> Batch:
        """Return the batch of one step; see :class:`autoprune.workloads.splits.Split`."""
        chosen = self.indices[self._epochs.positions(step, size, seed)]
        return self._examples.read(chosen, 1 + step + 7919 * seed)


def data_from_objects(given: Any, *, name: str, seed: int, limits: Limits) -> Data:
    """Cut a user's own data into splits.

    Args:
        given: ``(train, test)``, a mapping with ``train`` and optionally ``test``, ``search`` and ``calibration``,
            or one data set that is split; each a torch ``Dataset``, a ``DataLoader`` or a pair of tensors.
        name: What the data is called.
        seed: Seed of the splits.
        limits: Most examples of the splits.

    Raises:
        UsageError: If the data has another form or holds too few examples.
    """
    parts = {part: Examples(value, part) for part, value in _parts(given).items()}
    pool = parts["train"]
    for part, examples in parts.items():
        if examples.input_shape != pool.input_shape:
            raise UsageError(
                f"{part} data has inputs of shape {examples.input_shape}, train data {pool.input_shape}"
            )
    indices = cut(
        pool.targets,
        len(pool),
        pool.fingerprint,
        seed,
        limits,
        own_search="search" in parts,
        own_report="test" in parts,
    )

    def own(part: str, source: str, limit: int) -> DatasetSplit:
        examples = parts[source]
        chosen = select(examples.targets, len(examples), examples.fingerprint, seed, limit)
        return DatasetSplit(part, examples, chosen)

    training = indices.train
    if "calibration" in parts:
        calibration = own("calibration", "calibration", limits.calibration)
        training = np.concatenate([indices.train, indices.calibration])
    else:
        calibration = DatasetSplit("calibration", pool, indices.calibration)
    train = DatasetSplit("train", pool, training)
    search, report = (
        DatasetSplit("search", pool, indices.search),
        DatasetSplit("report", pool, indices.report),
    )
    if "search" in parts:
        search = own("search", "search", limits.search)
    if "test" in parts:
        report = own("report", "test", limits.report)
    return Data(
        name=name,
        train=train,
        calibration=calibration,
        search=search,
        report=SealedSplit(report),
        input_shape=pool.input_shape,
        classes=_class_names(pool),
        fingerprint=content_hash([s.fingerprint for s in (train, calibration, search, report)]),
        search_from_train="search" not in parts,
    )


def _parts(given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        unknown = [str(key) for key in given if key not in _PARTS]
        if unknown or "train" not in given:
            raise UsageError(
                f"data has the parts {', '.join(map(str, given)) or 'none'}; "
                f"allowed: train, and any of {', '.join(_PARTS[1:])}"
            )
        return {part: given[part] for part in _PARTS if given.get(part) is not None}
    if isinstance(given, tuple | list) and not _is_pair(given):
        if len(given) != 2:
            raise UsageError(f"data holds {len(given)} things; allowed: (train, test), each {ALLOWED}")
        return {"train": given[0], "test": given[1]}
    return {"train": given}


def _class_names(examples: Examples) -> tuple[str, ...]:
    count = 0 if examples.targets is None else int(examples.targets.max()) + 1
    named: Sequence[Any] | None = getattr(examples.dataset, "classes", None)
    if isinstance(named, Sequence) and not isinstance(named, str) and len(named) >= max(count, 1):
        return tuple(str(value) for value in named)
    return tuple(str(index) for index in range(count))
