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
    with pytest.raises(ValueError, match="of 4 objectives; 1, 2 or 3 are allowed"):
        hypervolume(np.zeros((1, 4)), np.ones(4))


def test_the_knee_is_the_bend() -> None:
    assert knee(np.array([[0.0, 1.0], [0.1, 0.2], [1.0, 0.0]])) == 1


def test_volumes_of_known_boxes() -> None:
    assert hypervolume(np.array([[0.25], [0.5]]), np.ones(1)) == pytest.approx(0.75)
    for axes in (1, 2, 3):
        assert hypervolume(np.empty((0, axes)), np.ones(axes)) == 0.0
        assert hypervolume(np.ones((2, axes)), np.ones(axes)) == 0.0
    # Two boxes that overlap: 0.6 x 0.5 + 0.5 x 0.7 - 0.5 x 0.5.
    assert hypervolume(np.array([[0.4, 0.5], [0.5, 0.3]]), np.ones(2)) == pytest.approx(0.4)
    # The same reference need not be the same in every axis.
    assert hypervolume(np.array([[1.0, 1.0, 1.0]]), np.array([2.0, 3.0, 5.0])) == pytest.approx(1 * 2 * 4)
    assert hypervolume(np.array([[1.0, 2.0]]), np.array([2.0, 5.0])) == pytest.approx(3.0)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rows_that_are_not_below_the_reference_or_not_finite_add_nothing(axes: int) -> None:
    good = np.full(axes, 0.5)
    for bad in (np.nan, -np.inf, 1.0, 2.0):
        worse = good.copy()
        worse[-1] = bad
        assert hypervolume(np.array([good, worse]), np.ones(axes)) == pytest.approx(0.5**axes)


def test_no_rows_have_no_front() -> None:
    assert non_dominated(np.empty((0, 2))).tolist() == []


def test_the_knee_is_of_scaled_axes_and_the_first_of_equals() -> None:
    # The second axis is a thousand times the first; the third says nothing.
    values = np.array([[0.0, 1000.0, 7.0], [0.4, 300.0, 7.0], [0.3, 600.0, 7.0], [1.0, 0.0, 7.0]])
    assert knee(values) == 1
    # Offsets of an axis change nothing.
    assert knee(values + np.array([100.0, -3000.0, 1.0])) == 1
    assert knee(np.array([[0.0, 1.0], [1.0, 0.0]])) == 0
    assert knee(np.array([[3.0, 3.0]])) == 0
