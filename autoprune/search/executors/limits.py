"""How long a request may take before it counts as hung: many times what others took, and never beyond the budget."""

from __future__ import annotations

import math
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable

from autoprune.search.executors.contract import Request

# Where the budget counts trials, and nothing of the kind has been done yet.
_LONGEST_S = 6 * 3600.0
_LEAST_S = 120.0
# A deeper network of a higher rung may train for several times as long as others did.
_TIMES = 20.0
# What a recovery needs besides its training.
_AROUND_S = 600.0
_ENOUGH = 3
# Of the budget that is left the first requests may take so much.
_FIRST_SHARE = 0.5


class RequestLimits:
    """Derives limits from the requests so far.

    Args:
        left_s: Returns the seconds of the budget that are left; None where it counts trials.
        given_s: What the user gave; None derives it.
    """

    def __init__(self, left_s: Callable[[], float | None], given_s: float | None = None) -> None:
        self._left_s = left_s
        self._given_s = given_s
        self._took_s: dict[str, list[float]] = defaultdict(list)
        self._lock = threading.Lock()

    def took(self, request: Request, seconds: float) -> None:
        """Take note of how long a request took."""
        with self._lock:
            self._took_s[request.kind].append(seconds)

    def of(self, request: Request) -> float:
        """Return the seconds that a request may take, from now on."""
        left_s = self._left_s()
        if request.kind == "recover":  # its training is as long as it was planned
            around_s = max(_AROUND_S, self._given_s or 0.0)
            return min(request.slot_s + around_s, math.inf if left_s is None else max(left_s, request.slot_s))
        if self._given_s is not None:
            return self._given_s
        with self._lock:
            recent = self._took_s[request.kind][-50:]
        if len(recent) >= _ENOUGH:
            limit_s = max(_LEAST_S, _TIMES * statistics.median(recent))
        else:
            limit_s = _LONGEST_S if left_s is None else max(_LEAST_S, _FIRST_SHARE * left_s)
        return limit_s if left_s is None else min(limit_s, max(left_s, 1.0))
