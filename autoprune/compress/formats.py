"""Number formats of a recipe: which layers run in int8, and in how many bits each layer's weights are."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from autoprune.compress.lowrank import with_factors
from autoprune.space.groups import Groups
from autoprune.space.recipe import Recipe, groups_left


def int8_layers(
    recipe: Recipe, groups: Groups, kinds: Collection[str] = ("conv", "depthwise", "linear")
) -> list[str]:
    """Return the layers that the recipe asks to run in int8: the producers of its groups of integers.

    Args:
        recipe: The candidate.
        groups: Groups of the dense network.
        kinds: Kinds of layers that can run so where the network is deployed.
    """
    left = [g for g in groups_left(recipe, groups).groups if recipe.choice(g.name).runs_int8]
    able = {m.layer for g in left for m in g.members if m.own and m.axis == "out" and m.kind in kinds}
    return [layer for g in left for layer in g.producers if layer in able]


def layer_bits(model: nn.Module, recipe: Recipe, groups: Groups) -> dict[str, int]:
    """Return the bit-width of the weights of every layer that has fewer than 32."""
    return {
        layer: recipe.choice(g.name).bits
        for g in groups_left(recipe, groups).groups
        for layer in with_factors(model, g.producers)
        if recipe.choice(g.name).bits < 32
    }
