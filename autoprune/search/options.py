"""Options of every group with their predicted loss, and the solver's problem that they make together with the costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autoprune.search.cost_model import CostModel
from autoprune.search.profile import CutLoss, Profile, Timed
from autoprune.search.solver import Array, Choices, Pair, Problem
from autoprune.space.groups import Group, Groups, is_inside, kept_count
from autoprune.space.quantization import INTEGER_BITS, Bits
from autoprune.space.recipe import GroupChoice, Recipe, Recovery
from autoprune.space.search_space import SearchSpace
from autoprune.space.shapes import LayerShape

# A loss that grew by less cannot be told from none on a few hundred examples: as a share of the dense loss + 0.05, and
# in nats for a divergence.
_LEAST_GROWTH = 1e-3
_LEAST_DIVERGENCE = 5e-5


@dataclass(frozen=True)
class GroupOptions:
    """The options of one group.

    Attributes:
        group: The group.
        kept: Kept units of each option.
        ratio: Share removed.
        bits: Bit-width.
        criterion: The criterion that lost least at this width; empty where nothing is cut.
        loss: Predicted growth of the loss; see :class:`~autoprune.search.profile.CutLoss`.
    """

    group: Group
    kept: tuple[int, ...]
    ratio: tuple[float, ...]
    bits: tuple[Bits, ...]
    criterion: tuple[str, ...]
    loss: Array

    def nearest(self, kept: int, bits: int) -> int:
        """Return the option with these bits, or any, that keeps a number nearest to ``kept``."""
        if kept == 0 and 0 in self.kept:
            return self.kept.index(0)
        apart = [
            abs(k - kept) + (0 if b == bits else 10 * self.group.size)
            for k, b in zip(self.kept, self.bits, strict=True)
        ]
        return int(np.argmin(apart))


class Options:
    """All options, and recipes as rows of option numbers and back.

    Args:
        profile: What was measured.
        groups: Groups of the model.
        space: What may be tried.
        costs: Predicts bytes and latency.
    """

    def __init__(self, profile: Profile, groups: Groups, space: SearchSpace, costs: CostModel) -> None:
        self.profile = profile
        self.groups = groups
        self.space = space
        self.costs = costs
        floor = _LEAST_GROWTH * (profile.dense_loss + 0.05)
        if profile.measure == "divergence":
            floor = _LEAST_DIVERGENCE
        by_group: dict[str, list[CutLoss]] = {}
        for cut in profile.cuts:
            by_group.setdefault(cut.group, []).append(cut)
        self.of: tuple[GroupOptions, ...] = tuple(
            group_options(g, space, by_group.get(g.name, []), _rounding(profile, g, space), floor)
            for g in groups.groups
        )

    def corrected(self, results: Sequence[Timed]) -> Options:
        """Return the options with costs that are corrected by trials."""
        return Options(self.profile, self.groups, self.space, self.costs.corrected(results))

    @cached_property
    def problem(self) -> Problem:
        """The solver's tables for these options."""
        return make_problem(self.of, self.costs)

    def recipe(self, choice: Choices, recovery: Recovery) -> Recipe:
        """Return the recipe of a row of option numbers.

        Args:
            choice: ``(groups,)``.
            recovery: What is done after the cut.
        """
        chosen: dict[str, GroupChoice] = {}
        default = {kind: names[0] for kind, names in self.space.criteria.items()}
        for options, option in zip(self.of, choice, strict=True):
            criterion = options.criterion[option]
            own = criterion if criterion != default.get(options.group.type) else ""
            chosen[options.group.name] = GroupChoice(
                ratio=options.ratio[option], bits=options.bits[option], criterion=own
            )
        return Recipe(groups=chosen, criterion=default, width=self.space.width, recovery=recovery,
            quantization=self.space.quantization.default(),
        )  # fmt: skip

    def encode(self, recipe: Recipe) -> Choices:
        """Return the row of option numbers that comes nearest to a recipe."""
        row = []
        for options in self.of:
            choice = recipe.choice(options.group.name)
            kept = kept_count(options.group.size, choice.ratio, recipe.width)
            row.append(options.nearest(kept, choice.bits))
        return np.array(row, dtype=np.int64)

    def canonical(self, choices: Choices) -> Choices:
        """Return the rows that stand for all of the same networks: groups in a block that is gone count as whole.

        Args:
            choices: ``(n, groups)``, or one row ``(groups,)``.

        Returns:
            Of the same shape.
        """
        if not len(self._has_block):
            return choices
        rows = np.atleast_2d(choices)
        emptied = np.stack([none[rows[:, i]] for i, none in enumerate(self._keeps_none)], axis=1)
        gone = emptied[:, self._has_block]
        found = rows.copy()
        for index, inside in enumerate(self._inside):
            # A group is away with the last layer that makes its units.
            away = np.all(np.any(gone[:, None, :] & inside[None], axis=2), axis=1) & np.any(gone, axis=1)
            found[away & ~emptied[:, index], index] = 0
        return found.reshape(choices.shape)

    @cached_property
    def _keeps_none(self) -> list[NDArray[np.bool_]]:
        """For each group which options keep no unit."""
        return [np.array(options.kept) == 0 for options in self.of]

    @cached_property
    def _has_block(self) -> NDArray[np.intp]:
        """The groups that take a block away where none of their units is kept."""
        return np.flatnonzero([bool(options.group.block) for options in self.of])

    @cached_property
    def _inside(self) -> list[NDArray[np.bool_]]:
        """For each group in which of those blocks each layer lies that makes its units, ``(layers, blocks)``."""
        blocks = [self.of[index].group.block for index in self._has_block]
        return [
            np.array(
                [[is_inside(m.layer, (b,)) for b in blocks] for m in o.group.members if m.axis == "out"],
                dtype=bool,
            ).reshape(-1, len(blocks))
            for o in self.of
        ]

    def predicted_costs(self, choice: Choices) -> tuple[float, float]:
        """Return predicted size and latency of a row of option numbers, as shares of the dense network's."""
        kept = self.kept(choice)
        bits = {o.group.name: o.bits[i] for o, i in zip(self.of, choice, strict=True)}
        return self.costs.size(kept, bits), self.costs.latency(kept, bits)

    def within(self, choice: Choices) -> list[NDArray[np.bool_]]:
        """Return for each group which options keep no more units than a row of option numbers does."""
        parent = self.kept(choice)
        return [np.array([kept <= parent[o.group.name] for kept in o.kept]) for o in self.of]

    def kept(self, choice: Choices) -> dict[str, int]:
        """Return the kept units of every group."""
        return {o.group.name: o.kept[i] for o, i in zip(self.of, choice, strict=True)}


def _rounding(profile: Profile, group: Group, space: SearchSpace) -> dict[int, float]:
    """Return the growth of the loss by each bit-width of a group, never falling with fewer bits."""
    found: dict[int, float] = {}
    for bits in sorted(space.bits_of(group), reverse=True):
        found[bits] = max([profile.rounding(group.name, bits), *found.values()])
    return found


def group_options(
    group: Group, space: SearchSpace, cuts: Sequence[CutLoss], rounding: Mapping[int, float], floor: float
) -> GroupOptions:
    """Return the options of one group, losses never falling as more is removed.

    Args:
        group: The group.
        space: What may be tried.
        cuts: Its entries of the profile.
        rounding: Growth of the loss by bit-width; 0 for those that are not named.
        floor: Least growth that a cut counts as.
    """
    losses: dict[int, tuple[float, str]] = {group.size: (0.0, "")}
    ratios = {kept_count(group.size, ratio, space.width): ratio for ratio in reversed(space.ratios_of(group))}
    for kept in sorted(ratios, reverse=True):
        if kept == group.size:
            continue
        entries = [cut for cut in cuts if cut.kept == kept and cut.criterion in space.criteria[group.type]]
        best = min(_trusted(entries, cuts), key=lambda cut: cut.growth, default=None)
        criterion = best.criterion if best else space.criteria[group.type][0]
        growth = max(floor, best.growth if best else _unknown(group, kept))
        above = max(loss for loss, _ in losses.values())
        losses[kept] = (max(growth, above), criterion)
    rows = [
        (
            kept,
            ratios[kept],
            bits,
            losses[kept][1],
            losses[kept][0] + (max(rounding.get(bits, 0.0), floor / 10) if bits <= INTEGER_BITS else 0.0),
        )
        for kept in sorted(ratios, reverse=True)
        for bits in (space.bits_of(group) if kept else space.bits_of(group)[:1])
    ]
    kept_units, shares, widths, criteria, growths = zip(*rows, strict=True)
    return GroupOptions(group, kept_units, shares, widths, criteria, np.array(growths))


def _trusted(entries: Sequence[CutLoss], cuts: Sequence[CutLoss]) -> Sequence[CutLoss]:
    """Return the entries of one width that may be compared.

    A gradient's estimate is least for the criterion that ranks by that gradient, whatever that is worth. So what was
    measured goes before any estimate, and estimates by criteria that were measured at other widths before the others.
    """
    known = {cut.criterion for cut in cuts if cut.measured}
    return (
        [cut for cut in entries if cut.measured]
        or [cut for cut in entries if cut.criterion in known]
        or entries[:1]
    )


def _unknown(group: Group, kept: int) -> float:
    """Return a growth for a width of which nothing is known: as the square of what is removed."""
    return float((1 - kept / group.size) ** 2)


def make_problem(options: Sequence[GroupOptions], costs: CostModel) -> Problem:
    """Lay the cost of every layer into the tables of the groups that it depends on.

    A layer's bytes and time depend on the group that makes it and on the groups that it reads. With one of those they
    are a table over both groups' options; with several (a concatenation), the changes by each alone are added.
    """
    index = {o.group.name: i for i, o in enumerate(options)}
    size = [np.zeros(len(o.kept)) for o in options]
    latency = [np.zeros(len(o.kept)) for o in options]
    pairs: dict[tuple[int, int], tuple[Array, Array]] = {}
    for shape in costs.shapes:
        own = index[shape.group]
        # Groups that make it beside its own (the width of heads) change it as those that it reads do.
        readers = [index[use.group] for use in (*shape.reads, *shape.makes) if use.group != shape.group]
        readers += [own for use in shape.reads if use.group == shape.group]
        whole_bytes, whole_latency = _layer_tables(shape, options[own], None, costs)
        size[own] += whole_bytes
        latency[own] += whole_latency
        for other in dict.fromkeys(readers):
            table_bytes, table_latency = _layer_tables(shape, options[own], options[other], costs)
            more_bytes, more_latency = (
                table_bytes - whole_bytes[:, None],
                table_latency - whole_latency[:, None],
            )
            if other == own:
                size[own] += np.diag(more_bytes)
                latency[own] += np.diag(more_latency)
                continue
            first, second = min(own, other), max(own, other)
            if first != own:
                more_bytes, more_latency = more_bytes.T, more_latency.T
            known = pairs.get((first, second), (np.zeros(()), np.zeros(())))
            pairs[first, second] = (known[0] + more_bytes, known[1] + more_latency)
        if shape.block and index[shape.block] not in (own, *readers):
            # It goes with a block of which it neither makes nor reads the group: a table over both takes it away.
            first, second = min(own, index[shape.block]), max(own, index[shape.block])
            gone = np.array([float(kept == 0) for kept in options[index[shape.block]].kept])
            away = [-np.outer(table, gone) for table in (whole_bytes, whole_latency)]
            away = away if first == own else [table.T for table in away]
            known = pairs.get((first, second), (np.zeros(()), np.zeros(())))
            pairs[first, second] = (known[0] + away[0], known[1] + away[1])
    return Problem(
        loss=tuple(o.loss for o in options),
        size=tuple(size),
        latency=tuple(latency),
        pairs=tuple(Pair(a, b, *tables) for (a, b), tables in pairs.items() if _matters(*tables)),
        base_size=costs.base_bytes / costs.dense_bytes,
        base_latency=costs.base_latency,
    )


def _matters(size: Array, latency: Array) -> bool:
    return bool(np.abs(size).max() > 1e-9 or np.abs(latency).max() > 1e-9)


def _layer_tables(
    shape: LayerShape, own: GroupOptions, other: GroupOptions | None, costs: CostModel
) -> tuple[Array, Array]:
    """Return bytes and latency of a layer, as shares: by its own group's options, and another's if given."""
    name = own.group.name
    count = 1 if other is None else len(other.kept)
    size = np.zeros((len(own.kept), count))
    latency = np.zeros((len(own.kept), count))
    for i, (kept, bits) in enumerate(zip(own.kept, own.bits, strict=True)):
        own_type = costs.timed_as(name, bits)
        same = {use.group: own_type for use in shape.reads}
        states = (
            [({name: kept}, bits)]
            if other is None
            else [({name: kept, other.group.name: k}, b) for k, b in zip(other.kept, other.bits, strict=True)]
        )
        gone = np.array([shape.is_gone(counts) for counts, _ in states])
        size[i] = [costs.layer_bytes(shape, counts, {name: bits}) for counts, _ in states]
        outputs = np.array([shape.output_share(counts) for counts, _ in states])
        inputs = np.array([shape.input_share(counts) for counts, _ in states])
        # What changes its type between this group and the other alone; other readers have tables of their own.
        widths = [
            {**same, **({} if other is None else {other.group.name: costs.timed_as(other.group.name, width)})}
            for _, width in states
        ]
        converted = [
            shape.converted_share(kept_by, by, own_type)
            for (kept_by, _), by in zip(states, widths, strict=True)
        ]
        latency[i] = costs.layer_share(shape, outputs, inputs, bits, np.array(converted))
        latency[i, gone] = 0.0
    size /= costs.dense_bytes
    return (size[:, 0], latency[:, 0]) if other is None else (size, latency)
