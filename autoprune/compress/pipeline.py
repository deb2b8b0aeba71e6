"""Compression of one network by one recipe: the flow from the dense network to the recovered one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from autoprune.compress.finetune import Loss, TeacherStream, TrainingStep, finetune
from autoprune.compress.masking import MovementMask, hold_zeros, mask_weights, masked_layers
from autoprune.compress.recovery import refresh_batchnorm, solve_following_layers
from autoprune.compress.schedule import Means, Stage, by_schedule
from autoprune.compress.statistics import LayerStatistics
from autoprune.compress.surgery import Plan, gone_blocks, make_plan, prune
from autoprune.errors import CompressionError
from autoprune.space.groups import Group, Groups
from autoprune.space.recipe import Recipe


@dataclass(frozen=True)
class Compressed:
    """A network that a recipe made.

    Attributes:
        model: The network, on the CPU in evaluation mode; float, its bits are the deployment's.
        plan: Kept units of each group that was cut.
        train_steps: Gradient steps taken.
        solved: Layers whose weights were solved by least squares.
    """

    model: nn.Module
    plan: Plan
    train_steps: int
    solved: list[str]

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
) -> Compressed:
    """Prune, solve by least squares, mask single weights, refresh BatchNorm statistics, fine-tune: as the recipe says.

    Masks come after least squares, which gives layers new weights, and hold through the fine-tuning.

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
        return Compressed(model=dense.eval(), plan={}, train_steps=0, solved=[])
    recovery = recipe.recovery
    if batch_size != stream.batch_size:
        raise CompressionError(
            f"batch_size is {batch_size} but the stream's batches have {stream.batch_size} examples"
        )
    if recipe.schedule.kind != "one_shot":
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
            ),
            Stage(dense, groups, statistics, counts or recipe.kept_counts(groups), start_step),
            recipe,
            Means(calibration_batches, stream, loss, device, deadline, training_step),
        )

    plan = make_plan(dense, groups, recipe, statistics, counts)
    model = prune(dense, groups, plan).eval()
    solved: list[str] = []
    if recovery.least_squares and plan:
        if statistics is None:
            raise CompressionError("least squares needs statistics of the dense network on calibration data")
        solved = solve_following_layers(dense, model, groups, plan, statistics, refreshed=recovery.batchnorm)
    layers = masked_layers(recipe, groups, gone_blocks(groups, plan))
    movement: MovementMask | None = None
    if layers and recipe.mask.criterion == "movement":
        movement = MovementMask(layers, recipe.mask, recovery.finetune_steps)
    elif layers:
        mask_weights(model, layers, recipe.mask, calibration_batches, loss)
    if recovery.batchnorm and (plan or layers):
        refresh_batchnorm(model, [inputs for inputs, _ in calibration_batches])
    steps = 0
    if recovery.finetune_steps > 0:
        model, result = finetune(
            model,
            stream,
            recovery,
            loss=loss,
            device=device,
            start_step=start_step,
            deadline=deadline,
            training_step=training_step,
            watch=movement.watch if movement is not None else hold_zeros(layers),
        )
        steps = result.steps
        if movement is not None:
            movement.settle(model)
    return Compressed(model=model, plan=plan, train_steps=steps, solved=solved)
