"""Solver: the recipes that a profile predicts to be best, over every weight of size and latency at once.

Every variable (a group) has options with a predicted loss, bytes and time. Bytes and time of a layer depend on the
group that it makes and on the one that it reads, so beside a table for each variable there are tables for pairs.
The weighted sum is minimised by iterated conditional modes [Besag1986]_, exactly where there are no pairs. Networks
have some dozens of variables; hundreds of weightings are solved together in milliseconds.

References:
    [Besag1986] On the Statistical Analysis of Dirty Pictures, JRSS B 48, section 2.5.
    [Everett1963] Generalized Lagrange Multiplier Method, Operations Research 11: each solution of a weighting is
        optimal for the caps that it just keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Choices = NDArray[np.int64]

# Sweeps over all variables; pairs settle in two or three.
_MOST_SWEEPS = 8
# Weights of the grid that a solution under caps starts from, and how often it is refined around the best.
_GRID_WEIGHTS = 16
_GRID_SHARES = 9
_REFINEMENTS = 3
# Changes of one variable that are tried in exchange for another, and exchanges that are computed exactly.
_EXCHANGED = 200
_EXCHANGES = 20


@dataclass(frozen=True)
class Pair:
    """What two variables cost together beyond their own tables.

    Attributes:
        first: Index of a variable.
        second: Index of another one.
        size: ``(options of first, options of second)``.
        latency: The same shape.
    """

    first: int
    second: int
    size: Array
    latency: Array


@dataclass(frozen=True)
class Problem:
    """Predicted loss, size and latency of every option.

    Attributes:
        loss: For each variable ``(options,)``, non-negative; losses add up.
        size: For each variable ``(options,)``, as shares of the dense file.
        latency: For each variable ``(options,)``, as shares of the dense latency.
        pairs: What depends on two variables.
        base_size: Share that no choice changes.
        base_latency: Share that no choice changes.
    """

    loss: tuple[Array, ...]
    size: tuple[Array, ...]
    latency: tuple[Array, ...]
    pairs: tuple[Pair, ...] = ()
    base_size: float = 0.0
    base_latency: float = 0.0

    def with_losses(self, loss: Sequence[Array]) -> Problem:
        """Return the same costs with other losses."""
        return replace(self, loss=tuple(loss))

    @cached_property
    def neighbours(self) -> tuple[tuple[tuple[int, Array, Array], ...], ...]:
        """For each variable its pairs as ``(other, size, latency)``, the tables with this variable first."""
        found: list[list[tuple[int, Array, Array]]] = [[] for _ in self.loss]
        for pair in self.pairs:
            found[pair.first].append((pair.second, pair.size, pair.latency))
            found[pair.second].append((pair.first, pair.size.T, pair.latency.T))
        return tuple(tuple(each) for each in found)

    def evaluate(self, choices: Choices) -> Array:
        """Return loss, size and latency of many choices.

        Args:
            choices: Option of every variable, ``(n, variables)``.

        Returns:
            ``(n, 3)``.
        """
        loss = np.zeros(len(choices))
        size = np.full(len(choices), self.base_size)
        latency = np.full(len(choices), self.base_latency)
        for index in range(len(self.loss)):
            chosen = choices[:, index]
            loss += self.loss[index][chosen]
            size += self.size[index][chosen]
            latency += self.latency[index][chosen]
        for pair in self.pairs:
            first, second = choices[:, pair.first], choices[:, pair.second]
            size += pair.size[first, second]
            latency += pair.latency[first, second]
        return np.stack([loss, size, latency], axis=1)


def solve(
    problem: Problem,
    size_weights: Array,
    latency_weights: Array,
    *,
    allowed: Sequence[NDArray[np.bool_]] | None = None,
) -> Choices:
    """Minimise loss + weight x size + weight x latency for many weightings at once.

    Args:
        problem: Tables of the options.
        size_weights: ``(n,)``, non-negative.
        latency_weights: ``(n,)``, non-negative.
        allowed: For each variable which options may be chosen; all if not given.

    Returns:
        Choices, ``(n, variables)``; where there are pairs a local optimum that no change of one variable betters.
    """
    own: list[Array] = []
    for index, loss in enumerate(problem.loss):
        cost = (
            loss[None, :]
            + size_weights[:, None] * problem.size[index]
            + latency_weights[:, None] * problem.latency[index]
        )
        if allowed is not None:
            cost = np.where(allowed[index][None, :], cost, np.inf)
        own.append(cost)
    choices = np.stack([cost.argmin(axis=1) for cost in own], axis=1).astype(np.int64)
    if not problem.pairs:
        return choices
    for _ in range(_MOST_SWEEPS):
        before = choices.copy()
        for index, cost in enumerate(own):
            total = cost
            for other, size, latency in problem.neighbours[index]:
                theirs = choices[:, other]
                total = total + size_weights[:, None] * size[:, theirs].T
                total = total + latency_weights[:, None] * latency[:, theirs].T
            choices[:, index] = total.argmin(axis=1)
        if np.array_equal(before, choices):
            break
    return choices


def sweep(
    problem: Problem,
    *,
    weights: int = 24,
    shares: int = 7,
    objectives: Sequence[str] = ("size", "latency"),
    allowed: Sequence[NDArray[np.bool_]] | None = None,
) -> Choices:
    """Return the different solutions over a grid of weightings: the predicted front's convex part.

    Args:
        problem: Tables of the options.
        weights: Number of total weights, on a logarithmic scale from no cut at all to the deepest one.
        shares: Number of ways to divide a weight between size and latency.
        objectives: Which of ``size`` and ``latency`` count.
        allowed: For each variable which options may be chosen; all if not given.

    Returns:
        ``(n, variables)``, no two rows alike.
    """
    share = _latency_shares(shares, objectives)
    total = np.logspace(*weight_range(problem), weights)
    size_weights = np.outer(total, 1 - share).ravel()
    latency_weights = np.outer(total, share).ravel()
    return np.unique(solve(problem, size_weights, latency_weights, allowed=allowed), axis=0)


def weight_range(problem: Problem) -> tuple[float, float]:
    """Return the decimal logarithms of the least and the largest weight that make a difference."""
    positive = np.concatenate([loss[loss > 0] for loss in problem.loss] or [np.empty(0)])
    if not len(positive):
        return -3.0, 3.0
    # An option's saving is a share of the whole, from about a thousandth to all of it.
    return float(np.log10(positive.min())) - 0.5, float(np.log10(positive.max())) + 3.0


def _latency_shares(shares: int, objectives: Sequence[str]) -> Array:
    if "size" not in objectives:
        return np.ones(1)
    return np.linspace(0.0, 1.0, shares) if "latency" in objectives else np.zeros(1)


def solve_capped(
    problem: Problem,
    *,
    max_size: float = np.inf,
    max_latency: float = np.inf,
    max_loss: float = np.inf,
    objectives: Sequence[str] = ("size", "latency"),
) -> Choices | None:
    """Return the best choice that keeps hard caps.

    Without a cap on the loss it is the least loss; with one it is the least sum of size and latency.

    Args:
        problem: Tables of the options.
        max_size: Most of the dense file's bytes, a share.
        max_latency: Most of the dense latency, a share.
        max_loss: Most predicted loss.
        objectives: Which of ``size`` and ``latency`` count where the loss is capped.

    Returns:
        ``(variables,)``; None if no choice that was found keeps the caps.
    """
    caps = np.array([max_loss, max_size, max_latency])
    costs = np.array([0.0, float("size" in objectives), float("latency" in objectives)])
    wanted = costs if np.isfinite(max_loss) else np.array([1.0, 0.0, 0.0])
    low, high = weight_range(problem)
    share = np.linspace(0.0, 1.0, _GRID_SHARES)
    best: Choices | None = None
    for _ in range(_REFINEMENTS):
        total = np.logspace(low, high, _GRID_WEIGHTS)
        found = solve(problem, np.outer(total, 1 - share).ravel(), np.outer(total, share).ravel())
        values = problem.evaluate(found)
        kept = (values <= caps).all(axis=1)
        if not kept.any():
            break
        scores = np.where(kept, values @ wanted, np.inf)
        place = int(scores.argmin())
        best = found[place]
        step = (high - low) / (_GRID_WEIGHTS - 1)
        centre = low + step * (place // _GRID_SHARES)
        low, high = centre - step, centre + step
    return None if best is None else _descend(problem, best, caps, wanted)


def _descend(problem: Problem, choice: Choices, caps: Array, wanted: Array) -> Choices:
    """Better ``wanted`` within the caps by changing one variable, or one for another: the duality gap's mending."""
    while True:
        score = float(problem.evaluate(choice[None])[0] @ wanted)
        single = neighbours_of(problem, choice)
        moves = np.concatenate([single, _exchanges(problem, choice, single, caps, wanted)])
        values = problem.evaluate(moves)
        scores = np.where((values <= caps).all(axis=1), values @ wanted, np.inf)
        place = int(scores.argmin())
        if not scores[place] < score - 1e-12:
            return choice
        choice = moves[place]


def _exchanges(problem: Problem, choice: Choices, single: Choices, caps: Array, wanted: Array) -> Choices:
    """Return the most promising changes of two variables, by the sum of what each changes alone."""
    now = problem.evaluate(choice[None])[0]
    change = problem.evaluate(single) - now
    gains = change @ wanted
    order = np.argsort(gains)
    better = order[gains[order] < 0][:_EXCHANGED]
    worse = order[gains[order] >= 0][:_EXCHANGED]
    together = change[better][:, None] + change[worse][None]
    kept = (now + together <= caps).all(axis=2)
    variables = (single != choice).argmax(axis=1)
    kept &= variables[better][:, None] != variables[worse][None]
    scores = np.where(kept, together @ wanted, np.inf).ravel()
    best = np.argsort(scores)[:_EXCHANGES]
    best = best[scores[best] < 0]
    first, second = better[best // max(1, len(worse))], worse[best % max(1, len(worse))]
    changed: Choices = np.where(single[second] != choice, single[second], single[first])
    return changed


def neighbours_of(problem: Problem, choice: Choices) -> Choices:
    """Return every choice that differs from ``choice`` in one variable, ``(n, variables)``; itself if there is none."""
    found = [choice]
    for index, loss in enumerate(problem.loss):
        for option in range(len(loss)):
            if option != choice[index]:
                moved = choice.copy()
                moved[index] = option
                found.append(moved)
    return np.stack(found[1:] or found)
