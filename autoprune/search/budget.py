"""The budget contract: every phase fits into what the user gave, on the monotonic clock."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from autoprune.clock import Clock
from autoprune.config import Budget
from autoprune.measure.figures import FULL_RUN

# The report, its plot and the front's table are written after the last measurement.
CLOSING_S = 4.0
# Share of the budget that cold starts, throughput and energy of the final front may take.
_FIGURES_SHARE = 0.06


class Timekeeper:
    """Knows how much of the budget is spent and when each phase has to end.

    Args:
        budget: Time, or a number of trials.
        final_share: Share of the time kept for the final recovery and re-measurement, in ``(0, 0.95]``.
        clock: Source of monotonic time.
        spent_before_s: Seconds that earlier runs of the same study used.
        started_s: Monotonic reading at which this run began.
        divided_s: Seconds that were spent when an earlier budget ended; what goes beyond is divided anew.
    """

    def __init__(
        self,
        budget: Budget,
        final_share: float,
        clock: Clock,
        spent_before_s: float = 0.0,
        started_s: float | None = None,
        divided_s: float = 0.0,
    ) -> None:
        self._budget = budget
        self._final_share = final_share
        self._clock = clock
        self._spent_before_s = spent_before_s
        self._divided_s = divided_s
        self._started_s = clock.monotonic() if started_s is None else started_s
        self._final_from_s: float | None = None
        # Seconds of the final phase that the search got.
        self._granted_s = 0.0

    @property
    def run_s(self) -> float:
        """Seconds of this run."""
        return self._clock.monotonic() - self._started_s

    @property
    def spent_s(self) -> float:
        """Seconds spent on the study, earlier runs included."""
        return self._spent_before_s + self.run_s

    @property
    def left_s(self) -> float | None:
        """Seconds until everything has to be over; None where the budget counts trials."""
        return None if self._budget.seconds is None else self._budget.seconds - self.spent_s

    @property
    def final_s(self) -> float | None:
        """Seconds kept for the final phase at least; None where the budget counts trials."""
        if self._budget.seconds is None:
            return None
        return (self._budget.seconds - self._divided_s) * self._final_share - self._granted_s

    def search_left_s(self) -> float | None:
        """Return the seconds until proposals have to end; None where the budget counts trials."""
        if self._budget.seconds is None:
            return None
        added_s = self._budget.seconds - self._divided_s
        return self._divided_s + added_s * (1.0 - self._final_share) + self._granted_s - self.spent_s

    def wanted_s(self, share: float) -> float:
        """Return the seconds that the search lacks to have a share of the time that is left; 0 if it has that."""
        left_s, search_s = self.left_s, self.search_left_s()
        return 0.0 if left_s is None or search_s is None else max(0.0, share * left_s - search_s)

    def grant(self, seconds: float) -> None:
        """Give seconds of the final phase to the search."""
        self._granted_s += seconds

    def trials_left(self, proposals: int) -> int | None:
        """Return how many more proposals may be made; None where the budget counts time."""
        return None if self._budget.trials is None else self._budget.trials - proposals

    def figures_s(self, artifacts: int) -> float:
        """Return the seconds that each artifact of the final front gets for cold starts, throughput and energy.

        Args:
            artifacts: How many are measured.
        """
        if self._budget.seconds is None:
            return FULL_RUN.limit_s
        return min(FULL_RUN.limit_s, _FIGURES_SHARE * self._budget.seconds / max(1, artifacts))

    def begin_final(self) -> None:
        """Mark the start of the final phase, from which its length is derived under a budget of trials."""
        self._final_from_s = self.spent_s

    def training_left_s(self, reserve_s: float) -> float:
        """Return the seconds that the final recovery may still train for; negative if there are none.

        Under a budget of trials the final recovery gets ``final_share / (1 - final_share)`` of the time that
        came before it, so that both kinds of budget split alike; measuring then comes on top.

        Args:
            reserve_s: Seconds that measuring the final front takes.
        """
        if self._budget.seconds is not None:
            return self._budget.seconds - CLOSING_S - reserve_s - self.spent_s
        begun = self.spent_s if self._final_from_s is None else self._final_from_s
        share = self._final_share / (1.0 - self._final_share)
        return begun + (begun - self._divided_s) * share - self.spent_s

    def fits_search(self, durations_s: Sequence[float]) -> bool:
        """Return whether one more trial is expected to end before proposals have to.

        Args:
            durations_s: Durations of finished trials; the last eight are looked at.
        """
        left = self.search_left_s()
        return left is None or left >= expected_s(durations_s)

    def fits_at_all(self, durations_s: Sequence[float], reserve_s: float) -> bool:
        """Return whether one more trial is expected to end with ``reserve_s`` of the whole budget left."""
        left = self.left_s
        return left is None or left - reserve_s >= expected_s(durations_s)


def expected_s(durations_s: Sequence[float]) -> float:
    """Return a cautious guess of the next trial's seconds: 1.2 times the median of the last eight."""
    recent = list(durations_s)[-8:]
    return 1.2 * statistics.median(recent) if recent else 0.0
