"""The formats of a recipe's network: weights on their grids, and what each layer is asked to run in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from autoprune.compress.equalisation import equalised
from autoprune.compress.formats import (
    LAYER_KINDS,
    dynamic_layers,
    fp8_layers,
    grid_bits,
    int8_layers,
    int16_layers,
    layer_bits,
)
from autoprune.compress.lowrank import with_factors
from autoprune.compress.quantization import quantized
from autoprune.deploy.runtime import Formats, StoredWeight
from autoprune.space.groups import Groups
from autoprune.space.quantization import INTEGER_BITS
from autoprune.space.recipe import Recipe


def stored_weights(
    model: nn.Module,
    recipe: Recipe,
    groups: Groups,
    calibration: Sequence[Tensor],
    kinds: Collection[str] = LAYER_KINDS,
    int8_bits: int = INTEGER_BITS,
) -> tuple[nn.Module, dict[str, StoredWeight]]:
    """Rescale a network and put its weights on the grids that a recipe asks for.

    Weights of 8 bits that run in static int8 and are the nearest on grids up to the largest magnitudes are left to the
    runtime's quantizer, which makes the same.

    Args:
        model: The compressed network on the CPU in evaluation mode; it is not changed.
        recipe: What made it.
        groups: Groups of the dense network.
        calibration: Batches of inputs.
        kinds: Kinds of layers that run in int8 where the network is deployed.
        int8_bits: Most bits of the weights that int8 kernels add up rightly there.

    Returns:
        The network with these weights, and how the layers whose weights are not left to the runtime are stored.

    Raises:
        CompressionError: If a layer cannot be quantized; names it.
    """
    how = recipe.quantization
    asked, bits = layer_bits(model, recipe, groups), grid_bits(model, recipe, groups, kinds, int8_bits)
    usual: set[str] = set()
    if how.usual_integers:
        usual = set(with_factors(model, int8_layers(recipe, groups, kinds)))
        usual -= set(dynamic_layers(model, recipe, groups))
    own = {
        name: width
        for name, width in bits.items()
        if width <= INTEGER_BITS and (asked[name] < INTEGER_BITS or name not in usual)
    }
    if how.equalize != "none" and any(width <= INTEGER_BITS for width in bits.values()):
        model = equalised(model, how, calibration)
    stored = {}
    if own:
        made = quantized(model, own, how, calibration)
        model = made.model
        for name, codes in made.codes.items():
            scales = made.scales[name].float().numpy() if name in made.scales else None
            stored[name] = StoredWeight(own[name], codes.numpy(), scales)
    halves = {
        name: StoredWeight(width, bfloat16=how.half == "bfloat16")
        for name, width in bits.items()
        if width > INTEGER_BITS
    }
    return model, stored | halves


def formats_of(
    model: nn.Module,
    recipe: Recipe,
    groups: Groups,
    weights: dict[str, StoredWeight],
    kinds: Collection[str] = LAYER_KINDS,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Formats:
    """Return what the layers of a recipe's network are asked to run in.

    Args:
        model: The compressed network.
        recipe: What made it.
        groups: Groups of the dense network.
        weights: How its weights are stored, from :func:`stored_weights`.
        kinds: Kinds of layers that run in int8 where the network is deployed.
        ranges: Ranges of inputs by layer that it was trained with; the others are calibration's.
    """
    dynamic = dynamic_layers(model, recipe, groups)
    fp8 = fp8_layers(model, recipe, groups)
    static = [
        n
        for n in with_factors(model, int8_layers(recipe, groups, kinds))
        if n not in dynamic and n not in fp8
    ]
    int16 = with_factors(model, int16_layers(recipe, groups))
    return Formats(
        int8=static,
        dynamic=dynamic,
        fp8=fp8,
        int16=int16,
        weights=weights,
        packed=recipe.masks,
        ranges=ranges or {},
    )
