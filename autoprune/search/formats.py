"""How the weights of a recipe's network are stored."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from autoprune.compress.formats import int8_layers, layer_bits
from autoprune.compress.lowrank import with_factors
from autoprune.compress.quantization import quantized
from autoprune.deploy.runtime import StoredWeight
from autoprune.space.groups import Groups
from autoprune.space.quantization import INTEGER_BITS, Quantization
from autoprune.space.recipe import Recipe


def stored_weights(
    model: nn.Module,
    recipe: Recipe,
    groups: Groups,
    calibration: Sequence[Tensor],
    int8: Collection[str] | None = None,
) -> tuple[nn.Module, dict[str, StoredWeight]]:
    """Put the weights of a network on the grids that a recipe asks for.

    Weights of 8 bits that run in int8 and end at their largest magnitudes are left to the runtime's quantizer, which
    does the same.

    Args:
        model: The compressed network on the CPU in evaluation mode; it is not changed.
        recipe: What made it.
        groups: Groups of the dense network.
        calibration: Batches of inputs.
        int8: Layers that are to run in int8; all that the recipe asks it of if not given.

    Returns:
        The network with these weights, and how the layers whose weights are not left to the runtime are stored.

    Raises:
        CompressionError: If a layer cannot be quantized; names it.
    """
    bits = layer_bits(model, recipe, groups)
    if int8 is None:
        int8 = with_factors(model, int8_layers(recipe, groups))
    usual = set(int8) if recipe.quantization == Quantization() else set()
    own = {
        name: width
        for name, width in bits.items()
        if width < INTEGER_BITS or (width == INTEGER_BITS and name not in usual)
    }
    codes: dict[str, Tensor] = {}
    if own:
        model, codes = quantized(model, own, recipe.quantization, calibration)
    stored = {name: StoredWeight(own[name], each.numpy()) for name, each in codes.items()}
    halves = {name: StoredWeight(width) for name, width in bits.items() if width > INTEGER_BITS}
    return model, stored | halves
