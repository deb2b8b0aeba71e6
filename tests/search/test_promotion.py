"""Which results go on: the hopeless do not, and no part of the costs is left out."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.search.promotion import is_hopeless, uncovered


def test_only_what_is_beaten_everywhere_is_hopeless() -> None:
    trained = np.array([[0.02, 0.3, 0.4], [0.05, 0.2, 0.3]])
    assert is_hopeless(np.array([0.03, 0.35, 0.45]), trained)
    assert not is_hopeless(np.array([0.01, 0.35, 0.45]), trained)
    assert not is_hopeless(np.array([0.06, 0.1, 0.45]), trained)
    assert not is_hopeless(np.array([0.5, 0.5, 0.5]), np.empty((0, 3)))


def front(count: int) -> np.ndarray:
    """Return a front whose costs fall by equal factors while more is lost."""
    costs = 0.8 * 0.8 ** np.arange(count)
    return np.stack([np.linspace(0.05, 0.9, count), costs, costs], axis=1)


def test_parts_are_filled_from_the_mildest_on_until_all_have_one() -> None:
    values = front(12)
    trained = [False] * 12
    chosen = []
    while (found := uncovered(values, trained, 4)) is not None:
        trained[found] = True
        chosen.append(found)
    assert len(chosen) == 4
    assert [c // 3 for c in chosen] == [0, 1, 2, 3]


def test_of_one_part_the_candidate_that_adds_most_is_taken() -> None:
    values = np.array([[0.05, 0.8, 0.8], [0.9, 0.1, 0.1], [0.6, 0.12, 0.105]])
    assert uncovered(values, [True, False, False], 2) == 2


@pytest.mark.parametrize("value", [[1.2, 0.5, 0.5], [0.0, 0.5, 0.5], [0.5, 1.5, 0.5]])
def test_what_has_no_volume_or_loses_nothing_fills_no_gap(value: list[float]) -> None:
    assert uncovered(np.array([value, [0.5, 0.4, 0.4]]), [False, False], 3) is None


def test_dominated_candidates_fill_no_gap() -> None:
    values = np.concatenate([front(6), front(6) + 0.05])
    assert uncovered(values, [True] * 6 + [False] * 6, 6) is None
