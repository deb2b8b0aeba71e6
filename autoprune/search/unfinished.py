"""What earlier runs of a study began and is still to be tried, and how often it may be. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from autoprune.search.baselines import Baseline, baselines, effective_key
from autoprune.search.executors.contract import CRASHED
from autoprune.search.jobs import Job, brief
from autoprune.space.groups import Groups
from autoprune.space.search_space import SearchSpace
from autoprune.study.records import TrialRecord
from autoprune.study.retries import CUT_OFF, MAX_RETRIES


class Unfinished:
    """Asks the records what a study lacks of what was to be tried in any case.

    Args:
        space: What may be tried.
        groups: Groups of the model.
        records: Returns the trials so far.
    """

    def __init__(
        self, space: SearchSpace, groups: Groups, records: Callable[[], Sequence[TrialRecord]]
    ) -> None:
        self._space = space
        self._groups = groups
        self._records = records

    def baselines(self) -> list[Baseline]:
        """Return the baselines that were not tried; one that ends its process is tried again a few times."""
        again = (*CUT_OFF, CRASHED)
        done = {
            r.label
            for r in self._records()
            if r.origin == "baseline" and r.state != "running" and r.failure_kind not in again
        }
        tries = Counter(
            r.label for r in self._records() if r.origin == "baseline" and r.failure_kind in again
        )
        space = self._space
        planned = baselines(
            self._groups,
            space.baselines.ratios,
            space.bits,
            space.criteria["conv"][0],
            space.width,
            space.default_recovery(),
            space.rankings[0],
            space.schedules.default(),
            space.orders[0],
            space.quantization.default(),
            space.activation_bits[0],
        )
        return [b for b in planned if b.label not in done and tries[b.label] <= MAX_RETRIES]

    def lost(self, is_sound: Callable[[int], bool]) -> list[Job]:
        """Return recipes that a killed or interrupted run left behind, each tried again at most twice.

        Args:
            is_sound: Whether a trial's artifact is there, to start from.
        """
        # One that failed by itself, or took worker after worker along, is not tried anew by every run.
        finished = {
            effective_key(r.recipe, self._groups)
            for r in self._records()
            if r.state != "running" and r.failure_kind not in CUT_OFF and r.recipe
        }
        tries = self._tries()
        found: dict[str, Job] = {}
        for record in self._records():
            if record.recipe is None or not _may_be_repeated(record):
                continue
            key = effective_key(record.recipe, self._groups)
            if key in finished or tries[key] > MAX_RETRIES:
                continue
            start = record.started_from
            recipe = record.recipe
            if start is not None and record.rung > 1 and not is_sound(start):
                # What was to be added to another training has to be trained whole.
                steps = self._space.rungs[record.rung].steps
                recipe = recipe.model_copy(update={"recovery": brief(self._space.default_recovery(), steps)})
            found[key] = Job(
                recipe,
                record.origin,
                record.label,
                record.rung,
                start if start is not None and is_sound(start) else None,
                record.screened,
                record.weights,
            )
        return list(found.values())

    def is_last_try(self, key: str) -> bool:
        """Return whether a recipe was cut off as often as it may be, by lost workers and killed drivers together."""
        return self._tries()[key] >= MAX_RETRIES

    def _tries(self) -> Counter[str]:
        """Return how often each recipe was cut off, by its key."""
        return Counter(
            effective_key(r.recipe, self._groups)
            for r in self._records()
            if r.failure_kind in CUT_OFF and r.recipe
        )


def _may_be_repeated(record: TrialRecord) -> bool:
    """Return whether a trial was cut off; baselines have their own count, and who screens looks at screens again."""
    is_screen = not (record.rung or record.round)
    return record.failure_kind in CUT_OFF and not is_screen and record.origin not in ("dense", "baseline")
