"""The solver against brute force on small problems, and its speed-relevant shapes on large ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autoprune.search.solver import Pair, Problem, neighbours_of, solve, solve_capped, sweep
from autoprune.study.pareto import non_dominated


def make_problem(seed: int, variables: int = 4, options: int = 4, *, pairs: bool = False) -> Problem:
    """Return a problem whose options lose more the less they cost."""
    rng = np.random.default_rng(seed)
    loss, size, latency = [], [], []
    for _ in range(variables):
        kept = np.linspace(1.0, 0.2, options)
        loss.append(rng.lognormal(0, 1) * (1 - kept) ** 2)
        size.append(rng.uniform(0.1, 0.3) * kept)
        latency.append(rng.uniform(0.1, 0.3) * kept ** rng.uniform(0.3, 1.0))
    couples = []
    if pairs:
        for first in range(variables - 1):
            table = np.outer(np.linspace(1, 0.2, options), np.linspace(1, 0.2, options)) * 0.2
            couples.append(Pair(first, first + 1, table, table * rng.uniform(0.5, 1.0)))
    return Problem(tuple(loss), tuple(size), tuple(latency), tuple(couples), 0.05, 0.1)


def every_choice(problem: Problem) -> np.ndarray:
    return np.array(list(itertools.product(*(range(len(loss)) for loss in problem.loss))))


def test_evaluate_adds_tables_and_pairs() -> None:
    table = np.array([[1.0, 2.0], [3.0, 4.0]])
    problem = Problem(
        loss=(np.array([0.0, 5.0]), np.array([0.0, 7.0])),
        size=(np.array([0.5, 0.25]), np.array([0.125, 0.0])),
        latency=(np.array([1.0, 2.0]), np.array([4.0, 8.0])),
        pairs=(Pair(0, 1, table, 10 * table),),
        base_size=0.1,
        base_latency=0.2,
    )
    assert problem.evaluate(np.array([[1, 0]])) == pytest.approx(
        np.array([[5.0, 0.1 + 0.25 + 0.125 + 3, 36.2]])
    )


@pytest.mark.parametrize("seed", range(5))
def test_without_pairs_every_weighting_is_solved_exactly(seed: int) -> None:
    problem = make_problem(seed)
    size_weights, latency_weights = np.random.default_rng(seed).lognormal(0, 2, (2, 20))
    found = problem.evaluate(solve(problem, size_weights, latency_weights))
    values = problem.evaluate(every_choice(problem))
    for row, by_size, by_latency in zip(found, size_weights, latency_weights, strict=True):
        weights = np.array([1.0, by_size, by_latency])
        assert row @ weights == pytest.approx((values @ weights).min())


@pytest.mark.parametrize("seed", range(5))
def test_with_pairs_no_change_of_one_variable_betters_a_solution(seed: int) -> None:
    problem = make_problem(seed, pairs=True)
    weights = np.array([1.0, 2.0, 0.5])
    found = solve(problem, weights[1:2], weights[2:])[0]
    best = problem.evaluate(found[None])[0] @ weights
    assert (problem.evaluate(neighbours_of(problem, found)) @ weights >= best - 1e-12).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_sweep_is_on_the_true_front_and_spans_it(seed: int) -> None:
    problem = make_problem(seed)
    values = problem.evaluate(every_choice(problem))
    found = problem.evaluate(sweep(problem))
    for row in found:
        assert not ((values <= row + 1e-12).all(axis=1) & (values < row - 1e-9).any(axis=1)).any()
    assert found[:, 0].min() == values[:, 0].min()
    assert found[:, 1].min() == pytest.approx(values[:, 1].min())
    assert len(found) >= 0.2 * non_dominated(values).sum()


def test_options_that_are_not_allowed_are_not_chosen() -> None:
    problem = make_problem(0)
    allowed = [np.array([True, True, False, False])] * 4
    assert sweep(problem, allowed=allowed).max() == 1


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_capped_solutions_keep_the_caps_and_come_near_the_optimum(seed: int, pairs: bool) -> None:
    problem = make_problem(seed, variables=5, pairs=pairs)
    values = problem.evaluate(every_choice(problem))
    size, latency = np.quantile(values[:, 1], 0.3), np.quantile(values[:, 2], 0.4)
    found = solve_capped(problem, max_size=size, max_latency=latency)
    assert found is not None
    reached = problem.evaluate(found[None])[0]
    assert reached[1] <= size
    assert reached[2] <= latency
    kept = values[(values[:, 1] <= size) & (values[:, 2] <= latency)]
    assert reached[0] <= 1.15 * kept[:, 0].min() + 1e-9


def test_a_cap_on_the_loss_gives_the_cheapest_choice_below_it() -> None:
    problem = make_problem(3)
    values = problem.evaluate(every_choice(problem))
    cap = np.quantile(values[:, 0], 0.5)
    found = solve_capped(problem, max_loss=float(cap))
    assert found is not None
    reached = problem.evaluate(found[None])[0]
    assert reached[0] <= cap
    assert reached[1:].sum() <= 1.1 * values[values[:, 0] <= cap][:, 1:].sum(axis=1).min()


def test_caps_that_nothing_keeps_give_none() -> None:
    assert solve_capped(make_problem(0), max_size=0.01) is None
