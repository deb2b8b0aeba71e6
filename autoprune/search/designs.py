"""Which networks a cost model is fitted to."""

from __future__ import annotations

import random

from autoprune.search.baselines import effective_key
from autoprune.space.groups import Groups
from autoprune.space.quantization import Bits
from autoprune.space.recipe import GroupChoice, Recipe, uniform_recipe
from autoprune.space.search_space import SearchSpace

_MOST_DESIGNS = 24
# Share of the residual blocks that networks of mixed choices lack.
_TAKEN_OUT = 0.3


def design_recipes(groups: Groups, space: SearchSpace, seed: int) -> list[Recipe]:
    """Return the networks that the cost model is fitted to, the most telling first.

    The dense network; then each width for all groups alike at the smallest bits; the same at the largest bits for
    every second one; in between, networks whose groups differ in width and bits at random.
    """
    generator = random.Random(seed)  # noqa: S311
    ratios = sorted({r for g in groups.prunable for r in space.ratios_of(g) if r < 1.0} | {0.0})
    middle_first = sorted(ratios, key=lambda r: (abs(r - 0.5), r))
    middle_first = [0.0, *[r for r in middle_first if r > 0.0]]
    bits = sorted(space.bits)
    found = [Recipe()]
    for place, ratio in enumerate(middle_first):
        found.append(uniform_recipe(groups, ratio, bits[0], width=space.width))
        found.append(_mixed(groups, space, ratios, generator))
        if len(bits) > 1 and place % 2 == 1:
            found.append(uniform_recipe(groups, ratio, bits[-1], width=space.width))
    # In a space of one bit-width the first uniform network is the dense one again.
    alike = {effective_key(recipe, groups): recipe for recipe in reversed(found)}
    return list(reversed(alike.values()))[:_MOST_DESIGNS]


def _mixed(groups: Groups, space: SearchSpace, ratios: list[float], generator: random.Random) -> Recipe:
    choices: dict[str, GroupChoice] = {}
    for group in groups.groups:
        ratio = generator.choice(ratios) if group.prunable else 0.0
        if 1.0 in space.ratios_of(group) and generator.random() < _TAKEN_OUT:
            ratio = 1.0
        options = space.bits_of(group)
        # Mostly the smallest bits, as in what the search will propose.
        bits: Bits = options[0] if generator.random() < 0.75 else generator.choice(options)
        choices[group.name] = GroupChoice(ratio=ratio, bits=bits)
    return Recipe(groups=choices, width=space.width)
