"""Fronts and volumes against closed forms and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autoprune.study.pareto import hypervolume, knee, non_dominated

VALUES = arrays(
    np.float64, st.tuples(st.integers(1, 12), st.integers(2, 3)), elements=st.integers(0, 5).map(float)
)


def dominated_by_brute_force(values: np.ndarray, index: int) -> bool:
    own = values[index]
    return any((row <= own).all() and (row < own).any() for row in values)


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_the_front_is_what_brute_force_says(values: np.ndarray) -> None:
    expected = [not dominated_by_brute_force(values, i) for i in range(len(values))]
    assert non_dominated(values).tolist() == expected


def test_rows_that_are_not_finite_are_never_on_the_front() -> None:
    values = np.array([[np.nan, 0.0], [-np.inf, 0.0], [np.inf, 0.0], [1.0, 1.0]])
    assert non_dominated(values).tolist() == [False, False, False, True]


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_the_volume_is_the_count_of_unit_cells(values: np.ndarray) -> None:
    reference = np.full(values.shape[1], 6.0)
    cells = np.stack(np.meshgrid(*[np.arange(6)] * values.shape[1]), axis=-1).reshape(-1, values.shape[1])
    covered = sum(bool((values <= cell).all(axis=1).any()) for cell in cells)
    assert hypervolume(values, reference) == pytest.approx(covered)


def test_a_point_beyond_the_reference_adds_nothing() -> None:
    assert hypervolume(np.array([[2.0, 0.0]]), np.ones(2)) == 0.0
    assert hypervolume(np.array([[0.5, 0.5], [2.0, 0.0]]), np.ones(2)) == pytest.approx(0.25)


def test_a_volume_of_four_objectives_is_refused() -> None:
    with pytest.raises(ValueError, match="4 objectives"):
        hypervolume(np.zeros((1, 4)), np.ones(4))


def test_the_knee_is_the_bend() -> None:
    assert knee(np.array([[0.0, 1.0], [0.1, 0.2], [1.0, 0.0]])) == 1
