"""Volumes of results by axis, with and without caps."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.search.axes import Axes

OBJECTIVES = ("accuracy", "latency", "size")


def test_what_is_smaller_but_slower_than_the_dense_network_still_counts() -> None:
    axes = Axes(np.array([0.1, 1.0, 1.0]), OBJECTIVES)
    large, small, poor = np.array([[0.01, 0.6, 1.2], [0.01, 0.3, 1.2], [0.2, 0.3, 1.2]])
    gains = axes.gains(axes.scaled(np.stack([large, small, poor])))
    assert gains[1] > gains[0] > 0
    assert gains[2] == 0  # loses too much
    axes.take(np.stack([small]))
    assert axes.total > 0.5  # by size alone
    assert axes.on_front(np.stack([small])).all()


def test_what_exceeds_a_cap_has_no_volume() -> None:
    axes = Axes(np.array([0.1, 1.0, 0.8]), OBJECTIVES)
    slow, kept = np.array([[0.01, 0.3, 0.9], [0.01, 0.3, 0.8]])
    gains = axes.gains(axes.scaled(np.stack([slow, kept])))
    assert gains[0] == 0 < gains[1]


def test_each_cost_alone_has_a_volume_of_its_own() -> None:
    axes = Axes(np.array([0.1, 1.0, 1.0]), OBJECTIVES)
    axes.take(np.array([[0.01, 0.2, 0.2]]))
    alone = Axes(np.array([0.1, 1.0, 1.0]), ("accuracy", "size"))
    alone.take(np.array([[0.01, 0.2, 0.2]]))
    assert alone.total == pytest.approx(0.9 * 0.8)
    assert axes.total == pytest.approx(0.9 * 0.8 * 0.8 + 2 * 0.9 * 0.8)
