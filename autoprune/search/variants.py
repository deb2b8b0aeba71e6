"""Variants: networks of the final phase in fewer bits than their recipes ask for, which costs no training."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from autoprune.compress.pipeline import Compressed
from autoprune.errors import TrialError
from autoprune.measure.cost import size_bytes
from autoprune.search.bench import Bench
from autoprune.search.points import FinalPoint, Points
from autoprune.search.trial import evaluate, failures_as_trial_errors
from autoprune.space.groups import Groups
from autoprune.space.recipe import Recipe
from autoprune.space.search_space import SearchSpace
from autoprune.study.artifacts import temporary_folder
from autoprune.study.front import WORST_DROP

# A network that lost more on its way to a width than this share of what a front may lose is not tried in fewer bits.
_MOST_LOST = 0.5

# Capability on the search split, latency of the trial as a share of the dense network's, bytes.
_Costs = tuple[float, float, int]


def narrower(recipe: Recipe, groups: Groups, space: SearchSpace) -> Iterator[tuple[int, Recipe]]:
    """Yield a recipe with all its integers in at most so many bits, from the most bits on.

    Groups of other formats, and those that have fewer bits already, stay as they are. A network that was trained with
    its integers has none: its weights lie on their grids.

    Args:
        recipe: The recipe of a trained network.
        groups: Groups of the model.
        space: What may be tried.
    """
    own = {g.name: recipe.choice(g.name) for g in groups.groups if recipe.choice(g.name).has_integers}
    if recipe.trains_integers or not own:
        return
    most = max(choice.bits for choice in own.values())
    allowed = {g.name: space.bits_of(g) for g in groups.groups if g.name in own}
    widths = sorted({b for choices in allowed.values() for b in choices if b < most}, reverse=True)
    before = recipe
    for width in widths:
        changed = {
            name: choice.model_copy(update={"bits": max(lower)})
            for name, choice in own.items()
            if choice.bits > width and (lower := [b for b in allowed[name] if b <= width])
        }
        made = recipe.model_copy(update={"groups": {**recipe.groups, **changed}})
        if made != before:
            yield width, made
        before = made


class Variants:
    """Finds which variants of a final phase's points are worth a place beside them.

    Args:
        bench: What the trials share.
        points: Makes points.
        space: What may be tried.
        fits: Whether there is time to try, make and measure one more, for so many that are to be measured already.
    """

    def __init__(self, bench: Bench, points: Points, space: SearchSpace, fits: Callable[[int], bool]) -> None:
        self.bench = bench
        self.points = points
        self.space = space
        self.fits = fits

    def of(self, points: Sequence[FinalPoint]) -> list[FinalPoint]:
        """Return points of the same networks in fewer bits, those that no point and no other variant is better than.

        They are compared by the search split and by the latency that the search measured of the network: integers of
        all widths run in the same kernels.

        Args:
            points: The points of the phase.
        """
        found: list[FinalPoint] = []
        known = [_costs(point, point.search.value, size_bytes(point.artifact.path)) for point in points]
        lines = [self._line(point) for point in points]
        # Every network in its next width before any in the one after it.
        while lines and self.fits(len(points) + len(found)):
            line = lines.pop(0)
            made = next(line, None)
            if made is None:
                continue
            point, width, recipe, costs = made
            lines.append(line)
            if not any(_is_better(other, costs) for other in known):
                variant = self.points.make(point.parent, point.compressed, recipe, f"bits{width}")
                if variant is not None:
                    found.append(variant)
                    known.append(costs)
        return found

    def _line(self, point: FinalPoint) -> Iterator[tuple[FinalPoint, int, Recipe, _Costs]]:
        """Yield a point's variants with their costs, until one loses too much."""
        most = _MOST_LOST * WORST_DROP * max(1.0, abs(point.search.value))
        for width, recipe in narrower(point.recipe, self.bench.groups, self.space):
            try:
                costs = self._tried(point, recipe, point.compressed)
            except TrialError:
                return
            yield point, width, recipe, costs
            if point.search.value - costs[0] > most:
                return

    def _tried(self, point: FinalPoint, recipe: Recipe, network: Compressed) -> _Costs:
        folder = temporary_folder(Path(self.points.driver.paths.artifacts))
        try:
            with failures_as_trial_errors():
                artifact = self.bench.deploy(network, recipe, folder)
                search = evaluate(self.bench, artifact, self.bench.workload.data.search)
                return _costs(point, search.value, size_bytes(artifact.path))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _costs(point: FinalPoint, capability: float, size: int) -> _Costs:
    measured = point.parent.measurement
    return capability, measured.latency.ratio if measured is not None else 1.0, size


def _is_better(one: _Costs, other: _Costs) -> bool:
    """Whether one is at least as good in all, another variant that is equal included."""
    return one[0] >= other[0] and one[1] <= other[1] and one[2] <= other[2]
