"""Outlook: what the records so far let expect of the final recovery, and which networks it would train."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from autoprune.measure.record import Measurement
from autoprune.search.bench import Bench
from autoprune.search.budget import Timekeeper
from autoprune.search.fidelity import (
    INHERITED,
    SEEN_SPLIT,
    Step,
    final_left,
    left_by_rung,
    steps_between_rungs,
)
from autoprune.search.lineage import prunes_further
from autoprune.search.selection import choose_networks
from autoprune.search.severity import severity, volume_ends
from autoprune.search.volume import Volume, counted_axes
from autoprune.space.search_space import SearchSpace
from autoprune.study.artifacts import kept_numbers
from autoprune.study.records import TrialRecord
from autoprune.study.retries import CUT_OFF
from autoprune.study.store import StudyStore

# Up to so many trials everything is looked at after each one.
_EVERY = 200


class Outlook:
    """Looks from the records so far to the end of the study.

    Args:
        store: The study's record.
        space: What may be tried.
        bench: What the trials share.
        keeper: The budget.
        records: Returns the trials so far.
    """

    def __init__(
        self,
        store: StudyStore,
        space: SearchSpace,
        bench: Bench,
        keeper: Timekeeper,
        records: Callable[[], Sequence[TrialRecord]],
    ) -> None:
        self.store = store
        self.space = space
        self.bench = bench
        self.keeper = keeper
        self._records = records
        self._steps: list[Step] = []
        self._steps_by = -1
        self._looked_at: Sequence[TrialRecord] | None = None
        self._seen: str | None = None

    def dense_record(self) -> TrialRecord | None:
        """Return the dense network's trial; None before it was measured."""
        found = (
            r
            for r in self._records()
            if r.origin == "dense" and r.state == "complete" and r.fidelity == "search"
        )
        return next(found, None)

    def dense_measurement(self) -> Measurement:
        """Return what was measured of the dense network.

        Raises:
            RuntimeError: Before trial 0.
        """
        record = self.dense_record()
        if record is None or record.measurement is None:
            raise RuntimeError("the dense network is measured first")
        return record.measurement

    def networks(self, most: int, *, covering: bool = True) -> list[list[TrialRecord]]:
        """Return the networks that the final recovery would train now; see :func:`choose_networks`."""
        records = self._records()
        kept = kept_numbers(self.store.paths) & {r.number for r in self._within_limits()}
        auto = self.store.sampler_name == "auto"
        return choose_networks(
            records,
            self.bench.groups,
            self.store.objectives,
            most,
            kept,
            self.left_by_rung() if auto else None,
            self.bench.config.limits.min_accuracy if auto else None,
            covering=covering,
        )

    def expected_volume(
        self,
        networks: Sequence[Sequence[TrialRecord]],
        slot_s: float,
        known_s: Mapping[int, float] | None = None,
    ) -> float:
        """Return the hypervolume that the final front is expected to have.

        Args:
            networks: Networks to be trained, from the mildest on; the first trial of each leads it.
            slot_s: Seconds of training for each.
            known_s: Seconds for some of them, by the number of the leading trial: those that are trained already.
        """
        dense = self.dense_measurement()
        step_s = max(self.bench.timings.step_s(), 1e-9)
        seen = SEEN_SPLIT if self._is_seen else 1.0
        ends = volume_ends(dense, self.bench.config.limits)
        rows = [
            self._row(r.measurement, dense, seen)
            for r in self._records()
            if r.is_measured_search and r.measurement is not None and r.recipe and not r.recipe.prunes
        ]
        lines: list[tuple[dict[str, int], float]] = []
        for leader in (members[0] for members in networks):
            if leader.recipe is None or leader.measurement is None:
                continue
            counts = leader.recipe.kept_counts(self.bench.groups)
            before = [steps for parent, steps in lines if prunes_further(counts, parent)]
            taken = self.space.rungs[min(leader.rung, len(self.space.rungs) - 1)].steps
            before = before if self.bench.config.has_lineage else []
            own_s = (known_s or {}).get(leader.number, slot_s)
            steps = own_s / step_s + max([taken, *(INHERITED * each for each in before)])
            lines.append((counts, steps))
            left = final_left(steps, taken) if taken and self.space.trains else 1.0
            rows.append(self._row(leader.measurement, dense, seen * left))
        return Volume(np.array(rows) / ends * counted_axes(self.store.objectives)).total

    @staticmethod
    def _row(measurement: Measurement, dense: Measurement, left: float) -> list[float]:
        lost = severity(max(0.0, dense.search.value - measurement.search.value), dense.search.value)
        return [lost * left, measurement.size_ratio, measurement.latency.ratio]

    @property
    def _is_seen(self) -> bool:
        """Whether the dense network may have been trained on the search split."""
        # Noted before the first trial, and asked for at every proposal.
        if self._seen is None:
            self._seen = self.store.notes().get("search_split_seen", "no")
        return self._seen == "yes"

    def left_by_rung(self, records: Sequence[TrialRecord] | None = None) -> dict[int, float]:
        """Return the share of each rung's loss that is expected to be left in the end; see :meth:`steps`."""
        final = final_left(self._final_steps(), self.space.rungs[-1].steps)
        return left_by_rung(self.steps(records), final=final, seen=self._is_seen, trains=self.space.trains)

    def steps(self, records: Sequence[TrialRecord] | None = None) -> list[Step]:
        """Return how each rung's results relate to the next one's so far.

        In large studies that is looked at anew after several trials: by a number that depends on the finished ones
        alone, so that a resumed search sees what one sees that was not interrupted.

        Args:
            records: The trials up to some moment, from the first on; all of them if not given.
        """
        known = self._records() if records is None else records
        if known is self._looked_at:  # each look at the records makes a list of its own
            return self._steps
        self._looked_at = known
        finished = [r for r in known if r.state != "running" and r.failure_kind not in CUT_OFF]
        count = len(finished) - len(finished) % (1 + len(finished) // _EVERY)
        if count != self._steps_by:
            self._steps_by = count
            self._steps = steps_between_rungs(finished[:count], len(self.space.rungs))
        return self._steps

    def _within_limits(self) -> Sequence[TrialRecord]:
        """Return the trials that keep the user's limits of size and latency; all of them where none does."""
        limits = self.bench.config.limits
        dense = self.dense_record()
        dense_ms = dense.measurement.latency.latency_ms if dense and dense.measurement else 0.0
        size, latency = limits.max_size_mb or math.inf, limits.max_latency_ms or math.inf
        if math.isinf(size) and math.isinf(latency):
            return [r for r in self._records() if r.measurement is not None]
        within = [
            r
            for r in self._records()
            if r.measurement is not None
            and r.measurement.size_bytes <= size * 1e6
            and r.measurement.latency.ratio * dense_ms <= latency
        ]
        return within if any(r.is_trained for r in within) else self._records()

    def _final_steps(self) -> float | None:
        """Return the steps that a network of the final recovery may count on; None before the first training."""
        step_s = self.bench.timings.step_s()
        final_s = self.keeper.final_s
        if final_s is None or step_s <= 0:
            return None
        config = self.bench.config
        count = max(1, config.most_networks)
        inherited = INHERITED if config.has_lineage else 0.0
        # The mean over a line of so many networks, each with its own share and what it inherits from the one before.
        lines = [(1 - inherited**place) / (1 - inherited) for place in range(1, count + 1)]
        return sum(lines) / count * final_s / count / step_s
