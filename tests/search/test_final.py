"""How many networks the final phase trains."""

from __future__ import annotations

from autoprune.search.final import Networks, choose_number
from autoprune.study.records import TrialRecord


def networks(count: int) -> Networks:
    return [[TrialRecord(number=number, state="complete")] for number in range(count)]


def test_of_numbers_that_promise_about_the_same_the_largest_is_taken() -> None:
    assert len(choose_number([(0.235, networks(3)), (0.24, networks(2)), (0.1, networks(1))], [])) == 3
    assert len(choose_number([(0.2, networks(3)), (0.24, networks(2)), (0.235, networks(1))], [])) == 2
    assert choose_number([], []) == []


def test_a_choice_that_covers_nothing_is_taken_where_it_promises_clearly_more() -> None:
    covering = [(0.195, networks(3)), (0.2, networks(2))]
    assert len(choose_number(covering, [(0.21, networks(1))])) == 3
    assert len(choose_number(covering, [(0.23, networks(1)), (0.1, networks(4))])) == 1
    assert len(choose_number([], [(0.01, networks(1))])) == 1
