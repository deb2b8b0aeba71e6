"""Hypervolume gains against the exact hypervolume."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.search.volume import Volume, pick_greedily, rank_correlation
from autoprune.study.pareto import hypervolume


@pytest.mark.parametrize("seed", range(5))
def test_total_and_gains_are_those_of_the_exact_hypervolume(seed: int) -> None:
    rng = np.random.default_rng(seed)
    known, candidates = rng.uniform(0, 1.2, (20, 3)), rng.uniform(0, 1.2, (15, 3))
    volume = Volume(known)
    reference = np.ones(3)
    before = hypervolume(known, reference)
    assert volume.total == pytest.approx(before)
    wanted = [hypervolume(np.vstack([known, c]), reference) - before for c in candidates]
    assert volume.gains(candidates) == pytest.approx(np.array(wanted), abs=1e-12)


def test_two_objectives_are_three_of_which_one_is_zero() -> None:
    rng = np.random.default_rng(0)
    flat = rng.uniform(0, 1, (10, 2))
    assert Volume(np.column_stack([flat, np.zeros(10)])).total == pytest.approx(hypervolume(flat, np.ones(2)))


def test_nothing_known_has_no_volume_and_a_better_point_than_dense_counts_as_zero_lost() -> None:
    assert Volume(np.empty((0, 3))).total == 0.0
    assert Volume(np.array([[-0.5, 0.5, 0.5]])).total == pytest.approx(0.25)
    assert Volume(np.array([[0.5, 1.0, 0.5]])).total == 0.0


def test_greedy_choice_takes_the_best_together_and_leaves_what_adds_nothing() -> None:
    candidates = np.array([[0.5, 0.5, 0.5], [0.5, 0.5, 0.51], [0.1, 0.9, 0.9], [0.6, 0.6, 0.6]])
    assert pick_greedily(np.empty((0, 3)), candidates, 4) == [0, 2]
    assert pick_greedily(candidates[:1], candidates, 1) == [2]


def test_rank_correlation_needs_four_pairs_that_differ() -> None:
    assert np.isnan(rank_correlation([1, 2, 3], [1, 2, 3]))
    assert np.isnan(rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]))
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 90]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
