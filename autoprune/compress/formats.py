"""Number formats of a recipe: which layers run in integers, and in how many bits each layer's weights are."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from autoprune.compress.lowrank import with_factors
from autoprune.space.groups import Groups
from autoprune.space.quantization import INTEGER_BITS
from autoprune.space.recipe import Recipe, groups_left

LAYER_KINDS = ("conv", "depthwise", "linear")


def int8_layers(recipe: Recipe, groups: Groups, kinds: Collection[str] = LAYER_KINDS) -> list[str]:
    """Return the layers that the recipe asks to run in int8: the producers of its groups of integers.

    Args:
        recipe: The candidate.
        groups: Groups of the dense network.
        kinds: Kinds of layers that can run so where the network is deployed.
    """
    left = [g for g in groups_left(recipe, groups).groups if recipe.choice(g.name).runs_int8]
    able = {m.layer for g in left for m in g.members if m.own and m.axis == "out" and m.kind in kinds}
    return [layer for g in left for layer in g.producers if layer in able]


def int16_layers(recipe: Recipe, groups: Groups) -> list[str]:
    """Return the layers whose weights are integers and whose inputs the recipe asks to become 16 bits."""
    return [
        layer
        for g in groups_left(recipe, groups).groups
        if (choice := recipe.choice(g.name)).has_integers and choice.activation_bits == 16
        for layer in g.producers
    ]


def dynamic_layers(model: nn.Module, recipe: Recipe, groups: Groups) -> list[str]:
    """Return the linear layers that find the range of their 8 bit inputs at each inference.

    Args:
        model: The compressed network.
        recipe: What made it.
        groups: Groups of the dense network.
    """
    return _linear(model, recipe, groups) if recipe.quantization.activations == "dynamic" else []


def fp8_layers(model: nn.Module, recipe: Recipe, groups: Groups) -> list[str]:
    """Return the linear layers that run in fp8.

    Args:
        model: The compressed network.
        recipe: What made it.
        groups: Groups of the dense network.
    """
    if recipe.quantization.activations != "fp8":
        return []
    bits = _bits(model, recipe, groups)
    return [name for name in _linear(model, recipe, groups) if bits[name] == INTEGER_BITS]


def _linear(model: nn.Module, recipe: Recipe, groups: Groups) -> list[str]:
    """Return the linear layers whose weights and inputs have 8 bits at most."""
    asked = with_factors(model, int8_layers(recipe, groups))
    modules = dict(model.named_modules())
    return [name for name in asked if isinstance(modules.get(name), nn.Linear)]


def layer_bits(model: nn.Module, recipe: Recipe, groups: Groups) -> dict[str, int]:
    """Return the bit-width of the weights of every layer that has fewer than 32; of those in fp8 none."""
    floats = fp8_layers(model, recipe, groups)
    return {name: bits for name, bits in _bits(model, recipe, groups).items() if name not in floats}


def grid_bits(
    model: nn.Module,
    recipe: Recipe,
    groups: Groups,
    kinds: Collection[str] = LAYER_KINDS,
    int8_bits: int = INTEGER_BITS,
) -> dict[str, int]:
    """Return the bit-width of the weights of every layer as the target's kernels take them.

    As :func:`layer_bits`, but for layers that run in int8 where kernels need narrower weights.

    Args:
        model: The compressed network.
        recipe: What made it.
        groups: Groups of the dense network.
        kinds: Kinds of layers that run in int8 where the network is deployed.
        int8_bits: Most bits of the weights that int8 kernels add up rightly there.
    """
    bits = layer_bits(model, recipe, groups)
    eight = with_factors(model, int8_layers(recipe, groups, kinds))
    return bits | {name: min(bits[name], int8_bits) for name in eight if name in bits}


def _bits(model: nn.Module, recipe: Recipe, groups: Groups) -> dict[str, int]:
    return {
        layer: recipe.choice(g.name).bits
        for g in groups_left(recipe, groups).groups
        for layer in with_factors(model, g.producers)
        if recipe.choice(g.name).bits < 32
    }
