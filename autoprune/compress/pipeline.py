"""Compression of one network by one recipe: the flow from the dense network to the recovered one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from autoprune.compress.aware import IntegerTraining
from autoprune.compress.finetune import Loss, TeacherStream, Trainer, TrainingStep, finetune
from autoprune.compress.formats import LAYER_KINDS
from autoprune.compress.lowrank import Factorised, factorise, with_factors
from autoprune.compress.mask_training import MaskInTraining
from autoprune.compress.masking import hold_zeros, mask_weights, masked_layers
from autoprune.compress.ranking import kept_counts
from autoprune.compress.recovery import refresh_batchnorm, solve_following_layers
from autoprune.compress.schedule import Means, Stage, by_schedule
from autoprune.compress.statistics import LayerStatistics, collect_statistics
from autoprune.compress.surgery import Plan, gone_blocks, kept_channels, make_plan, prune
from autoprune.errors import CompressionError
from autoprune.space.groups import Group, Groups
from autoprune.space.quantization import INTEGER_BITS
from autoprune.space.recipe import GRADIENT_CRITERIA, Recipe


@dataclass(frozen=True)
class Compressed:
    """A network that a recipe made.

    Attributes:
        model: The network, on the CPU in evaluation mode; float, its bits are the deployment's.
        plan: Kept units of each group that was cut.
        train_steps: Gradient steps taken.
        solved: Layers whose weights were solved by least squares.
        factorised: Layers that were replaced by two of lower rank, and why others were not.
        ranges: Ranges of int8 inputs by layer that it was trained with, lowest and highest value.
    """

    model: nn.Module
    plan: Plan = field(default_factory=dict)
    train_steps: int = 0
    solved: list[str] = field(default_factory=list)
    factorised: Factorised = field(default_factory=Factorised)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def kept(self, group: Group) -> int:
        """Return how many units of a group are left."""
        return len(self.plan.get(group.name, range(group.size)))


def compress(
    dense: nn.Module,
    groups: Groups,
    recipe: Recipe,
    *,
    statistics: LayerStatistics | None,
    calibration_batches: Sequence[tuple[Tensor, Tensor]],
    stream: TeacherStream,
    loss: Loss,
    batch_size: int,
    device: torch.device,
    counts: Mapping[str, int] | None = None,
    start_step: int = 0,
    deadline: Callable[[], bool] | None = None,
    training_step: TrainingStep | None = None,
    int8_kinds: Collection[str] = LAYER_KINDS,
    int8_bits: int = INTEGER_BITS,
) -> Compressed:
    """Prune, solve by least squares, mask single weights, refresh BatchNorm statistics, fine-tune: as the recipe says.

    Where the recipe trains integers, the last steps round weights and inputs, and the weights end on their grids.

    Masks come after least squares, which gives layers new weights, and hold through the fine-tuning; a schedule sets
    them in its midst.

    Layers are factorised once least squares has solved them. In the order ``tune-prune-quantize`` the network is
    fine-tuned first, and statistics are collected anew.

    A recipe that prunes nothing gives the dense network itself, untrained: there is nothing to recover.

    Args:
        dense: The dense network on the CPU, or one that was cut and recovered before; it is not changed.
        groups: Its groups.
        recipe: The candidate.
        statistics: Of the dense network on calibration data; needed where the recipe's criteria or least
            squares read them.
        calibration_batches: Inputs and targets for the BatchNorm statistics.
        stream: Training batches with the dense network's outputs.
        loss: The task's loss.
        batch_size: Examples in a training batch; the stream's.
        device: Where to train.
        counts: Units to keep of each group; from the recipe's ratios if not given.
        start_step: Number of the first training batch.
        deadline: Returns True once training has to stop.
        training_step: The user's own training step.
        int8_kinds: Kinds of layers that run in int8 where the network will be deployed.
        int8_bits: Most bits of the weights that int8 kernels add up rightly there.

    Returns:
        The recovered network.

    Raises:
        UsageError: If the groups cannot do what the recipe asks.
        CompressionError: If statistics are missing, or the stream has another batch size.
        TrialError: If training diverges or memory is used up.
    """
    prunes = recipe.prunes
    # A network that was cut before may have lost groups with their blocks.
    recipe = recipe.model_copy(
        update={"groups": {n: c for n, c in recipe.groups.items() if counts is None or n in groups.by_name}}
    )
    recipe.check(groups)
    if not prunes:
        return Compressed(dense.eval())
    recovery = recipe.recovery
    if batch_size != stream.batch_size:
        raise CompressionError(
            f"batch_size is {batch_size} but the stream's batches have {stream.batch_size} examples"
        )
    wanted = counts or kept_counts(dense, groups, recipe, statistics)
    # Of channels; where none goes, single weights have the schedule.
    if recipe.schedule.kind != "one_shot" and any(wanted[g.name] < g.size for g in groups.groups):
        return by_schedule(
            partial(
                compress,
                calibration_batches=calibration_batches,
                stream=stream,
                loss=loss,
                batch_size=batch_size,
                device=device,
                deadline=deadline,
                training_step=training_step,
                int8_kinds=int8_kinds,
                int8_bits=int8_bits,
            ),
            Stage(dense, groups, statistics, wanted, start_step),
            recipe,
            Means(calibration_batches, stream, loss, device, deadline, training_step),
        )

    def tuned(network: nn.Module, watch: Callable[[Trainer], None] | None = None) -> tuple[nn.Module, int]:
        if recovery.finetune_steps == 0:
            return network, 0
        trained, result = finetune(
            network,
            stream,
            recovery,
            loss=loss,
            device=device,
            start_step=start_step,
            deadline=deadline,
            training_step=training_step,
            watch=watch,
        )
        return trained, result.steps

    steps = 0
    ranges: dict[str, tuple[float, float]] = {}
    if recipe.order == "tune-prune-quantize":
        dense, steps = tuned(dense)
        statistics = _statistics_of(dense, groups, recipe, calibration_batches, loss) if steps else statistics
    cut = _cut(dense, groups, recipe, statistics, counts, calibration_batches)
    masks = _set_masks(cut, recipe, calibration_batches, loss)
    if recovery.batchnorm and (cut.plan or cut.masked or cut.factorised.ranks):
        refresh_batchnorm(cut.model, [inputs for inputs, _ in calibration_batches])
    model = cut.model
    if recipe.order == "prune-tune-quantize":
        integers = IntegerTraining.of(model, recipe, groups, int8_kinds, int8_bits)
        hold = hold_zeros(cut.masked) if masks is None else masks.watch

        def watch(trainer: Trainer) -> None:
            hold(trainer)
            integers.watch(trainer)

        model, steps = tuned(model, watch)
        if masks is not None:
            masks.settle(model)
        model = integers.finish(model)
        ranges = integers.ranges
    return Compressed(model, cut.plan, steps, cut.solved, cut.factorised, ranges)


def _set_masks(
    cut: _Cut, recipe: Recipe, batches: Sequence[tuple[Tensor, Tensor]], loss: Loss
) -> MaskInTraining | None:
    """Mask single weights at once, or return what masks them in the midst of the fine-tuning."""
    steps = recipe.recovery.finetune_steps
    later = recipe.schedule.kind != "one_shot" or recipe.mask.criterion == "movement"
    if cut.masked and steps and later:
        return MaskInTraining(cut.masked, recipe.mask, recipe.schedule, steps, batches, loss)
    if cut.masked:
        mask_weights(cut.model, cut.masked, recipe.mask, batches, loss)
    return None


def _statistics_of(
    model: nn.Module,
    groups: Groups,
    recipe: Recipe,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss: Loss,
) -> LayerStatistics:
    by_gradient = any(recipe.criterion_of(g) in GRADIENT_CRITERIA for g in groups.groups)
    return collect_statistics(model, groups, batches, gradients=by_gradient, loss=loss)


@dataclass(frozen=True)
class _Cut:
    """A network that lost channels and rank, and whose following layers were solved.

    Attributes:
        model: The network.
        plan: Kept units of each group that was cut.
        solved: Layers whose weights were solved by least squares.
        factorised: Layers that were replaced by two.
        masked: Layers that lose single weights, with the share of each.
    """

    model: nn.Module
    plan: Plan
    solved: list[str]
    factorised: Factorised
    masked: dict[str, float]


def _cut(
    dense: nn.Module,
    groups: Groups,
    recipe: Recipe,
    statistics: LayerStatistics | None,
    counts: Mapping[str, int] | None,
    calibration_batches: Sequence[tuple[Tensor, Tensor]],
) -> _Cut:
    """Remove channels, solve what reads them, and lower ranks."""
    recovery = recipe.recovery
    plan = make_plan(dense, groups, recipe, statistics, counts)
    model = prune(dense, groups, plan).eval()
    solved: list[str] = []
    if recovery.least_squares and plan:
        if statistics is None:
            raise CompressionError("least squares needs statistics of the dense network on calibration data")
        solved = solve_following_layers(dense, model, groups, plan, statistics, refreshed=recovery.batchnorm)
    factorised = Factorised()
    if recipe.factorises:
        kept = kept_channels(dense, groups, plan)
        factorised = factorise(
            model,
            groups,
            recipe,
            calibration_batches[0][0][:2],
            kept_inputs={name: sides["in"] for name, sides in kept.items() if "in" in sides},
            statistics=statistics,
            refreshed=recovery.batchnorm,
        )
    asked = masked_layers(recipe, groups, gone_blocks(groups, plan))
    masked = {name: share for layer, share in asked.items() for name in with_factors(model, [layer])}
    return _Cut(model, plan, solved, factorised, masked)
