"""Single weights of a network set to zero, and kept at zero through its fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from autoprune.compress import masks
from autoprune.compress.finetune import Trainer
from autoprune.compress.layers import submodule
from autoprune.compress.mask_statistics import Batches, Loss, oriented, score_weights, weight_of
from autoprune.space.groups import Groups
from autoprune.space.mask import Mask
from autoprune.space.recipe import Recipe

_DEAD_HINT = "lower the sparsity of its group, or spread zeros by allocation 'erk' or 'lamp'"


def masked_layers(recipe: Recipe, groups: Groups, gone: Collection[str] = ()) -> dict[str, float]:
    """Return the layers whose single weights a recipe masks, with the sparsity of each, in the order of the groups.

    Args:
        recipe: The candidate.
        groups: Groups of the network.
        gone: Blocks that are taken out.
    """
    chosen = ((group, recipe.choice(group.name).sparsity) for group in groups.without(gone).groups)
    return {layer: sparsity for group, sparsity in chosen if sparsity > 0 for layer in group.producers}


def make_masks(
    model: nn.Module, layers: Mapping[str, float], mask: Mask, scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Choose the weights that become zero.

    Args:
        model: The network.
        layers: Sparsity of each layer; a weight that two layers share is masked once, for the first of them.
        mask: Pattern, allocation and criterion.
        scores: Of each layer's weights, of their shapes.

    Returns:
        For each layer a mask of its weight's shape on the CPU, True stays.

    Raises:
        CompressionError: If a layer would lose all its weights.
    """
    first: dict[int, str] = {}
    for name in layers:
        first.setdefault(id(weight_of(model, name)), name)
    names = list(first.values())
    counts = {} if mask.block else _counts(model, names, layers, mask, scores)
    made = {}
    for name in names:
        module = submodule(model, name)
        own = oriented(module, scores[name])
        if mask.block is not None:
            kept = masks.block_mask(own, *mask.block)
        elif mask.criterion == "activation":
            kept = masks.lowest_by_row(own, counts[name])
        else:
            kept = oriented(module, masks.lowest(scores[name], counts[name]))
        masks.check_mask(name, kept, _DEAD_HINT)
        made[name] = oriented(module, kept)
    return made


def _counts(
    model: nn.Module,
    names: list[str],
    layers: Mapping[str, float],
    mask: Mask,
    scores: Mapping[str, Tensor],
) -> dict[str, int]:
    """Return how many weights of each layer become zero."""
    weights = {name: weight_of(model, name) for name in names}
    own = [masks.zero_count(layers[name], weight.numel()) for name, weight in weights.items()]
    if mask.allocation == "layer":
        counts = own
    elif mask.allocation == "global":
        counts = masks.global_counts([scores[name] for name in names], sum(own))
    elif mask.allocation == "lamp":
        counts = masks.global_counts([masks.lamp_scores(w) for w in weights.values()], sum(own))
    else:
        counts = masks.erk_counts([tuple(weight.shape) for weight in weights.values()], sum(own))
    return dict(zip(names, counts, strict=True))


@torch.no_grad()
def apply_masks(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Set the weights that masks leave out to zero, in place."""
    for name, mask in kept.items():
        weight = weight_of(model, name)
        weight.masked_fill_(~mask.to(weight.device), 0.0)


def mask_weights(
    model: nn.Module, layers: Mapping[str, float], mask: Mask, batches: Batches, loss: Loss
) -> None:
    """Choose single weights by what they are worth now and set them to zero, in place.

    Args:
        model: The network.
        layers: Sparsity of each layer.
        mask: Pattern, allocation and criterion; any but ``movement``.
        batches: Inputs and targets of the calibration data.
        loss: The task's loss.

    Raises:
        CompressionError: If a layer would lose all its weights, or a score is not finite.
    """
    scores = score_weights(model, layers, mask.criterion, batches, loss)
    apply_masks(model, make_masks(model, layers, mask, scores))


def hold_zeros(layers: Collection[str]) -> Callable[[Trainer], None]:
    """Return what keeps the weights of some layers that are zero when the training begins at exactly zero.

    Args:
        layers: Names of the layers whose weights are masked.
    """

    def watch(trainer: Trainer) -> None:
        kept = {name: weight_of(trainer.model, name).detach() != 0 for name in layers}
        trainer.observe(after=lambda model: apply_masks(model, kept))

    return watch
