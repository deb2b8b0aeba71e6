"""Which results go on: the hopeless do not, and no part of the costs is left out."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.search.promotion import are_hopeless, cover, uncovered


def test_only_what_is_beaten_everywhere_is_hopeless() -> None:
    trained = np.array([[0.02, 0.3, 0.4], [0.05, 0.2, 0.3]])
    hopeful = np.array([[0.03, 0.35, 0.45], [0.01, 0.35, 0.45], [0.06, 0.1, 0.45]])
    assert are_hopeless(hopeful, trained).tolist() == [True, False, False]
    assert not are_hopeless(np.array([[0.5, 0.5, 0.5]]), np.empty((0, 3))).any()
    assert are_hopeless(np.empty((0, 3)), trained).shape == (0,)


def front(count: int) -> np.ndarray:
    """Return a front whose costs fall by equal factors while what is lost grows by equal factors."""
    costs = 0.8 * 0.8 ** np.arange(count)
    return np.stack([np.geomspace(0.05, 0.9, count), costs, costs], axis=1)


def test_parts_are_filled_from_the_mildest_on_until_all_have_one() -> None:
    values = front(12)
    trained = [False] * 12
    chosen = []
    while (found := uncovered(values, trained, 4)) is not None:
        trained[found] = True
        chosen.append(found)
    assert [c // 3 for c in chosen] == [0, 1, 2, 3]


def two_axes() -> np.ndarray:
    """Return rows that are small and slow, and rows that are fast and large."""
    small, fast = front(6), front(6)
    small[:, 2] = 0.85
    fast[:, 1] = 0.85
    return np.concatenate([small, fast])


def test_every_axis_has_parts_of_its_own() -> None:
    values = two_axes()
    chosen = cover(values, 3)
    assert sorted(row // 6 for row in chosen) == [0, 0, 0, 1, 1, 1]
    # What is small does not cover what is fast.
    assert uncovered(values, [row < 6 for row in range(12)], 3) in range(6, 12)
    assert uncovered(values, [True] * 12, 3) is None


def test_a_network_that_lost_far_more_covers_nothing() -> None:
    good = front(4)
    bad = good.copy()
    bad[:, 0] = 0.95
    values = np.concatenate([good, bad])
    assert uncovered(values, [False] * 4 + [True] * 4, 2) in range(4)


@pytest.mark.parametrize("value", [[1.2, 0.5, 0.5], [0.0, 0.5, 0.5], [0.5, 1.5, 0.5]])
def test_what_has_no_volume_or_loses_nothing_fills_no_gap(value: list[float]) -> None:
    assert uncovered(np.array([value, [0.5, 0.4, 0.4]]), [False, False], 3) is None


def test_dominated_candidates_fill_no_gap() -> None:
    values = np.concatenate([front(6), front(6) + 0.05])
    assert uncovered(values, [True] * 6 + [False] * 6, 6) is None
    assert set(cover(values, 6)) == set(range(6))


def test_an_axis_is_cut_by_what_is_lost_where_that_can_be_trusted() -> None:
    costs = 0.9 - 0.02 * np.arange(16)
    lost = np.geomspace(0.06, 0.96, 16)
    values = np.stack([lost, costs, costs], axis=1)
    by_loss = values[cover(values, 4), 0]
    # From one part to the next about twice as much is lost.
    assert by_loss[1:] / by_loss[:-1] == pytest.approx([2.0] * 3, rel=0.25)
    steep = np.stack([np.linspace(0.06, 0.96, 16), costs, costs], axis=1)
    assert (np.sort(steep[cover(steep, 4), 0]) < 0.5).sum() > (
        np.sort(steep[cover(steep, 4, by_loss=False), 0]) < 0.5
    ).sum()


def test_of_losses_that_no_test_set_tells_apart_the_smallest_network_is_taken() -> None:
    values = np.array([[0.001, 0.9], [0.01, 0.7], [0.02, 0.5], [0.9, 0.1]])
    assert cover(values, 2) == [2, 3]


def test_a_row_that_goes_on_with_a_line_is_taken_before_one_a_little_better() -> None:
    values = np.array([[0.1, 0.8], [0.42, 0.5], [0.4, 0.5], [0.1, 0.9]])
    assert cover(values[:3], 2) == [0, 2]
    nested = np.zeros((3, 3), dtype=bool)
    nested[1, 0] = True
    assert cover(values[:3], 2, nested=nested) == [0, 1]
    values[1, 0] = 0.9  # too much worse
    assert cover(values[:3], 2, nested=nested)[-1] == 2


def test_a_large_network_that_loses_nothing_does_not_cover_a_small_one() -> None:
    values = np.array([[0.002, 0.27], [0.01, 0.2], [0.5, 0.1], [0.9, 0.05]])
    assert uncovered(values, [True, False, True, True], 4) == 1
    assert uncovered(values, [False, True, True, True], 4) is None
