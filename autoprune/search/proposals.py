"""Proposals: three arms over one record, whose shares follow what they gain."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import optuna
from numpy.typing import NDArray

from autoprune.search.loss_model import LossModel
from autoprune.search.promotion import cover
from autoprune.search.severity import ALL_LOST
from autoprune.search.solver import Choices, Problem, neighbours_of, solve, solve_capped, sweep, weight_range
from autoprune.search.volume import Array, Volume, counted_axes

ARMS = ("solver", "weights", "moves")
_FIRST_SHARES = {"solver": 0.6, "weights": 0.25, "moves": 0.15}
# No arm starves: what gains nothing now may do so later.
_LEAST_SHARE = 0.1
_MEMORY = 0.9
_STAGES = 4
# The sampler over weights is told the latest results; more of them make it slow, not better.
_TOLD = 150
_TRIES = 24
# Where the volume ends as a multiple of a hard cap, and the value of what exceeds the cap.
_BEYOND_CAP = 1.25
_OUTSIDE = 2.0
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
        canonical: Returns the row that stands for all rows of the same network.
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
        canonical: Callable[[Choices], Choices] = lambda choice: choice,
        within: Callable[[Choices], Sequence[NDArray[np.bool_]]] | None = None,
        capped_loss: bool = False,
    ) -> None:
        self.scales = scales
        self.objectives = tuple(objectives)
        self.seed = seed
        self.results: list[Result] = []
        self.arms = ARMS if use_solver else ("moves",)
        self._canonical = canonical
        self._within = within
        self.capped_loss = capped_loss
        self._plain = problem
        self._problem = problem
        self._gained = {arm: _FIRST_SHARES[arm] for arm in self.arms}
        self._seen: set[bytes] = set()
        self._masks = self._axis_masks()
        self._volumes = [Volume(np.empty((0, 3)))] * len(self._masks)
        self._raw = np.empty((0, 3))
        self.model = LossModel(1.0, 0.8, np.ones(len(problem.loss)))
        self._pool: Choices | None = None
        self._fitted_to = 0

    # -- what is known -----------------------------------------------------------------------

    def add(self, result: Result) -> float:
        """Take a result and return the hypervolume that it gained; the arm's share follows."""
        gain = float(self._gains(self.scaled(result.values[None]))[0])
        self.results.append(result)
        self._raw = np.concatenate([self._raw, result.values[None]])
        self._seen.add(self._key(result.choice))
        if gain > 0:
            self._volumes = self._measured(self._raw)
        if result.arm in self._gained:
            # The unit of gain shrinks as the search goes on, so that early luck is forgotten.
            unit = max(self._total(self._volumes), 1e-9) / np.sqrt(len(self.results))
            kept = self._gained[result.arm] * _MEMORY
            self._gained[result.arm] = kept + (1 - _MEMORY) * min(1.0, gain / unit)
        return gain

    def correct(self, problem: Problem, costs: Array) -> None:
        """Take better predictions of costs: the solver's tables, and size and latency of all results, ``(n, 2)``."""
        self._plain = problem
        self._raw[:, 1:] = costs
        self._volumes = self._measured(self._raw)
        self._fitted_to = 0
        self._pool = None

    def _key(self, choice: Choices) -> bytes:
        return self._canonical(choice).tobytes()

    def rescale(self, lost: float) -> None:
        """Let the volume end at another loss of capability: trials showed how much of it training takes back."""
        self.scales = np.array([lost, *self.scales[1:]])
        self._volumes = self._measured(self._raw)
        self._pool = None

    def gained_lately(self, count: int) -> float:
        """Return the share of the volume that the last ``count`` results gained together, in ``[0, 1]``."""
        total = self._total(self._volumes)
        if total <= 0:
            return 0.0
        return (total - self._total(self._measured(self._raw[: max(0, len(self._raw) - count)]))) / total

    # -- volumes -----------------------------------------------------------------------------

    def _axis_masks(self) -> list[Array]:
        """Return which axes make each volume: all objectives, and the loss against each cost alone.

        Whoever has a limit on one cost asks for the best capability at that cost, whatever the others are. The volume
        over all costs hardly grows by such a network once there are others that are small in everything.
        """
        counts = self.counts
        single = [np.eye(3)[0] + np.eye(3)[axis] for axis in (1, 2) if counts[axis]]
        return [counts, *single] if len(single) > 1 else [counts]

    @staticmethod
    def _on_axes(values: Array, mask: Array) -> Array:
        masked: Array = values * mask
        masked[(values >= _OUTSIDE).any(axis=1)] = _OUTSIDE  # a cap holds whatever axes are looked at
        return masked

    def _measured(self, raw: Array) -> list[Volume]:
        scaled = self.scaled(raw)
        return [Volume(self._on_axes(scaled, mask)) for mask in self._masks]

    def _gains(self, values: Array) -> Array:
        """Return what each candidate alone would add to the volumes, ``(m,)``."""
        pairs = zip(self._volumes, self._masks, strict=True)
        gains: Array = np.sum([volume.gains(self._on_axes(values, mask)) for volume, mask in pairs], axis=0)
        return gains

    @staticmethod
    def _total(volumes: Sequence[Volume]) -> float:
        return sum(volume.total for volume in volumes)

    @property
    def shares(self) -> dict[str, float]:
        """Probability of each arm to propose next."""
        total = sum(self._gained.values()) or 1.0
        free = 1.0 - _LEAST_SHARE * len(self._gained)
        return {arm: _LEAST_SHARE + free * gained / total for arm, gained in self._gained.items()}

    @property
    def counts(self) -> Array:
        """1 for each axis that is an objective of the study, else 0."""
        return counted_axes(self.objectives)

    def values_of(self, choices: Choices) -> Array:
        """Return predicted values of choices, ``(n, 3)``; see :class:`Result`."""
        predicted = self._problem.evaluate(choices)
        lost = self.model.lost(predicted[:, 0])
        return self.scaled(np.stack([lost, predicted[:, 1], predicted[:, 2]], axis=1))

    def scaled(self, values: Array, lost: float | None = None) -> Array:
        """Return capability lost, size and latency as shares of where the volume ends.

        The volume ends a little beyond a cap, or the best network that just keeps it would have none; what exceeds
        the cap has none.

        Args:
            values: ``(n, 3)``.
            lost: Where the volume ends in capability lost, for results of another fidelity.
        """
        ends = self.scales if lost is None else np.array([lost, *self.scales[1:]])
        capped = np.array([self.capped_loss, self.scales[1] < 1.0, self.scales[2] < 1.0])
        scaled: Array = values / (ends * np.where(capped, _BEYOND_CAP, 1.0)) * self.counts
        # A cap holds on an axis that is no objective, too.
        scaled[(values > ends) & capped] = _OUTSIDE
        return scaled

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
            best = np.argsort(-self._gains(values))[:_NEAR]
            near = [neighbours_of(self._problem, solutions[i]) for i in best]
            self._pool = np.unique(np.concatenate([solutions, *near]), axis=0)
        fresh = np.array([self._key(row) not in self._seen for row in self._pool], dtype=bool)
        pool = self._pool[fresh]
        if not len(pool):
            return None
        gains = self._gains(self.values_of(pool))
        best_row = int(gains.argmax())
        return Proposal(pool[best_row], "solver") if gains[best_row] > 0 else None

    def _at_caps(self) -> list[Choices]:
        """Solve for the user's hard caps, and a little below them because predictions have errors.

        Returns:
            Rows ``(1, groups)``.
        """
        found = []
        _, size, latency = self.scales
        if min(size, latency) < 1.0:
            found = [
                solve_capped(self._problem, max_size=size * margin, max_latency=latency * margin)
                for margin in _MARGINS
            ]
        if self.capped_loss:
            found += [
                solve_capped(
                    self._problem,
                    max_size=size,
                    max_latency=latency,
                    max_loss=self.model.total(self.scales[0] * margin),
                    objectives=self.objectives,
                )
                for margin in _MARGINS
            ]
        return [choice[None] for choice in found if choice is not None]

    def _by_weights(self, generator: np.random.Generator) -> Proposal | None:
        """Let Optuna choose weight, trade, trust in 8 bits and factors of the stages, and solve for those."""
        study = optuna.create_study(
            directions=["minimize"] * 3, sampler=_sampler(int(generator.integers(2**31)))
        )
        told = [r for r in self.results if r.weights][-_TOLD:]
        study.add_trials(
            [
                optuna.trial.create_trial(
                    params=r.weights, distributions=self._distributions(), values=[float(v) for v in r.values]
                )
                for r in told
            ]
        )
        for _ in range(4):
            trial = study.ask(self._distributions())
            choice = self.solved(trial.params)
            if self._key(choice) not in self._seen:
                return Proposal(choice, "weights", dict(trial.params))
            study.tell(trial, [float(v) for v in self.values_of(choice[None])[0]])
        return None

    def solved(self, weights: dict[str, float]) -> Choices:
        """Return the solution for what the sampler chose."""
        groups = len(self._problem.loss)
        stage = np.arange(groups) * _STAGES // max(1, groups)
        loss = []
        for index, (corrected, plain) in enumerate(zip(self._problem.loss, self._plain.loss, strict=True)):
            factor = 10.0 ** weights[f"stage{stage[index]}"]
            loss.append(corrected * factor + (10.0 ** weights["caution"]) * 1e-3 * (plain > 0))
        problem = _with_losses(self._problem, loss)
        low, high = weight_range(self._plain)
        total = 10.0 ** (low + (high - low) * weights["weight"])
        share = weights.get("latency_share", 1.0 if "latency" in self.objectives else 0.0)
        found: Choices = solve(problem, np.array([total * (1 - share)]), np.array([total * share]))[0]
        return found

    def _distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        real = optuna.distributions.FloatDistribution
        found: dict[str, optuna.distributions.BaseDistribution] = {
            "weight": real(0.0, 1.0),  # a share of the range of weights, which moves with the predicted costs
            "caution": real(-2.0, 1.0),
        }
        if {"size", "latency"} <= set(self.objectives):
            found["latency_share"] = real(0.0, 1.0)
        found |= {f"stage{stage}": real(-0.7, 0.7) for stage in range(_STAGES)}
        return found

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
        return Proposal(some[int(self._gains(self.values_of(some)).argmax())], "moves")

    def _at_random(self, generator: np.random.Generator) -> Proposal | None:
        for _ in range(_TRIES):
            row = np.array([int(generator.integers(len(loss))) for loss in self._plain.loss], dtype=np.int64)
            if self._key(row) not in self._seen:
                return Proposal(row, "moves")
        return None

    def _front(self) -> NDArray[np.int64]:
        if not self.results:
            return np.empty((0, len(self._plain.loss)), dtype=np.int64)
        scaled = self.scaled(self._raw)
        on_front = np.zeros(len(self.results), dtype=bool)
        for volume, mask in zip(self._volumes, self._masks, strict=True):
            members = {row.tobytes() for row in volume.front}
            rows = np.clip(self._on_axes(scaled, mask), 0.0, None)
            on_front |= np.array([row.tobytes() in members for row in rows])
        found = [r.choice for r, is_on in zip(self.results, on_front, strict=True) if is_on]
        return np.stack(found) if found else np.empty((0, len(self._plain.loss)), dtype=np.int64)

    def _refit(self) -> None:
        """Fit the loss model anew once there are some more results, and solve with it."""
        if self.results and (self._pool is None or len(self.results) >= 1.1 * self._fitted_to + 1):
            losses = np.stack([self._losses_of(r.choice) for r in self.results])
            ran = self._raw[:, 0] < ALL_LOST
            self.model = LossModel.fit(losses[ran], self._raw[ran, 0])
            factors = self.model.factors
            self._problem = _with_losses(
                self._plain, [loss * factor for loss, factor in zip(self._plain.loss, factors, strict=True)]
            )
            self._fitted_to = len(self.results)
            self._pool = None

    def _losses_of(self, choice: Choices) -> Array:
        return np.array([loss[option] for loss, option in zip(self._plain.loss, choice, strict=True)])

    def _generator(self) -> np.random.Generator:
        text = f"{self.seed}:{len(self.results)}"
        return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


def _with_losses(problem: Problem, loss: Sequence[Array]) -> Problem:
    return Problem(
        tuple(loss), problem.size, problem.latency, problem.pairs, problem.base_size, problem.base_latency
    )


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(multivariate=True, seed=seed)
