"""When a request counts as hung."""

from __future__ import annotations

import pytest

from autoprune.search.executors.contract import Request
from autoprune.search.executors.limits import RequestLimits
from autoprune.space.recipe import Recipe

TRIAL = Request(0, "trial", "trial 1", Recipe())
SCREEN = Request(1, "screen", "screen", Recipe())


@pytest.mark.parametrize(
    ("left_s", "took_s", "limit_s"),
    [
        (None, [], 6 * 3600.0),
        (1000.0, [], 500.0),
        (100.0, [], 100.0),
        (1000.0, [10.0, 20.0], 500.0),  # too few to judge by
        (1e6, [10.0, 20.0, 90.0], 400.0),
        (1e6, [1.0, 1.0, 1.0], 120.0),
        (50.0, [1.0, 1.0, 1.0], 50.0),
        (-5.0, [1.0, 1.0, 1.0], 1.0),
    ],
)
def test_twenty_times_what_others_took_within_the_budget(
    left_s: float | None, took_s: list[float], limit_s: float
) -> None:
    limits = RequestLimits(lambda: left_s)
    for seconds in took_s:
        limits.took(TRIAL, seconds)
    assert limits.of(TRIAL) == limit_s


def test_each_kind_of_request_is_judged_by_its_own() -> None:
    limits = RequestLimits(lambda: None)
    for _ in range(3):
        limits.took(TRIAL, 100.0)
        limits.took(SCREEN, 1.0)
    assert (limits.of(TRIAL), limits.of(SCREEN)) == (2000.0, 120.0)
    assert limits.of(Request(2, "recover", "r", Recipe(), slot_s=500.0)) == 1100.0


def test_what_the_user_gave_holds() -> None:
    limits = RequestLimits(lambda: None, 77.0)
    assert limits.of(TRIAL) == 77.0
    assert limits.of(Request(2, "recover", "r", Recipe(), slot_s=500.0)) == 1100.0
