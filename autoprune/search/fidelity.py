"""Fidelity: what results of a cheap rung tell about the next one, and so how many are promoted. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoprune.search.severity import severity
from autoprune.search.volume import rank_correlation
from autoprune.study.records import TrialRecord

# Until results say more: a rung takes back this share of what the rung before had lost, counted as two results.
_USUAL_KEPT = 0.65
_USUAL_WEIGHT = 2.0
# What the final recovery is taken to leave of what the last rung lost, where its length is not known yet.
FINAL_LEFT = 0.5
# The loss that is left falls with a power of the steps; fitted, with what is below, to 95 recoveries of a ResNet-20
# from 300 to 6,000 steps.
_DECAY = 0.4
# A step that the network behind took before the cut is worth this share of a step after it. From one chain of uniform
# cuts of a ResNet-20: 4,000 steps behind it and 2,500 own left what 4,350 own would have, by the power above.
INHERITED = 0.45
# Cuts lose about twice as much on images that the dense network was trained on as on new ones.
SEEN_SPLIT = 0.6
# Shares of a rung's results that the next one gets: with ranks that agree perfectly, and not at all.
_PROMOTED = (0.08, 0.5)
_PROMOTED_AT_FIRST = 0.15
# The most hopeful of the networks so far decides what a candidate may still come to.
_HOPEFUL = 0.1


@dataclass(frozen=True)
class Step:
    """How one rung's results relate to the next one's, over the recipes that have both.

    Attributes:
        pairs: Recipes that have both.
        correlation: Spearman's rank correlation of what was lost; NaN below four pairs.
        seen_loss: Median share of the loss that was left after the next rung; NaN if there was none to lose.
        kept_loss: Share of the severity that is expected to be left of the next recipe's: few results count little
            against the usual.
        hopeful_loss: The same for the most hopeful tenth, the lower bound that decides who is hopeless.
    """

    pairs: int
    correlation: float
    seen_loss: float
    kept_loss: float
    hopeful_loss: float

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float], dense: float) -> Step:
        """Relate capability lost at one rung to that at the next, of the same recipes in the same order.

        Args:
            before: Capability lost at a rung.
            after: The same at the next.
            dense: Capability of the dense network.
        """
        plain = _shares(before, after)
        shares = _shares([severity(x, dense) for x in before], [severity(x, dense) for x in after])
        known = len(shares)
        seen = float(np.median(plain)) if plain else math.nan
        weight = known / (known + _USUAL_WEIGHT)
        kept = weight * float(np.median(shares)) + (1 - weight) * _USUAL_KEPT if shares else _USUAL_KEPT
        hopeful = float(np.quantile(shares, _HOPEFUL)) if known >= 4 else 0.0
        return cls(len(before), rank_correlation(before, after), seen, kept, min(hopeful, kept))

    @property
    def promoted_share(self) -> float:
        """Share of a rung's results that go on to the next: the fewer, the better ranks agree."""
        if math.isnan(self.correlation):
            return _PROMOTED_AT_FIRST
        few, many = _PROMOTED
        return many - (many - few) * float(np.clip(self.correlation, 0.0, 1.0))


def _shares(before: Sequence[float], after: Sequence[float]) -> list[float]:
    pairs = zip(before, after, strict=True)
    return [float(np.clip(max(late, 0.0) / early, 0.0, 1.5)) for early, late in pairs if early > 0]


def steps_between_rungs(records: Sequence[TrialRecord], rungs: int) -> list[Step]:
    """Return how each rung relates to the next one, from the screen (rung 0) on.

    Args:
        records: Trials of the study.
        rungs: Number of rungs, the screen included.
    """
    dense = next((r.measurement for r in records if r.origin == "dense" and r.measurement), None)
    best = dense.search.value if dense is not None else 0.0
    trained = {(r.rung, r.cuts): r for r in records if r.is_trained and r.measurement is not None}
    before: list[list[float]] = [[] for _ in range(rungs - 1)]
    after: list[list[float]] = [[] for _ in range(rungs - 1)]
    for record in records:
        if not record.is_measured_search or record.measurement is None or not 1 <= record.rung < rungs:
            continue
        lost = best - record.measurement.search.value
        if record.rung == 1:
            if record.screened is not None:
                before[0].append(record.screened)
                after[0].append(lost)
            continue
        # Its own earlier rung, also where it was trained anew because that network was not kept.
        earlier = trained.get((record.rung - 1, record.cuts))
        if earlier is not None and earlier.measurement is not None:
            before[record.rung - 1].append(best - earlier.measurement.search.value)
            after[record.rung - 1].append(lost)
    return [Step.of(early, late, best) for early, late in zip(before, after, strict=True)]


def final_left(steps: float | None, last_rung: int) -> float:
    """Return the share of the last rung's loss that the final recovery is expected to leave, in ``(0, 1]``.

    Args:
        steps: Gradient steps that a network of the final recovery will have behind it; None where not known.
        last_rung: Steps of the last rung.
    """
    if steps is None or last_rung <= 0:
        return FINAL_LEFT
    return min(1.0, math.pow(max(steps, 1.0) / last_rung, -_DECAY))


def left_by_rung(steps: Sequence[Step], *, final: float, seen: bool, trains: bool = True) -> dict[int, float]:
    """Return for each rung the share of its results' severity that is expected to be left on new images in the end.

    With it results of several rungs are brought to one fidelity.

    Args:
        steps: How each rung relates to the next one, from the screen on.
        final: See :func:`final_left`.
        seen: Whether the dense network may have been trained on the search split.
        trains: Whether anything is trained; else what a screen lost stays lost.
    """
    if not trains:
        return dict.fromkeys(range(len(steps) + 1), SEEN_SPLIT if seen else 1.0)
    left = final * (SEEN_SPLIT if seen else 1.0)
    return {rung: left * math.prod(step.kept_loss for step in steps[rung:]) for rung in range(len(steps) + 1)}
