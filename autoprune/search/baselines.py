"""The points that every study measures before it searches, and the test for equal candidates. Torch-free."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from autoprune.space.groups import Groups, kept_count
from autoprune.space.mask import Mask
from autoprune.space.quantization import INTEGER_BITS, ActivationBits, Bits, Quantization
from autoprune.space.recipe import Order, Ranking, Recipe, Recovery, groups_left, uniform_recipe
from autoprune.space.schedule import Schedule
from autoprune.space.search_space import SearchSpace


@dataclass(frozen=True)
class Baseline:
    """A candidate that needs no search.

    Attributes:
        label: For people, marked so in every table.
        recipe: The candidate.
    """

    label: str
    recipe: Recipe


def baselines(
    groups: Groups,
    ratios: Iterable[float],
    bits: Sequence[Bits],
    criterion: str,
    width: int,
    recovery: Recovery,
    ranking: Ranking = "group",
    schedule: Schedule | None = None,
    order: Order = "prune-tune-quantize",
    quantization: Quantization | None = None,
    activation_bits: ActivationBits = 8,
) -> list[Baseline]:
    """Return integers alone and the uniform ratios, with and without int8 as far as the space allows.

    The dense network is not among them: it is trial 0. Integers come first, being free, then the ratios from
    the mildest on, each with int8 before float because int8 is what an engineer would ship.

    Args:
        groups: Groups of the model.
        ratios: Uniform shares removed, each in ``(0, 1)``.
        bits: Bit-widths that the space allows.
        criterion: Criterion for every group type.
        width: Step of kept counts.
        recovery: Recovery of the uniform recipes.
        ranking: Ranking of the uniform recipes.
        schedule: When they remove channels; at once if not given.
        order: Order of the stages of the uniform recipes.
        quantization: How integers are made; the nearest of a grid up to the largest magnitude if not given.
        activation_bits: Bit-width of the inputs of layers with integer weights.
    """
    # What needs no training is not to get any.
    free = None if quantization is None else quantization.model_copy(update={"aware": 0.0})
    alike = partial(
        uniform_recipe,
        groups,
        criterion=criterion,
        width=width,
        recovery=recovery,
        quantization=quantization,
        activation_bits=activation_bits,
    )
    integers = sorted({b for b in bits if b <= INTEGER_BITS}, reverse=True)
    found = [Baseline(f"int{b}", alike(0.0, b, quantization=free)) for b in integers]
    if not groups.prunable:
        return found
    for ratio in sorted(ratios):
        if 8 in bits:
            recipe = alike(ratio, 8, ranking=ranking, order=order)
            found.append(Baseline(f"uniform {ratio:g} int8", recipe))
        if 32 in bits:
            recipe = alike(ratio, 32, ranking=ranking, order=order)
            found.append(Baseline(f"uniform {ratio:g}", recipe))
    return [Baseline(b.label, _scheduled(b.recipe, schedule or Schedule())) for b in found]


def _scheduled(recipe: Recipe, schedule: Schedule) -> Recipe:
    """Return a recipe with a schedule, if it prunes."""
    return recipe.model_copy(update={"schedule": schedule}) if recipe.prunes else recipe


def _orders(space: SearchSpace, removed: float, schedule: Schedule) -> Sequence[Order]:
    """Return the orders that make a difference, and that go with a schedule."""
    trains = space.default_recovery().finetune_steps > 0
    return space.orders if removed and trains and schedule.kind == "one_shot" else space.orders[:1]


def grid_recipes(space: SearchSpace, groups: Groups, seed: int) -> list[Recipe]:
    """Return every uniform recipe of a space, each of its settings by each other that matters, shuffled.

    A grid over single groups would have more recipes than atoms; this is the grid that engineers try by hand.

    Args:
        space: What may be tried.
        groups: Groups of the model.
        seed: Seed of the order.
    """
    recovery = space.default_recovery()
    criteria = dict.fromkeys(name for names in space.criteria.values() for name in names)
    found = [
        _scheduled(
            uniform_recipe(
                groups,
                ratio,
                bits,
                criterion,
                space.width,
                recovery,
                ranking,
                sparsity=sparsity,
                mask=mask,
                rank_ratio=rank,
                order=order,
                activation_bits=inputs,
                quantization=quantization,
            ),
            schedule,
        )
        for ratio in space.ratios
        if ratio < 1.0
        for criterion in (criteria if ratio > 0 else list(criteria)[:1])
        for ranking in (space.rankings if ratio > 0 else space.rankings[:1])
        for bits in space.bits
        for inputs in (space.activation_bits if bits <= INTEGER_BITS else space.activation_bits[:1])
        for quantization in space.quantization.of_bits(bits)
        for sparsity in space.sparsities
        for schedule in (list(space.schedules.each()) if ratio > 0 or sparsity > 0 else [Schedule()])
        for mask in (space.masks.every() if sparsity > 0 else [Mask()])
        for rank in space.rank_ratios
        for order in _orders(space, ratio or rank or sparsity, schedule)
    ]
    random.Random(seed).shuffle(found)  # noqa: S311
    return found


def architecture_key(recipe: Recipe, groups: Groups) -> str:
    """Return a text that is equal for recipes that train the same network: all but the bit-widths."""
    rest = groups_left(recipe, groups)
    kept = {
        g.name: kept_count(g.size, recipe.choice(g.name).ratio, recipe.width)
        for g in rest.groups
        if g.prunable and recipe.choice(g.name).ratio > 0
    }
    blocks = groups.removed_blocks(recipe.kept_counts(groups))
    sparsities = {g.name: s for g in rest.groups if (s := recipe.choice(g.name).sparsity) > 0}
    ranks = {g.name: r for g in rest.groups if (r := recipe.choice(g.name).rank_ratio) > 0}
    integers = {
        g.name: [c.bits, c.activation_bits] for g in rest.groups if (c := recipe.choice(g.name)).has_integers
    }
    trained = integers if recipe.trains_integers else {}
    if not kept and not blocks and not sparsities and not ranks and not trained:
        return "dense"
    masked = {"sparsities": sparsities, "mask": recipe.mask.model_dump(mode="json")} if sparsities else {}
    parts: dict[str, Any] = {
        "kept": kept,
        "blocks": blocks,
        "criterion": {name: recipe.criterion_of(groups.by_name[name]) for name in kept},
        "recovery": recipe.recovery.model_dump(mode="json"),
        **masked,
        "ranks": ranks,
        "width": recipe.width if ranks else 0,
        "order": recipe.order if recipe.recovery.finetune_steps else "",
        # What other rankings keep follows from the sum of the counts, the scores and this.
        "ranking": recipe.ranking,
    }
    if trained:
        parts["integers"] = [trained, recipe.quantization.aware]
    if recipe.schedule.kind != "one_shot":
        parts["schedule"] = recipe.schedule.model_dump(mode="json")
    return json.dumps(parts, sort_keys=True)


def effective_key(recipe: Recipe, groups: Groups) -> str:
    """Return a text that is equal for recipes that give the same artifact.

    Two ratios that keep the same count, and choices that nothing depends on, make no difference.
    """
    left = groups_left(recipe, groups)
    chosen = {g.name: recipe.choice(g.name) for g in left.groups if recipe.choice(g.name).bits != 32}
    bits: dict[str, Any] = {name: choice.bits for name, choice in chosen.items()}
    integers = {name: choice for name, choice in chosen.items() if choice.has_integers}
    inputs = {name: choice.activation_bits for name, choice in integers.items() if not choice.runs_int8}
    key = architecture_key(recipe, groups) + "|" + json.dumps([bits, inputs], sort_keys=True)
    made = recipe.quantization.of_weights(integers=bool(integers), halves=16 in bits.values())
    if integers and len(inputs) == len(integers):  # nothing reads 8 bits
        made = made.model_copy(update={"activations": "static"})
    return key + "|" + json.dumps(made.content())
