"""Sensitivity: how much the loss on calibration data grows when one group alone is cut or quantized.

References:
    [Molchanov2019] Importance Estimation for Neural Network Pruning, CVPR 2019.
    [Theis2018] Faster gaze prediction with dense networks and Fisher pruning, arXiv 1801.05787.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from autoprune.compress.criteria import score_group
from autoprune.compress.finetune import Loss
from autoprune.compress.importance import pool_units
from autoprune.compress.recovery import refresh_batchnorm, solve_following_layers
from autoprune.compress.rounding import rounded
from autoprune.compress.statistics import LayerStatistics
from autoprune.compress.surgery import prune
from autoprune.space.groups import Group, Groups
from autoprune.space.recipe import Recovery


class SensitivityMeter:
    """Measures the dense network with one group changed, after the closed-form recovery that a trial would do.

    Args:
        dense: The dense network on the CPU.
        groups: Its groups.
        statistics: Of the dense network, with gradients for :meth:`estimate`.
        batches: Calibration inputs and targets.
        loss: The task's loss.
        recovery: Which closed-form recovery trials do.
        device: Where to run.
    """

    def __init__(
        self,
        dense: nn.Module,
        groups: Groups,
        statistics: LayerStatistics,
        batches: Sequence[tuple[Tensor, Tensor]],
        *,
        loss: Loss,
        recovery: Recovery,
        device: torch.device,
    ) -> None:
        self.dense = dense
        self.groups = groups
        self.statistics = statistics
        self.batches = batches
        self.loss = loss
        self.recovery = recovery
        self.device = device
        self._scores: dict[tuple[str, str], Tensor] = {}
        self.dense_loss = self._loss_of(deepcopy(dense))
        # BatchNorm statistics of a few hundred examples change the loss by themselves, which is no cut's doing.
        self._unpruned_loss = self._refreshed_loss(deepcopy(dense)) if recovery.batchnorm else self.dense_loss

    def of_cut(self, group: str, kept: int, criterion: str) -> float:
        """Return the growth of the loss when ``group`` keeps ``kept`` units, ranked by ``criterion``."""
        plan = {group: self.best_units(group, kept, criterion)}
        model = prune(self.dense, self.groups, plan).eval()
        if self.recovery.least_squares:
            solve_following_layers(
                self.dense, model, self.groups, plan, self.statistics, refreshed=self.recovery.batchnorm
            )
        found = self._refreshed_loss(model) if self.recovery.batchnorm else self._loss_of(model)
        return found - self._unpruned_loss

    def of_int8(self, group: str) -> float:
        """Return the growth of the loss when the layers that make ``group`` compute in 8 bits."""
        return self._loss_of(rounded(self.dense, self.groups.by_name[group].producers)) - self.dense_loss

    def estimate(self, group: str, kept: int, criterion: str) -> float:
        """Estimate :meth:`of_cut` from one backward pass that was taken for all groups at once.

        The empirical Fisher information of the removed units [Theis2018]_, from gradients of batches in place of
        examples: half the mean square of the loss' first-order change, times the examples of a batch. It knows
        nothing of the closed-form recovery, so it is the shape of a curve rather than its height.
        """
        units = set(range(self.groups.by_name[group].size)) - set(self.best_units(group, kept, criterion))
        products = self._products(self.groups.by_name[group])
        if products is None or not units:
            return 0.0
        change = products[:, sorted(units)].sum(dim=1)
        return float(0.5 * len(self.batches[0][0]) * change.square().mean())

    def best_units(self, group: str, kept: int, criterion: str) -> tuple[int, ...]:
        """Return the ``kept`` units that ``criterion`` ranks highest, sorted."""
        key = (group, criterion)
        if key not in self._scores:
            self._scores[key] = score_group(
                self.dense, self.groups.by_name[group], criterion, self.statistics
            )
        best = torch.argsort(self._scores[key], descending=True, stable=True)[:kept]
        return tuple(sorted(best.tolist()))

    def _products(self, group: Group) -> Tensor | None:
        found = [
            pool_units(self.statistics.products[m.layer, "out"], m.index_map)
            for m in group.members
            if m.axis == "out" and (m.layer, "out") in self.statistics.products
        ]
        return torch.stack(found).sum(dim=0) if found else None

    def _refreshed_loss(self, model: nn.Module) -> float:
        refresh_batchnorm(model.to(self.device), [inputs for inputs, _ in self.batches])
        return self._loss_of(model)

    @torch.no_grad()
    def _loss_of(self, model: nn.Module) -> float:
        model = model.to(self.device).eval()
        total = seen = 0.0
        for inputs, targets in self.batches:
            outputs = model(inputs.to(self.device))
            total += float(self.loss(outputs, targets.to(self.device))) * len(inputs)
            seen += len(inputs)
        return total / seen
