"""Sensitivity curves: what the metric loses as one group alone is cut ever deeper. Plain data.

References:
    [Li2017] Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

POINT = 0.01


class Cut(BaseModel):
    """One group cut once, alone.

    Attributes:
        group: Its name.
        criterion: How units were ranked; empty where the whole block was taken out.
        kept: Units that stay; 0 where the block was taken out.
        accuracy: The metric on the search split.
        divergence: Of the outputs from the uncut network's, in nats; or growth of the loss, see :class:`Analysis`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: str
    criterion: str
    kept: int
    accuracy: float
    divergence: float


class Measured(BaseModel):
    """A group as the analysis knows it.

    Attributes:
        name: Its name.
        type: ``conv`` or ``linear``.
        units: Its units.
        block: Module that gives way to the identity where all units go; empty where some have to stay.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    type: str
    units: int
    block: str


class Analysis(BaseModel):
    """All that was measured, which after an interruption is not all that was asked for.

    [Li2017]_ draws accuracy over the share of filters removed from one layer by L1, without recovery. Here it is
    coupled groups, any criterion, and the closed-form recovery where it is asked for.

    Attributes:
        metric: Name of the metric.
        measure: What ``divergence`` is: the ``divergence`` of outputs, or the growth of the task's ``loss``.
        recover: ``none`` or ``closed_form``.
        dense: The dense network's metric.
        uncut: The dense network's metric after the same recovery, against which drops count.
        examples: Examples of the search split.
        ratios: Shares removed that were asked for.
        criteria: Criteria that were asked for.
        groups: Prunable groups, in the model's order.
        cuts: What was measured.
        complete: Whether it is all that was asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    measure: Literal["divergence", "loss"]
    recover: Literal["none", "closed_form"]
    dense: float
    uncut: float
    examples: int
    ratios: tuple[float, ...]
    criteria: tuple[str, ...]
    groups: tuple[Measured, ...]
    cuts: tuple[Cut, ...]
    complete: bool


class Curve(BaseModel):
    """One group by one criterion.

    Attributes:
        group: The group.
        criterion: The criterion.
        removed: Shares removed, rising; kept counts are whole, so they can differ from what was asked for.
        drops: What the metric lost at each; below 0 where it rose.
        divergences: Divergence at each.
        block_drop: What taking out the block loses; None where there is none, or it was not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: Measured
    criterion: str
    removed: tuple[float, ...]
    drops: tuple[float, ...]
    divergences: tuple[float, ...]
    block_drop: float | None

    def ratio_at(self, lost: float = POINT) -> float | None:
        """Return the share removed at which ``lost`` is lost first, straight between what was measured.

        None where no cut that was measured lost as much.
        """
        before = (0.0, 0.0)
        for share, drop in zip(self.removed, self.drops, strict=True):
            if drop >= lost:
                width = (lost - before[1]) / (drop - before[1])
                return before[0] + width * (share - before[0])
            before = (share, drop)
        return None

    @property
    def mean_divergence(self) -> float:
        """Mean of the divergences; 0 where nothing was measured."""
        return sum(self.divergences) / max(1, len(self.divergences))


def curves_of(analysis: Analysis) -> list[Curve]:
    """Return the curves of which anything was measured, groups in the model's order, criteria as asked for."""
    blocks = {cut.group: analysis.uncut - cut.accuracy for cut in analysis.cuts if cut.kept == 0}
    found = []
    for group in analysis.groups:
        for criterion in analysis.criteria:
            own = sorted(
                (c for c in analysis.cuts if (c.group, c.criterion) == (group.name, criterion) and c.kept),
                key=lambda cut: -cut.kept,
            )
            if own:
                found.append(
                    Curve(
                        group=group,
                        criterion=criterion,
                        removed=tuple(1.0 - cut.kept / group.units for cut in own),
                        drops=tuple(analysis.uncut - cut.accuracy for cut in own),
                        divergences=tuple(cut.divergence for cut in own),
                        block_drop=blocks.get(group.name),
                    )
                )
    return found


def by_sensitivity(curves: Sequence[Curve]) -> list[Curve]:
    """Return each group's best curve, the most sensitive group first.

    The best curve is that of the criterion that loses least: a group is as sensitive as the best way to cut it. The
    most sensitive group loses a point at the smallest share; of those that never do, outputs move furthest.
    """

    def order(curve: Curve) -> tuple[float, float]:
        ratio = curve.ratio_at()
        return (2.0 if ratio is None else ratio, -curve.mean_divergence)

    best: dict[str, Curve] = {}
    for curve in curves:
        name = curve.group.name
        if name not in best or order(curve) > order(best[name]):
            best[name] = curve
    return sorted(best.values(), key=order)
