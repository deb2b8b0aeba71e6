"""Sensitivity: how far the outputs move when one group alone is cut or quantized.

References:
    [Molchanov2019] Importance Estimation for Neural Network Pruning, CVPR 2019.
    [Theis2018] Faster gaze prediction with dense networks and Fisher pruning, arXiv 1801.05787.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from autoprune.compress.criteria import score_group
from autoprune.compress.distillation import distillation_loss
from autoprune.compress.equalisation import equalised
from autoprune.compress.finetune import Loss
from autoprune.compress.importance import pool_units
from autoprune.compress.layers import split_name, submodule
from autoprune.compress.quantization import quantized
from autoprune.compress.recovery import refresh_batchnorm, solve_following_layers
from autoprune.compress.rounding import rounded
from autoprune.compress.speed import autocast, keep_freed_memory, memory_format
from autoprune.compress.statistics import LayerStatistics
from autoprune.compress.surgery import prune
from autoprune.space.groups import Group, Groups
from autoprune.space.quantization import INTEGER_BITS, Quantization
from autoprune.space.recipe import Recovery

# Examples that BatchNorm statistics are taken from; all cuts, and the network that they are compared with, share them.
_REFRESHING = 256


@dataclass(frozen=True)
class _Reference:
    """What a network is compared with.

    Attributes:
        logits: Outputs for each batch, in float16 on the CPU; None where losses are compared.
        loss: The loss that counts as no growth.
    """

    logits: list[Tensor] | None
    loss: float


class SensitivityMeter:
    """Measures the dense network with one group changed, after the closed-form recovery that a trial would do.

    The measure is the divergence of the outputs from the dense network's, which training brings back: added over
    groups, divergences on a few hundred images rank whole recipes nearly as trials do, where the task's loss hardly
    moves before much is lost. The images have to be others than those that the recovery was fitted to, on which
    even the removal of a whole block can look free. Networks whose training does not distil, or whose targets are no
    classes, are compared by the task's loss.

    BatchNorm statistics of a few hundred examples change outputs by themselves, which is no cut's doing. So cuts are
    compared with the dense network under such statistics.

    Args:
        dense: The dense network on the CPU.
        groups: Its groups.
        statistics: Of the dense network, with gradients for :meth:`estimate`.
        batches: Calibration inputs and targets; the first few hundred give BatchNorm statistics.
        unseen: Inputs and targets to measure on.
        loss: The task's loss.
        recovery: Which recovery trials do.
        distils: Whether outputs are logits that a teacher's can be compared with.
        device: Where to run.
        quantization: How weights of fewer than 8 bits are made; the nearest integers if not given.
        int8_bits: Most bits of the weights that int8 kernels add up rightly where networks are deployed.
    """

    def __init__(
        self,
        dense: nn.Module,
        groups: Groups,
        statistics: LayerStatistics,
        batches: Sequence[tuple[Tensor, Tensor]],
        unseen: Sequence[tuple[Tensor, Tensor]],
        *,
        loss: Loss,
        recovery: Recovery,
        distils: bool,
        device: torch.device,
        quantization: Quantization | None = None,
        int8_bits: int = INTEGER_BITS,
    ) -> None:
        self.dense = dense
        self.groups = groups
        self.statistics = statistics
        self.batches = batches
        self.unseen = unseen
        self._refreshing = [inputs for inputs, _ in batches[: max(1, _REFRESHING // len(batches[0][0]))]]
        self.loss = loss
        self.recovery = recovery
        self.device = device
        self.quantization = quantization or Quantization()
        self.int8_bits = int8_bits
        self._integers: dict[int, nn.Module] = {}
        self._scores: dict[tuple[str, str], Tensor] = {}
        keep_freed_memory()
        self._layout = memory_format(dense, lambda: unseen[0][0])
        distils = distils and not any(targets.is_floating_point() for _, targets in unseen)
        self._dense = self._reference(self._placed(deepcopy(dense)), distils)
        self._uncut = self._reference(self.uncut(), distils, fast=distils)

    @property
    def dense_loss(self) -> float:
        """Loss of the dense network; 0 for a divergence."""
        return self._dense.loss

    @property
    def compares_outputs(self) -> bool:
        """Whether growths are divergences of outputs, in nats; else they are the task's loss."""
        return self._dense.logits is not None

    def of_cut(self, group: str, kept: int, criterion: str) -> float:
        """Return the growth of the loss when ``group`` keeps ``kept`` units, ranked by ``criterion``."""
        return self._growth(self.cut(group, kept, criterion), self._uncut, fast=self.compares_outputs)

    def uncut(self) -> nn.Module:
        """Return the network that cuts are compared with: the dense one after the same recovery, on the device."""
        copy = deepcopy(self.dense)
        return self._refreshed(copy) if self.recovery.batchnorm else self._placed(copy)

    def cut(self, group: str, kept: int, criterion: str) -> nn.Module:
        """Return the recovered network whose ``group`` keeps ``kept`` units, ranked by ``criterion``, on the device."""
        plan = {group: self.best_units(group, kept, criterion)}
        model = prune(self.dense, self.groups, plan).eval()
        if self.recovery.least_squares:
            solve_following_layers(
                self.dense, model, self.groups, plan, self.statistics, refreshed=self.recovery.batchnorm
            )
        return self._refreshed(model) if self.recovery.batchnorm else self._placed(model)

    def of_bits(self, group: str, bits: int) -> float:
        """Return the growth of the loss when the layers that make ``group`` compute in 8 bits.

        Args:
            group: Its name.
            bits: Bit-width of the layers' weights, 2 to 8.
        """
        layers = self.groups.by_name[group].producers
        if bits == INTEGER_BITS and self.quantization.usual_integers and self.quantization.equalize == "none":
            model = self._placed(rounded(self.dense, layers, int8_bits=self.int8_bits))
        else:
            source = self._of_integers(min(bits, self.int8_bits))
            copy = deepcopy(self._rescaled)
            for layer in layers:
                owner, own = split_name(layer)
                setattr(submodule(copy, owner), own, deepcopy(source.get_submodule(layer)))
            model = self._placed(rounded(copy, layers, dict.fromkeys(layers, 32)))
        return self._growth(model, self._dense)  # in float32: bfloat16 would round away what 8 bits change

    @cached_property
    def _rescaled(self) -> nn.Module:
        """The dense network as it is before its weights become integers."""
        if self.quantization.equalize == "none":
            return self.dense
        return equalised(self.dense, self.quantization, [inputs for inputs, _ in self.batches])

    def _of_integers(self, bits: int) -> nn.Module:
        """Return the dense network with the weights of all its layers on grids of ``bits``, made once."""
        if bits not in self._integers:
            layers = dict.fromkeys((layer for g in self.groups.groups for layer in g.producers), bits)
            batches = [inputs for inputs, _ in self.batches]
            self._integers[bits] = quantized(self._rescaled, layers, self.quantization, batches).model
        return self._integers[bits]

    def estimate(self, group: str, kept: int, criterion: str) -> float:
        """Estimate :meth:`of_cut` from one backward pass that was taken for all groups at once.

        The empirical Fisher information of the removed units [Theis2018]_, from gradients of batches in place of
        examples: half the mean square of the loss' first-order change, times the examples of a batch. It knows
        nothing of the closed-form recovery, so it is the shape of a curve rather than its height; the divergence
        grows with the same matrix.
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

    def _placed(self, model: nn.Module) -> nn.Module:
        return model.to(self.device).to(memory_format=self._layout).eval()

    def _refreshed(self, model: nn.Module) -> nn.Module:
        model = self._placed(model)
        with autocast(self.device):
            refresh_batchnorm(model, self._refreshing)
        return model

    @torch.no_grad()
    def outputs(self, model: nn.Module, *, fast: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield outputs in float32, and targets; ``fast`` computes in the type that is fastest on the device."""
        for inputs, targets in self.unseen:
            with autocast(self.device) if fast else nullcontext():
                outputs = model(inputs.to(self.device))
            yield outputs.float(), targets.to(self.device)

    def _reference(self, model: nn.Module, distils: bool, *, fast: bool = False) -> _Reference:
        """Return what networks are compared with: outputs if they are logits of several classes, else the loss."""
        if distils:
            limit = torch.finfo(torch.float16).max
            found = [o.clamp(-limit, limit).half().cpu() for o, _ in self.outputs(model, fast=fast)]
            if all(o.dim() >= 2 and o.shape[1] > 1 for o in found):
                return _Reference(found, 0.0)
        return _Reference(None, self._growth(model, _Reference(None, 0.0)))

    def _growth(self, model: nn.Module, reference: _Reference, *, fast: bool = False) -> float:
        total = seen = 0.0
        for number, (outputs, targets) in enumerate(self.outputs(model, fast=fast)):
            if reference.logits is None:
                loss = self.loss(outputs, targets)
            else:
                taught = reference.logits[number].to(outputs)
                loss = distillation_loss(outputs, taught, temperature=1.0)
            total += float(loss) * len(targets)
            seen += len(targets)
        return total / seen - reference.loss
