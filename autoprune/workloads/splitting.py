"""Which example goes into which split: disjoint, stratified, fixed by content and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoprune.errors import UsageError

Indices = NDArray[np.int64]

MIN_EXAMPLES = 20
_REPORT_SHARE = 0.2
_SEARCH_SHARE = 0.2
_CALIBRATION_SHARE = 0.1


@dataclass(frozen=True)
class Limits:
    """Most examples of the splits that need not be large.

    Attributes:
        search: Most examples to search on.
        report: Most examples to report on.
        calibration: Most examples to calibrate with.
    """

    search: int = 2000
    report: int = 10_000
    calibration: int = 512


@dataclass(frozen=True)
class Parts:
    """Indices of each split into the pool that it is cut from, each ``(n,)`` int64.

    The calibration images are cut from the training images and trained on by nobody, so that ranges and
    least squares are fitted on images that no network has been fitted to here.
    """

    train: Indices
    calibration: Indices
    search: Indices
    report: Indices


def content_hash(parts: Iterable[str | bytes]) -> str:
    """Return a hex SHA-256 over the parts, with their borders."""
    result = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        result.update(len(data).to_bytes(8, "little"))
        result.update(data)
    return result.hexdigest()


def generator(fingerprint: str, *numbers: int) -> np.random.Generator:
    """Return a random generator that depends on content and numbers alone."""
    return np.random.default_rng([int(fingerprint[:16], 16), *numbers])


def stratified_order(targets: Indices | None, count: int, fingerprint: str, seed: int) -> Indices:
    """Order examples so that every run of them holds each class in its share, to within one.

    Args:
        targets: Class of each example, ``(n,)``; None for targets that are no classes.
        count: Number of examples.
        fingerprint: Content hash.
        seed: Seed of the study.

    Returns:
        A permutation of ``range(count)``.
    """
    random = generator(fingerprint, seed, 1)
    order = random.permutation(count)
    if targets is None:
        return order
    place = np.empty(count)
    for value in np.unique(targets):
        members = order[targets[order] == value]
        place[members] = (np.arange(len(members)) + random.random()) / len(members)
    return order[np.argsort(place[order], kind="stable")]


def cut(
    targets: Indices | None,
    count: int,
    fingerprint: str,
    seed: int,
    limits: Limits,
    *,
    own_search: bool = False,
    own_report: bool = False,
) -> Parts:
    """Cut a pool of examples into splits.

    Args:
        targets: Class of each example, ``(n,)``; None for targets that are no classes.
        count: Number of examples.
        fingerprint: Content hash.
        seed: Seed of the study.
        limits: Most examples of each.
        own_search: The data has search examples of its own, so that none are cut here.
        own_report: The data has report examples of its own, so that none are cut here.

    Raises:
        UsageError: If there are fewer than 20 examples.
    """
    if count < MIN_EXAMPLES:
        raise UsageError(f"the training data has {count} examples; at least {MIN_EXAMPLES} are needed")
    order = stratified_order(targets, count, fingerprint, seed)
    report = 0 if own_report else min(limits.report, round(_REPORT_SHARE * count))
    search = 0 if own_search else min(limits.search, round(_SEARCH_SHARE * (count - report)))
    calibration = min(limits.calibration, max(2, round(_CALIBRATION_SHARE * (count - report))))
    ends = np.cumsum([report, search, calibration])
    return Parts(
        report=order[: ends[0]],
        search=order[ends[0] : ends[1]],
        calibration=order[ends[1] : ends[2]],
        train=order[ends[2] :],
    )


def select(targets: Indices | None, count: int, fingerprint: str, seed: int, limit: int) -> Indices:
    """Return a stratified selection of at most ``limit`` of the examples of a part."""
    return stratified_order(targets, count, fingerprint, seed)[:limit]
