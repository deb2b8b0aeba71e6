"""Masks that are set in the midst of a fine-tuning: in rounds, by a rising share, under a penalty, or by movement.

References:
    [Han2015] Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015.
    [Zhu2017] Zhu and Gupta, To prune, or not to prune, 2017.
    [Sanh2020] Movement Pruning: Adaptive Sparsity by Fine-Tuning, NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from autoprune.compress import masks
from autoprune.compress.finetune import Trainer
from autoprune.compress.mask_statistics import Batches, Loss, score_weights, weight_of
from autoprune.compress.masking import apply_masks, make_masks
from autoprune.compress.sparse_training import cubic_share, shrinkage
from autoprune.space.mask import Mask
from autoprune.space.schedule import Schedule

# Share of the fine-tuning that movement watches before it sets a mask at once.
MOVEMENT_SHARE = 1 / 3
# What is masked after some steps: from a layer's final sparsity to its sparsity then.
Level = tuple[int, Callable[[float], float]]


def levels(schedule: Schedule, steps: int, *, movement: bool = False) -> list[Level]:
    r"""Return after which steps of a fine-tuning masks are set, and how much is masked then.

    ``iterative`` begins each of ``n`` equal parts with the share :math:`1 - (1 - s)^{i / n}`, so that each round masks
    the same share of what is left [Han2015]_; ``gradual`` rises by :math:`s (1 - (1 - i / n)^3)` in the first steps
    [Zhu2017]_; ``sparse`` masks once, after its first steps. ``one_shot`` masks at once, under ``movement`` after the
    first third of the steps.

    Args:
        schedule: Kind, rounds and share of the first steps.
        steps: Steps of the whole fine-tuning.
        movement: Whether weights are ranked by how they move.
    """
    rounds, first = schedule.rounds, schedule.first_steps(steps)
    if schedule.kind == "iterative":
        starts = [i * steps // rounds for i in range(rounds)]
        shares = [*(_round_share(i / rounds) for i in range(1, rounds)), _scaled(1.0)]
        return list(zip(starts, shares, strict=True))
    if schedule.kind == "gradual":
        return [(first * i // (rounds + 1), _scaled(cubic_share(i / rounds))) for i in range(1, rounds + 1)]
    at = max(1, int(steps * MOVEMENT_SHARE)) if movement else 0
    return [(first if schedule.kind == "sparse" else at, _scaled(1.0))]


def _round_share(progress: float) -> Callable[[float], float]:
    return lambda sparsity: float(1.0 - (1.0 - sparsity) ** progress)


def _scaled(share: float) -> Callable[[float], float]:
    return lambda sparsity: share * sparsity


class MaskInTraining:
    r"""Sets masks in the midst of a fine-tuning; what is zero once stays zero.

    A pattern N:M rises as M-1:M, M-2:M and so on. Under the schedule ``sparse`` the magnitudes of each layer are shrunk
    before the mask as :func:`~autoprune.compress.sparse_training.train_sparse` shrinks the norms of units: a lasso with
    single weights as groups. What is smallest then is masked, whatever the mask's criterion is.

    By ``movement`` the score of a weight is :math:`-\sum_t w_t g_t` over the steps so far, with the gradient as the
    optimizer gets it: positive where the steps move the weight away from zero; by magnitude before the first step. In
    [Sanh2020]_ gradients pass straight through masks, so that weights can come back; here they stay zero.

    Args:
        layers: Sparsity of each layer at the end.
        mask: Pattern, allocation and criterion.
        schedule: When masks are set.
        steps: Steps of the whole fine-tuning, at least 1.
        batches: Inputs and targets of the calibration data.
        loss: The task's loss.
    """

    def __init__(
        self,
        layers: Mapping[str, float],
        mask: Mask,
        schedule: Schedule,
        steps: int,
        batches: Batches,
        loss: Loss,
    ) -> None:
        self.layers = layers
        self.mask = mask.model_copy(update={"criterion": "magnitude"}) if schedule.kind == "sparse" else mask
        self.schedule = schedule
        self.batches = batches
        self.loss = loss
        self.seen = 0
        self.kept: dict[str, Tensor] = {}
        self._left = levels(schedule, steps, movement=self._moves)
        self._scores: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}

    @property
    def _moves(self) -> bool:
        return self.mask.criterion == "movement"

    def watch(self, trainer: Trainer) -> None:
        """Follow a training."""
        self._set_due(trainer.model)
        trainer.observe(before=self._add if self._moves else None, after=self._hold)

    def settle(self, model: nn.Module) -> None:
        """Set the last mask after a training that ended before it was due."""
        if self._left:
            self._left = [(self.seen, self._left[-1][1])]
            self._set_due(model)

    @torch.no_grad()
    def _add(self, model: nn.Module) -> None:
        if not self._left:
            return
        for name in self.layers:
            weight = weight_of(model, name)
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            moved = -(weight * gradient).double()
            self._scores[name] = self._scores[name] + moved if name in self._scores else moved

    def _hold(self, model: nn.Module) -> None:
        self.seen += 1
        if self.schedule.kind == "sparse" and self._left:
            self._shrink(model)
        apply_masks(model, self.kept)
        self._set_due(model)

    @torch.no_grad()
    def _shrink(self, model: nn.Module) -> None:
        first = self._left[0][0]
        share = self.schedule.strength * 2.0 * self.seen / (first * (first + 1))
        for name in self.layers:
            weight = weight_of(model, name)
            sizes = weight.abs().flatten()
            scale = self._scales.setdefault(name, sizes.mean())
            weight.mul_(shrinkage(sizes, scale * share).view_as(weight))

    def _set_due(self, model: nn.Module) -> None:
        """Set the newest mask that is due."""
        due = [level for level in self._left if level[0] <= self.seen]
        self._left = self._left[len(due) :]
        if due and (mask := self._pattern_at(due[-1][1])) is not None:
            shares = {name: due[-1][1](sparsity) for name, sparsity in self.layers.items()}
            self.kept = make_masks(model, shares, mask, self._ranked(model))
            apply_masks(model, self.kept)

    def _pattern_at(self, share: Callable[[float], float]) -> Mask | None:
        """Return the mask with the pattern of a level; None where no weight goes yet."""
        if self.mask.block is None:
            return self.mask
        few, block = self.mask.block
        left = block - round(share(1.0 - few / block) * block)
        return None if left == block else self.mask.model_copy(update={"pattern": f"{left}:{block}"})

    def _ranked(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the scores of now, with what is masked already below all others."""
        if self._moves and self._scores:
            scores = {name: score.cpu() for name, score in self._scores.items()}
            for name, score in scores.items():
                masks.check_scores(name, "movement", score)
        else:
            criterion = "magnitude" if self._moves else self.mask.criterion
            scores = score_weights(model, self.layers, criterion, self.batches, self.loss)
        # Below those of all layers, which one threshold may compare.
        lowest = min((float(score.min()) for score in scores.values()), default=0.0) - 1.0
        for name, kept in self.kept.items():
            scores[name] = scores[name].masked_fill(~kept, lowest)
        return scores
