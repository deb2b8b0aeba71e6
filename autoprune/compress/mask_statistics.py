"""What single weights are ranked by besides themselves: their inputs and their gradients on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.compress import masks
from autoprune.compress.layers import Conv, device_of, submodule
from autoprune.compress.statistics import kept_as_was
from autoprune.errors import CompressionError
from autoprune.space.mask import MaskCriterion

Batches = Sequence[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def score_weights(
    model: nn.Module, layers: Collection[str], criterion: MaskCriterion, batches: Batches, loss: Loss
) -> dict[str, Tensor]:
    """Score the single weights of some layers by any criterion but ``movement``, which watches the fine-tuning.

    A layer that is not run by itself, as the output projection of ``nn.MultiheadAttention``, has no inputs to be seen
    and is scored by magnitude under ``activation``.

    Args:
        model: The network; its weights, mode and gradients are as before afterwards.
        layers: Names of convolution and linear layers.
        criterion: How weights are ranked.
        batches: Inputs and targets of the calibration data.
        loss: ``(outputs, targets)`` to a scalar, for ``taylor`` and ``fisher``.

    Returns:
        For each layer scores of its weight's shape, float64 on the CPU; larger means keep.

    Raises:
        CompressionError: If a score is not finite, there are no batches that the criterion needs, or a layer has no
            weight of its own.
    """
    weights = {name: weight_of(model, name) for name in layers}
    if criterion in ("activation", "taylor", "fisher") and not batches:
        raise CompressionError(
            f"mask criterion {criterion!r} needs at least one calibration batch",
            "the calibration split is empty",
        )
    if criterion == "magnitude":
        scores = {name: masks.magnitude_scores(weight) for name, weight in weights.items()}
    elif criterion == "random":
        scores = {name: masks.random_scores(name, weight) for name, weight in weights.items()}
    elif criterion == "activation":
        scores = _by_activation(model, weights, batches)
    elif criterion in ("taylor", "fisher"):
        products, squares = _gradient_products(model, weights, batches, loss)
        scores = {
            name: masks.taylor_scores(products[name], len(batches))
            if criterion == "taylor"
            else masks.fisher_scores(squares[name], len(batches))
            for name in weights
        }
    else:
        raise CompressionError(f"mask criterion {criterion!r} ranks weights during fine-tuning, not before")
    for name, each in scores.items():
        masks.check_scores(name, criterion, each)
    return {name: each.cpu() for name, each in scores.items()}


def weight_of(model: nn.Module, layer: str) -> nn.Parameter:
    """Return the weight of a layer that holds it as a parameter of its own.

    Raises:
        CompressionError: If it does not, as under weight normalisation; names the layer.
    """
    module = submodule(model, layer)
    weight = module._parameters.get("weight")
    if not isinstance(module, Conv | nn.Linear) or weight is None:
        raise CompressionError(
            f"single weights of layer {layer!r} cannot be masked: its weight is computed from other parameters",
            "set the sparsity of its group to 0",
        )
    return weight


def oriented(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return a tensor of a layer's weight's shape as ``(out, in, *kernel)``, and one of that order as the weight's."""
    transposed = isinstance(module, Conv) and module.transposed
    return tensor.transpose(0, 1) if transposed else tensor


def input_moments(model: nn.Module, layers: Collection[str], batches: Batches) -> dict[str, Tensor]:
    """Return the mean square of every input channel of some layers over examples and places, ``(in,)`` each.

    Args:
        model: The network; its mode is as before afterwards.
        layers: Names of convolution and linear layers; those that are not run are left out.
        batches: Inputs and targets.
    """
    sums: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def note(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().double()
            channels = x.movedim(-1 if isinstance(module, nn.Linear) else 1, -1).flatten(0, -2)
            sums[name] = sums.get(name, 0.0) + channels.square().sum(0)
            seen[name] = seen.get(name, 0) + len(channels)

        return hook

    modules = {name: submodule(model, name) for name in layers}
    handles = [m.register_forward_pre_hook(note(name, m)) for name, m in modules.items()]
    device = device_of(model)
    try:
        with kept_as_was(model), torch.no_grad():
            model.eval()
            for inputs, _ in batches:
                model(inputs.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums[name] / seen[name] for name in sums}


def _by_activation(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Batches
) -> dict[str, Tensor]:
    moments = input_moments(model, weights, batches)
    scores = {}
    for name, weight in weights.items():
        module = submodule(model, name)
        scores[name] = masks.magnitude_scores(weight)
        if name in moments:
            values = oriented(module, weight.detach())
            moment = _spread(module, moments[name]).reshape(-1, values.shape[1], *[1] * (values.dim() - 2))
            scores[name] = oriented(module, masks.activation_scores(values, moment))
    return scores


def _spread(module: nn.Module, moment: Tensor) -> Tensor:
    """Return the moments of the inputs that each output reads, ``(out or 1, in of its group)``."""
    if not isinstance(module, Conv) or module.transposed or module.groups == 1:
        return moment[None]
    own = moment.reshape(module.groups, -1)
    return own.repeat_interleave(module.out_channels // module.groups, dim=0)


def _gradient_products(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Batches, loss: Loss
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the sums over batches of gradient times weight, and of its square, of every weight."""
    products = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    squares = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    device = device_of(model)
    with kept_as_was(model):
        model.eval()
        for inputs, targets in batches:
            model.zero_grad(set_to_none=True)
            loss(model(inputs.to(device)), targets.to(device)).backward()  # type: ignore[no-untyped-call]
            for name, weight in weights.items():
                if weight.grad is not None:
                    product = weight.grad.double() * weight.detach().double()
                    products[name] += product
                    squares[name] += product.square()
    detached = ({n: t.detach() for n, t in each.items()} for each in (products, squares))
    first, second = detached
    return first, second
