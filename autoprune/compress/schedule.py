"""Schedules of pruning: the cut in rounds, or after a training that prepares it, all at equal gradient steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from autoprune.compress.finetune import Loss, TeacherStream, Trainer, TrainingStep
from autoprune.compress.lineage import groups_after, in_dense_units
from autoprune.compress.sparse_training import train_gradually, train_sparse
from autoprune.compress.statistics import LayerStatistics, collect_statistics
from autoprune.space.groups import Group, Groups
from autoprune.space.recipe import GRADIENT_CRITERIA, GroupChoice, Recipe
from autoprune.space.schedule import Schedule

if TYPE_CHECKING:
    from autoprune.compress.pipeline import Compressed


@dataclass(frozen=True)
class Stage:
    """A network that is to be cut.

    Attributes:
        model: The network on the CPU.
        groups: Its groups.
        statistics: Its statistics on calibration data; None where nothing reads them.
        counts: Units to keep of each group in the end.
        start_step: Number of the next training batch.
    """

    model: nn.Module
    groups: Groups
    statistics: LayerStatistics | None
    counts: Mapping[str, int]
    start_step: int


@dataclass(frozen=True)
class Means:
    """What networks are trained and looked at with; see :func:`~autoprune.compress.pipeline.compress`."""

    calibration: Sequence[tuple[Tensor, Tensor]]
    stream: TeacherStream
    loss: Loss
    device: torch.device
    deadline: Callable[[], bool] | None
    training_step: TrainingStep | None


class Cut(Protocol):
    """Cuts and recovers once: :func:`~autoprune.compress.pipeline.compress` with its means filled in."""

    def __call__(
        self,
        dense: nn.Module,
        groups: Groups,
        recipe: Recipe,
        *,
        statistics: LayerStatistics | None,
        counts: Mapping[str, int] | None,
        start_step: int,
    ) -> Compressed:
        """Return the recovered network."""
        ...


def by_schedule(cut: Cut, stage: Stage, recipe: Recipe, means: Means) -> Compressed:
    """Carry out a recipe whose schedule is not ``one_shot``.

    Args:
        cut: Cuts and recovers once.
        stage: The network to begin with.
        recipe: The candidate.
        means: What networks are trained with.

    Returns:
        The network with exactly ``stage.counts`` units, and its plan in the units of ``stage.model``.

    Raises:
        TrialError: If training diverges or memory is used up.
    """
    if recipe.schedule.kind == "iterative":
        return _iterative(cut, stage, recipe, means)
    return _prepared(cut, stage, recipe, means)


def round_counts(size: int, kept: int, rounds: int) -> list[int]:
    """Return how many units a group keeps after each round: each removes the same share of what is left.

    Args:
        size: Units at first.
        kept: Units at the end; 0 where the block goes, which is shrunk in equal parts and taken out last.
        rounds: Number of rounds.
    """
    if kept == 0:
        return [max(1, round(size * (1 - i / rounds))) for i in range(1, rounds)] + [0]
    return [round(size * (kept / size) ** (i / rounds)) for i in range(1, rounds)] + [kept]


def round_steps(steps: int, rounds: int) -> list[int]:
    """Return the gradient steps of each round, as equal as they can be; the last rounds get what is over."""
    return [(index + 1) * steps // rounds - index * steps // rounds for index in range(rounds)]


def _iterative(cut: Cut, stage: Stage, recipe: Recipe, means: Means) -> Compressed:
    """Cut and recover in rounds, each on the network that the one before left [Han2015]_.

    Before the last round units are only removed; whatever else a recipe does to a network is done in the last.
    """
    rounds = recipe.schedule.rounds
    counts = {g.name: round_counts(g.size, stage.counts[g.name], rounds) for g in stage.groups.groups}
    result: Compressed | None = None
    for index, steps in enumerate(round_steps(recipe.recovery.finetune_steps, rounds)):
        now = _once(recipe, steps, only_cut=index < rounds - 1)
        if result is None:
            result = cut(
                stage.model,
                stage.groups,
                now,
                statistics=stage.statistics,
                counts={name: each[index] for name, each in counts.items()},
                start_step=stage.start_step,
            )
            continue
        groups = groups_after(stage.model, stage.groups, result.plan)
        latest = cut(
            result.model,
            groups,
            now,
            statistics=_observed(result.model, groups, recipe, means),
            counts={name: each[index] for name, each in counts.items()},
            start_step=stage.start_step + result.train_steps,
        )
        result = replace(
            latest,
            plan=in_dense_units(result.plan, latest.plan),
            train_steps=result.train_steps + latest.train_steps,
            solved=list(dict.fromkeys([*result.solved, *latest.solved])),
        )
    assert result is not None  # noqa: S101  # a schedule has at least two rounds
    return result


def _prepared(cut: Cut, stage: Stage, recipe: Recipe, means: Means) -> Compressed:
    """Train first so that the cut costs less, cut, and train for the steps that are left."""
    schedule, recovery = recipe.schedule, recipe.recovery
    first = schedule.first_steps(recovery.finetune_steps)
    trainer = Trainer(
        stage.model,
        means.stream,
        recovery,
        loss=means.loss,
        device=means.device,
        training_step=means.training_step,
        start_step=stage.start_step,
    )
    if schedule.kind == "sparse":
        recipe = _by_l2(recipe)
        train_sparse(trainer, _cut_groups(stage), first, schedule.strength, means.deadline)
    else:

        def observe(model: nn.Module) -> LayerStatistics | None:
            return _observed(model, stage.groups, recipe, means, for_scores=True)

        train_gradually(trainer, stage.groups, recipe, stage.counts, first, observe, means.deadline)
    model = trainer.finish()
    result = cut(
        model,
        stage.groups,
        _once(recipe, recovery.finetune_steps - first),
        statistics=_observed(model, stage.groups, recipe, means),
        counts=stage.counts,
        start_step=stage.start_step + trainer.steps,
    )
    return replace(result, train_steps=trainer.steps + result.train_steps)


def _once(recipe: Recipe, steps: int, *, only_cut: bool = False) -> Recipe:
    """Return a recipe that cuts at once and trains for ``steps``; ``only_cut`` leaves all else of a group out."""
    groups = recipe.groups
    if only_cut:
        groups = {n: GroupChoice(ratio=c.ratio, criterion=c.criterion) for n, c in groups.items()}
    recovery = recipe.recovery.model_copy(update={"finetune_steps": steps})
    return recipe.model_copy(update={"groups": groups, "recovery": recovery, "schedule": Schedule()})


def _by_l2(recipe: Recipe) -> Recipe:
    """Return the recipe with all units ranked by ``l2``, which is what the penalty brought down."""
    groups = {name: choice.model_copy(update={"criterion": ""}) for name, choice in recipe.groups.items()}
    return recipe.model_copy(update={"groups": groups, "criterion": dict.fromkeys(recipe.criterion, "l2")})


def _cut_groups(stage: Stage) -> list[Group]:
    return [g for g in stage.groups.groups if stage.counts[g.name] < g.size]


def _observed(
    model: nn.Module, groups: Groups, recipe: Recipe, means: Means, *, for_scores: bool = False
) -> LayerStatistics | None:
    """Return statistics of a network as it is now, as far as its criteria and its recovery read them."""
    criteria = {recipe.criterion_of(g) for g in groups.prunable}
    solves = (recipe.recovery.least_squares or recipe.factorises) and not for_scores
    if not solves and not criteria & {"activation", *GRADIENT_CRITERIA}:
        return None
    return collect_statistics(
        model,
        groups,
        means.calibration,
        gradients=bool(criteria & set(GRADIENT_CRITERIA)),
        loss=means.loss,
        **({} if solves else {"gram_limit": 0}),
    )
