"""Proposals: three arms over one record, whose shares follow what they gain."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autoprune.search.axes import Axes
from autoprune.search.loss_model import LossModel
from autoprune.search.promotion import cover
from autoprune.search.severity import ALL_LOST
from autoprune.search.solver import Choices, Problem, neighbours_of, solve_capped, sweep
from autoprune.search.volume import Array
from autoprune.search.weights import counted, solve_weighted, told_study, weight_distributions

ARMS = ("solver", "weights", "moves")
_FIRST_SHARES = {"solver": 0.6, "weights": 0.25, "moves": 0.15}
# No arm starves: what gains nothing now may do so later.
_LEAST_SHARE = 0.1
_MEMORY = 0.9
# The sampler over weights is told the latest results; more of them make it slow, not better.
_TOLD = 100
_TRIES = 24
# Shares of a hard cap that are solved for.
_MARGINS = (1.0, 0.97, 0.9)
# Solutions whose neighbours are candidates too.
_NEAR = 4


@dataclass(frozen=True)
class Proposal:
    """A candidate that was not evaluated yet.

    Attributes:
        choice: Option of every group.
        arm: Who proposed it.
        weights: What the sampler over the solver's weights chose; empty for the other arms.
    """

    choice: Choices
    arm: str
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A candidate that was evaluated at the cheapest fidelity.

    Attributes:
        choice: Option of every group.
        arm: Who proposed it.
        values: Severity of the capability lost against the dense network (:data:`ALL_LOST` for a candidate that failed,
            to which no model is fitted), size and latency as shares of its, ``(3,)``.
        weights: As in :class:`Proposal`.
    """

    choice: Choices
    arm: str
    values: Array
    weights: dict[str, float] = field(default_factory=dict)


class Proposer:
    """Proposes what to evaluate next.

    Args:
        problem: The solver's tables.
        scales: Where the volume ends on each axis: capability lost at this fidelity, size share, latency share. A cap
            that the user gave is the end of its axis.
        objectives: Objectives of the study.
        seed: Seed of everything random.
        use_solver: Whether the arms that solve may be used; else moves alone propose.
        canonical: Returns the rows that stand for all rows of the same networks, ``(n, groups)`` or one of them.
        within: Returns which options cut a row's network further, or not at all; where it is given, anchors of one axis
            lie on one line.
        capped_loss: Whether the user capped the capability that may be lost.
    """

    def __init__(
        self,
        problem: Problem,
        scales: Array,
        objectives: Sequence[str],
        *,
        seed: int,
        use_solver: bool = True,
        canonical: Callable[[Choices], Choices] = lambda choices: choices,
        within: Callable[[Choices], Sequence[NDArray[np.bool_]]] | None = None,
        capped_loss: bool = False,
    ) -> None:
        self.axes = Axes(scales, objectives, capped_loss=capped_loss)
        self.objectives = tuple(objectives)
        self.seed = seed
        self.results: list[Result] = []
        self.arms = ARMS if use_solver else ("moves",)
        self._canonical = canonical
        self._within = within
        self._plain = problem
        self._problem = problem
        self._gained = {arm: _FIRST_SHARES[arm] for arm in self.arms}
        self._seen: set[bytes] = set()
        self._pending: set[bytes] = set()
        self._raw = np.empty((0, 3))
        # The volume of the first results, by how many; as long as costs and scales stay.
        self._totals: dict[int, float] = {}
        self.model = LossModel.fit(np.zeros((0, len(problem.loss))), np.zeros(0))
        self._pool: Choices | None = None
        # Results that the model is fitted to, and whether it is; whether what it led to is out of date.
        self._fitted_to, self._is_fitted, self._is_stale = 0, True, True

    # -- what is known -----------------------------------------------------------------------

    def add(self, result: Result) -> float:
        """Take a result and return the hypervolume that it gained; the arm's share follows."""
        gain = float(self.axes.gains(self.axes.scaled(result.values[None]))[0])
        self.results.append(result)
        self._raw = np.concatenate([self._raw, result.values[None]])
        self._seen.add(self._key(result.choice))
        self._pending.discard(self._key(result.choice))
        if gain > 0:
            self.axes.take(self._raw)
        self._totals[len(self.results)] = self.axes.total
        if result.arm in self._gained:
            # The unit of gain shrinks as the search goes on, so that early luck is forgotten.
            unit = max(self.axes.total, 1e-9) / np.sqrt(len(self.results))
            kept = self._gained[result.arm] * _MEMORY
            self._gained[result.arm] = kept + (1 - _MEMORY) * min(1.0, gain / unit)
        return gain

    def reserve(self, choice: Choices) -> None:
        """Hold back a choice that is being evaluated, so that it is not proposed twice."""
        self._seen.add(self._key(choice))
        self._pending.add(self._key(choice))

    def correct(self, problem: Problem, costs: Array) -> None:
        """Take better predictions of costs: the solver's tables, and size and latency of all results, ``(n, 2)``."""
        self._plain = problem
        self._raw[:, 1:] = costs
        self._measure_anew()

    def _key(self, choice: Choices) -> bytes:
        return self._canonical(choice).tobytes()

    def rescale(self, lost: float) -> None:
        """Let the volume end at another loss of capability: trials showed how much of it training takes back."""
        if lost != self.axes.ends[0]:
            self.axes.ends = np.array([lost, *self.axes.ends[1:]])
            self._measure_anew()

    def _measure_anew(self) -> None:
        self.axes.take(self._raw)
        self._totals.clear()
        self._is_stale = True

    def gained_lately(self, count: int) -> float:
        """Return the share of the volume that the last ``count`` results gained together, in ``[0, 1]``."""
        total = self.axes.total
        if total <= 0:
            return 0.0
        first = max(0, len(self._raw) - count)
        if first not in self._totals:
            self._totals[first] = self.axes.total_of(self._raw[:first])
        return (total - self._totals[first]) / total

    @property
    def shares(self) -> dict[str, float]:
        """Probability of each arm to propose next."""
        total = sum(self._gained.values()) or 1.0
        free = 1.0 - _LEAST_SHARE * len(self._gained)
        return {arm: _LEAST_SHARE + free * gained / total for arm, gained in self._gained.items()}

    def values_of(self, choices: Choices) -> Array:
        """Return predicted values of choices, ``(n, 3)``; see :class:`Result`."""
        predicted = self._problem.evaluate(choices)
        lost = self.model.lost(predicted[:, 0])
        return self.axes.scaled(np.stack([lost, predicted[:, 1], predicted[:, 2]], axis=1))

    # -- proposing ---------------------------------------------------------------------------

    def propose(self) -> Proposal | None:
        """Return a candidate that was not evaluated yet; None if the arms find none."""
        generator = self._generator()
        self._refit()
        names = list(self.shares)
        weights = np.array(list(self.shares.values()))
        first = str(generator.choice(names, p=weights / weights.sum()))
        for arm in dict.fromkeys([first, *names]):
            found = self._by_arm(arm, generator)
            if found is not None:
                return found
        return None

    def anchors(self, parts: int) -> list[Choices]:
        """Return solutions that cover each cost alone, from the mildest to the deepest that has any volume.

        Each is solved for among the networks that cut the one before further, so that training can go on from there.

        Args:
            parts: Solutions for each axis.
        """
        self._refit()
        found: list[Choices] = []
        for objective in (o for o in self.objectives if o != "accuracy"):
            axis = ["accuracy", "size", "latency"].index(objective)
            solutions, values = self._inside(objective, 4 * parts)
            wanted = [values[row, 0] for row in cover(values[:, [0, axis]], parts)] if len(values) else []
            for lost in wanted:
                if not len(values):
                    break
                place = int(np.abs(np.log(values[:, 0] / lost)).argmin())
                found.append(solutions[place])
                if self._within is not None:
                    solutions, values = self._inside(objective, 4 * parts, self._within(solutions[place]))
        return found

    def _inside(
        self, objective: str, weights: int, allowed: Sequence[NDArray[np.bool_]] | None = None
    ) -> tuple[Choices, Array]:
        """Return the solutions for one cost that lose something and have volume, and their predicted values."""
        solutions = sweep(self._problem, objectives=("accuracy", objective), weights=weights, allowed=allowed)
        values = self.values_of(solutions)
        inside = (values < 1.0).all(axis=1) & (values[:, 0] > 0)
        return solutions[inside], values[inside]

    def _by_arm(self, arm: str, generator: np.random.Generator) -> Proposal | None:
        if arm == "solver":
            return self._by_solver()
        if arm == "weights":
            return self._by_weights(generator)
        return self._by_moves(generator)

    def _by_solver(self) -> Proposal | None:
        """Of the solutions for all weightings and their neighbours, take the largest predicted gain."""
        if self._pool is None:
            solutions = np.concatenate([sweep(self._problem, objectives=self.objectives), *self._at_caps()])
            values = self.values_of(solutions)
            # As it was when the model was fitted, so that it does not matter when this arm has its turn.
            best = np.argsort(-self.axes.gains(values, self._raw[: self._fitted_to]))[:_NEAR]
            near = [neighbours_of(self._problem, solutions[i]) for i in best]
            self._pool = np.unique(np.concatenate([solutions, *near]), axis=0)
        keys = self._canonical(self._pool)
        fresh = np.array([row.tobytes() not in self._seen for row in keys], dtype=bool)
        pool = self._pool[fresh]
        if not len(pool):
            return None
        gains = self.axes.gains(self.values_of(pool))
        best_row = int(gains.argmax())
        return Proposal(pool[best_row], "solver") if gains[best_row] > 0 else None

    def least_lost(self) -> float:
        """Return the capability that is predicted to be lost by the best network within the user's caps on costs.

        Returns:
            0 where there is no cap, or nothing keeps it.
        """
        _, size, latency = self.axes.ends
        if min(size, latency) >= 1.0:
            return 0.0
        best = solve_capped(self._problem, max_size=size, max_latency=latency)
        return 0.0 if best is None else float(self.model.lost(self._problem.evaluate(best[None])[:, 0])[0])

    def _at_caps(self) -> list[Choices]:
        """Solve for the user's hard caps, and a little below them because predictions have errors.

        Returns:
            Rows ``(1, groups)``.
        """
        found = []
        lost, size, latency = self.axes.ends
        if min(size, latency) < 1.0:
            found = [
                solve_capped(self._problem, max_size=size * margin, max_latency=latency * margin)
                for margin in _MARGINS
            ]
        if self.axes.capped_loss:
            found += [
                solve_capped(
                    self._problem,
                    max_size=size,
                    max_latency=latency,
                    max_loss=self.model.total(lost * margin),
                    objectives=self.objectives,
                )
                for margin in _MARGINS
            ]
        return [choice[None] for choice in found if choice is not None]

    def _by_weights(self, generator: np.random.Generator) -> Proposal | None:
        """Let Optuna choose weight, trade, trust in small losses and factors of the stages, and solve for those."""
        scaled = self.axes.scaled(self._raw)
        told = [(r.weights, row) for r, row in zip(self.results, scaled, strict=True) if r.weights][-_TOLD:]
        study = told_study(told, self.objectives, int(generator.integers(2**31)))
        distributions = weight_distributions(self.objectives)
        for _ in range(4):
            trial = study.ask(distributions)
            choice = solve_weighted(self._problem, self._plain, trial.params, self.objectives)
            if self._key(choice) not in self._seen:
                return Proposal(choice, "weights", dict(trial.params))
            study.tell(trial, counted(self.values_of(choice[None])[0], self.objectives))
        return None

    def _by_moves(self, generator: np.random.Generator) -> Proposal | None:
        """Change one to three groups of a member of the front, the best predicted of a few."""
        front = self._front()
        if not len(front):
            return self._at_random(generator)
        candidates = []
        for _ in range(_TRIES):
            moved = front[int(generator.integers(len(front)))].copy()
            for _ in range(int(generator.integers(1, 4))):
                group = int(generator.integers(len(moved)))
                moved[group] = generator.integers(len(self._plain.loss[group]))
            if self._key(moved) not in self._seen:
                candidates.append(moved)
        if not candidates:
            return None
        # The best of a few, not of all: what does not add up is found where the prediction is wrong.
        some = np.stack(candidates[:6])
        return Proposal(some[int(self.axes.gains(self.values_of(some)).argmax())], "moves")

    def _at_random(self, generator: np.random.Generator) -> Proposal | None:
        for _ in range(_TRIES):
            row = np.array([int(generator.integers(len(loss))) for loss in self._plain.loss], dtype=np.int64)
            if self._key(row) not in self._seen:
                return Proposal(row, "moves")
        return None

    def _front(self) -> Choices:
        if not self.results:
            return np.empty((0, len(self._plain.loss)), dtype=np.int64)
        pairs = zip(self.results, self.axes.on_front(self._raw), strict=True)
        found = [r.choice for r, is_on in pairs if is_on]
        return np.stack(found) if found else np.empty((0, len(self._plain.loss)), dtype=np.int64)

    def prepare(self) -> None:
        """Take note that a proposal is made now: which results the loss model and the solutions are from.

        They follow the results once there are some more, or something else is known of costs or scales. Who replays a
        search calls this where it made a proposal.
        """
        if self.results and (self._is_stale or len(self.results) >= 1.1 * self._fitted_to + 1):
            self._fitted_to, self._is_fitted, self._is_stale = len(self.results), False, False
            self._pool = None

    def _refit(self) -> None:
        """Fit the loss model as far as :meth:`prepare` asks for it."""
        self.prepare()
        if self._is_fitted:
            return
        self._is_fitted = True
        results, lost = self.results[: self._fitted_to], self._raw[: self._fitted_to, 0]
        losses = np.stack([self._losses_of(r.choice) for r in results])
        ran = lost < ALL_LOST
        self.model = LossModel.fit(losses[ran], lost[ran])
        factors = self.model.factors
        self._problem = self._plain.with_losses(
            [loss * factor for loss, factor in zip(self._plain.loss, factors, strict=True)]
        )

    def _losses_of(self, choice: Choices) -> Array:
        return np.array([loss[option] for loss, option in zip(self._plain.loss, choice, strict=True)])

    def _generator(self) -> np.random.Generator:
        # What is drawn while others are evaluated differs from what was drawn for them.
        text = f"{self.seed}:{len(self.results) + len(self._pending)}"
        return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
