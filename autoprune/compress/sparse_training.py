"""Training that prepares a cut: under a penalty on whole units, or with ever more units zeroed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.compress.finetune import Trainer
from autoprune.compress.statistics import LayerStatistics
from autoprune.compress.surgery import make_plan
from autoprune.compress.unit_scaling import READERS, scale_units, unit_norms
from autoprune.space.groups import Group, Groups
from autoprune.space.recipe import Recipe

# The weakest unit is penalised 2 to this power times as much as the strongest [Fang2023].
_SPAN = 4.0
Stop = Callable[[], bool] | None


def train_sparse(
    trainer: Trainer, groups: Sequence[Group], steps: int, strength: float, stop: Stop = None
) -> None:
    r"""Train under a group lasso over coupled layers whose weight grows from step to step.

    After step :math:`t` of :math:`T` the weights of unit :math:`k` are shrunk as one vector,

    .. math:: w_k \leftarrow w_k \max(0, 1 - \lambda_t \gamma_k \bar n / n_k), \quad
        \lambda_t = \frac{2 (t + 1)}{T (T + 1)} \cdot \text{strength}, \quad
        \gamma_k = 2^{4 (n_{max} - n_k) / (n_{max} - n_{min})}

    with :math:`n_k` the unit's norm over all its layers (:func:`~autoprune.compress.unit_scaling.unit_norms`) and
    :math:`\bar n` the group's mean norm before the training. It is the proximal step of the group lasso [Wen2016]_
    with the groups and the weights :math:`\gamma` of DepGraph [Fang2023]_ and a weight that grows as in [Wang2021]_.
    Unlike there, the penalty is applied by itself after the optimizer's step instead of through the gradient, so that
    units become exactly zero, and it is told as a total, so that it does not depend on the number of steps or the rate.

    Args:
        trainer: The network in training; takes ``steps`` steps.
        groups: The groups that will be cut; no other is penalised.
        steps: Steps to take.
        strength: Sum of :math:`\lambda_t`: what the strongest unit loses, as a share of :math:`\bar n`.
        stop: Returns True once training has to stop.

    References:
        [Wen2016] Learning Structured Sparsity in Deep Neural Networks, NeurIPS 2016.
        [Fang2023] DepGraph: Towards Any Structural Pruning, CVPR 2023, section 3.3.
        [Wang2021] Neural Pruning via Growing Regularization, ICLR 2021.
    """
    scales = {group.name: unit_norms(trainer.model, group).mean() for group in groups}
    for step in range(steps):
        if not trainer.run(1, stop=stop).steps:
            return
        weight = strength * 2.0 * (step + 1) / (steps * (steps + 1))
        for group in groups:
            norms = unit_norms(trainer.model, group)
            scale_units(trainer.model, group, shrinkage(norms, scales[group.name] * weight))


def shrinkage(norms: Tensor, amount: Tensor | float) -> Tensor:
    """Return the factors by which units are shrunk in one step; see :func:`train_sparse`.

    Args:
        norms: Norm of each unit, ``(units,)``.
        amount: What the strongest unit loses of its norm, in the same measure.

    Returns:
        Factors in ``[0, 1]``, ``(units,)``.
    """
    largest, smallest = norms.max(), norms.min()
    span = (largest - smallest).clamp_min(torch.finfo(norms.dtype).tiny)
    emphasis = torch.exp2(_SPAN * (largest - norms) / span)
    lost = amount * emphasis / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return (1.0 - lost).clamp_min(0.0)


def train_gradually(
    trainer: Trainer,
    groups: Groups,
    recipe: Recipe,
    counts: Mapping[str, int],
    steps: int,
    observe: Callable[[nn.Module], LayerStatistics | None],
    stop: Stop = None,
) -> None:
    r"""Train while ever more units are zeroed, by the cubic schedule of [Zhu2017]_.

    The steps fall into ``rounds + 1`` equal parts. Before part :math:`i = 1 \dots n` those units of each group that
    score lowest at that moment are zeroed, as many that the share :math:`s_i = s_f (1 - (1 - i / n)^3)` of what the
    cut will remove is gone, and the last part trains at the full share. Only the weights that read a unit are zeroed,
    which does to the outputs what cutting it does. Unlike in the paper, which holds its masks over single weights, the
    zeroed weights go on being trained, so that a unit can come back before the next choice [He2018]_.

    Args:
        trainer: The network in training; takes ``steps`` steps.
        groups: Its groups.
        recipe: Criteria and the number of rounds.
        counts: Units that each group keeps at the cut.
        steps: Steps to take.
        observe: Returns statistics of the network as it is, where the criteria read them.
        stop: Returns True once training has to stop.

    References:
        [Zhu2017] Zhu and Gupta, To prune, or not to prune, 2017.
        [He2018] Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks, IJCAI 2018.
    """
    rounds = recipe.schedule.rounds
    trainer.run(steps // (rounds + 1), stop=stop)
    for index in range(1, rounds + 1):
        share = cubic_share(index / rounds)
        partly = {g.name: _partly(g.size, counts[g.name], share) for g in groups.groups}
        plan = make_plan(trainer.model, groups, recipe, observe(trainer.model), partly)
        for name, units in plan.items():
            alive = torch.zeros(groups.by_name[name].size)
            alive[list(units)] = 1.0
            scale_units(trainer.model, groups.by_name[name], alive, READERS)
        end = steps * (index + 1) // (rounds + 1)
        trainer.run(max(0, end - trainer.steps), stop=stop)


def cubic_share(progress: float) -> float:
    """Return the share of the final sparsity that is reached at a share of the schedule, both in ``[0, 1]``."""
    return 1.0 - (1.0 - progress) ** 3


def _partly(size: int, kept: int, share: float) -> int:
    """Return the units that are not zeroed yet; a group that goes with its block keeps one until the cut."""
    return max(1, size - round(share * (size - kept)))
