"""Proposals on a problem of many groups whose true front is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import optuna
import pytest

from autoprune.search.proposals import ARMS, Proposer, Result
from autoprune.search.severity import ALL_LOST
from autoprune.search.solver import Choices, Problem, solve_capped
from autoprune.search.weights import told_study, weight_distributions
from tests.search.synthetic import SAMPLERS, SCALES, Synthetic, run_auto, run_optuna

OBJECTIVES = ("accuracy", "latency", "size")


@pytest.fixture(scope="module")
def problem() -> Synthetic:
    return Synthetic.make(0)


@pytest.mark.parametrize("seed", [0, 1])
def test_auto_comes_near_the_true_front_with_few_evaluations(seed: int) -> None:
    problem = Synthetic.make(seed)
    volumes = run_auto(problem, 50, seed)
    true = problem.true_volume()
    assert volumes[-1] >= 0.85 * true
    assert volumes[-1] <= 1.01 * true


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_quarter_of_the_evaluations_is_enough_to_be_ahead_of_a_blind_sampler(
    problem: Synthetic, name: str
) -> None:
    blind = run_optuna(problem, 80, SAMPLERS[name](0))
    auto = run_auto(problem, 20, 0)
    assert auto[-1] >= 1.1 * blind[-1]


def test_the_solver_is_worth_its_place(problem: Synthetic) -> None:
    assert run_auto(problem, 40, 0)[-1] > 1.5 * run_auto(problem, 40, 0, use_solver=False)[-1]


def test_what_does_not_add_up_is_still_found() -> None:
    coupled = Synthetic.make(2, groups=20, coupling=1.0)
    assert run_auto(coupled, 80, 0)[-1] >= 0.8 * coupled.true_volume()


def test_nothing_is_proposed_twice(problem: Synthetic) -> None:
    proposer = Proposer(problem.profile, SCALES, OBJECTIVES, seed=0)
    seen = set()
    for _ in range(60):
        proposal = proposer.propose()
        assert proposal is not None
        assert proposal.choice.tobytes() not in seen
        seen.add(proposal.choice.tobytes())
        values = problem.values(proposal.choice[None])[0]
        proposer.add(Result(proposal.choice, proposal.arm, values, proposal.weights))
    assert {r.arm for r in proposer.results} == set(ARMS)


def test_the_same_record_gives_the_same_proposal(problem: Synthetic) -> None:
    first, second = (Proposer(problem.profile, SCALES, OBJECTIVES, seed=3) for _ in range(2))
    for _ in range(15):
        proposal, again = first.propose(), second.propose()
        assert proposal is not None
        assert again is not None
        assert (proposal.choice == again.choice).all()
        result = Result(
            proposal.choice, proposal.arm, problem.values(proposal.choice[None])[0], proposal.weights
        )
        first.add(result)
        second.add(result)


def test_an_arm_that_gains_gets_a_larger_share_and_none_starves(problem: Synthetic) -> None:
    proposer = Proposer(problem.profile, SCALES, OBJECTIVES, seed=0)
    before = proposer.shares["moves"]
    groups = len(problem.truth.loss)
    for step in range(10):  # each better than all before
        values = np.array([0.05, 0.9 - 0.08 * step, 0.9 - 0.08 * step])
        proposer.add(Result(np.full(groups, step), "moves", values))
        proposer.add(Result(np.full(groups, step) + 1, "solver", np.array([0.2, 1.0, 1.0])))
    assert proposer.shares["moves"] > before
    assert min(proposer.shares.values()) >= 0.1
    assert sum(proposer.shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("capped_loss", [False, True])
def test_hard_caps_are_solved_for(problem: Synthetic, capped_loss: bool) -> None:
    caps = np.array([0.03 if capped_loss else 0.1, 0.3, 0.45])
    proposer = Proposer(problem.profile, caps, OBJECTIVES, seed=0, capped_loss=capped_loss)
    for _ in range(40):
        proposal = proposer.propose()
        assert proposal is not None
        values = problem.values(proposal.choice[None])[0]
        proposer.add(Result(proposal.choice, proposal.arm, values, proposal.weights))
    results = np.stack([r.values for r in proposer.results])
    within = (results[:, 1:] <= caps[1:]).all(axis=1)
    assert within.mean() > 0.5
    best = solve_capped(problem.truth, max_size=caps[1], max_latency=caps[2])
    assert best is not None
    assert results[within, 0].min() < 2.5 * problem.values(best[None])[0, 0]


def test_an_axis_that_is_no_objective_changes_no_proposal(problem: Synthetic) -> None:
    """Networks that are slow here are fast there."""
    slow = replace(problem.profile, latency=tuple(table.max() - table for table in problem.profile.latency))
    first, second = (Proposer(p, SCALES, ("accuracy", "size"), seed=1) for p in (problem.profile, slow))
    for _ in range(60):
        proposal, again = first.propose(), second.propose()
        assert proposal is not None
        assert again is not None
        assert (proposal.choice == again.choice).all()
        values = problem.values(proposal.choice[None])[0]
        first.add(Result(proposal.choice, proposal.arm, values, proposal.weights))
        turned = np.array([*values[:2], 1.0 - values[2]])
        second.add(Result(again.choice, again.arm, turned, again.weights))


def test_whoever_stands_for_a_pool_is_asked_for_all_of_it_at_once(problem: Synthetic) -> None:
    asked: list[int] = []

    def canonical(choices: Choices) -> Choices:
        asked.append(len(choices) if choices.ndim == 2 else 1)
        return choices

    proposer = Proposer(problem.profile, SCALES, OBJECTIVES, seed=0, canonical=canonical)
    for _ in range(10):
        asked.clear()
        proposal = proposer.propose()
        assert proposal is not None
        assert len(asked) <= 30
        values = problem.values(proposal.choice[None])[0]
        proposer.add(Result(proposal.choice, proposal.arm, values, proposal.weights))
    assert max(asked, default=0) <= 1 or max(asked) > 100


def test_what_the_sampler_over_weights_is_told_is_on_one_scale() -> None:
    objectives = ("accuracy", "latency")
    weights = dict.fromkeys(weight_distributions(objectives), 0.1)
    study = told_study([(weights, np.array([0.2, 0.3, 0.4]))], objectives, 0)
    assert study.trials[0].values == [0.2, 0.4]


def test_within_caps_the_least_loss_is_predicted(problem: Synthetic) -> None:
    assert Proposer(problem.profile, SCALES, OBJECTIVES, seed=0).least_lost() == 0.0
    caps = [Proposer(problem.profile, np.array([0.1, size, 1.0]), OBJECTIVES, seed=0) for size in (0.5, 0.2)]
    mild, hard = (proposer.least_lost() for proposer in caps)
    assert 0.0 < mild < hard
    assert Proposer(problem.profile, np.array([0.1, 1e-9, 1.0]), OBJECTIVES, seed=0).least_lost() == 0.0


def test_a_cap_holds_on_an_axis_that_is_no_objective(problem: Synthetic) -> None:
    proposer = Proposer(problem.profile, np.array([0.1, 1.0, 0.4]), ("accuracy", "size"), seed=0)
    within, beyond = proposer.axes.scaled(np.array([[0.02, 0.5, 0.3], [0.02, 0.5, 0.9]]))
    assert (within < 1.0).all()
    assert (beyond > 1.0).any()


def test_where_everything_was_seen_nothing_is_proposed() -> None:
    one = Problem(loss=(np.zeros(1),), size=(np.ones(1),), latency=(np.ones(1),))
    proposer = Proposer(one, SCALES, OBJECTIVES, seed=0)
    proposal = proposer.propose()
    assert proposal is not None
    proposer.add(Result(proposal.choice, proposal.arm, np.array([0.0, 1.0, 1.0])))
    assert proposer.propose() is None
    assert proposer.gained_lately(10) == 0.0  # a volume that stays empty gains nothing


def test_what_the_latest_results_gained_is_that_of_a_proposer_who_knew_costs_and_scales_before(
    problem: Synthetic,
) -> None:
    proposer = Proposer(problem.profile, SCALES, OBJECTIVES, seed=0)
    for _ in range(24):
        proposal = proposer.propose()
        assert proposal is not None
        proposer.add(Result(proposal.choice, proposal.arm, problem.values(proposal.choice[None])[0]))

    def anew(ends: np.ndarray, costs: np.ndarray) -> Proposer:
        made = Proposer(problem.profile, ends, OBJECTIVES, seed=0)
        for result, cost in zip(proposer.results, costs, strict=True):
            made.add(Result(result.choice, result.arm, np.array([result.values[0], *cost])))
        return made

    costs = np.stack([result.values[1:] for result in proposer.results])
    for lost, share in ((SCALES[0], 1.0), (SCALES[0] / 2, 1.0), (SCALES[0] / 2, 0.8)):
        proposer.rescale(lost)
        if share != 1.0:
            proposer.correct(problem.profile, costs * share)
        told = anew(np.array([lost, *SCALES[1:]]), costs * share)
        gained = [proposer.gained_lately(count) for count in (1, 4, 16, 24, 30)]
        assert gained == pytest.approx([told.gained_lately(count) for count in (1, 4, 16, 24, 30)])
        assert 0.0 < gained[2] < gained[3] == gained[4] == 1.0
        whole = told.axes.total
        assert gained[1] == pytest.approx(1 - told.axes.total_of(told._raw[:-4]) / whole)


def test_the_sampler_over_weights_is_told_what_a_study_of_optunas_own_trials_knows() -> None:
    generator = np.random.default_rng(0)
    distributions = weight_distributions(OBJECTIVES)
    told = [
        ({name: float(generator.uniform(0.0, 0.7)) for name in distributions}, generator.random(3))
        for _ in range(40)
    ]
    study = told_study(told, OBJECTIVES, 5)
    plain = told_study([], OBJECTIVES, 5)
    for weights, values in told:
        plain.add_trial(
            optuna.trial.create_trial(
                params=weights, distributions=distributions, values=[float(value) for value in values]
            )
        )
    both = [[(t.number, t.params, t.values) for t in each.trials] for each in (study, plain)]
    assert both[0] == both[1]
    assert study.ask(distributions).params == plain.ask(distributions).params


def test_a_candidate_that_failed_is_no_member_of_the_front_and_fits_no_model(problem: Synthetic) -> None:
    proposer = Proposer(problem.profile, SCALES, OBJECTIVES, seed=0)
    for number in range(12):
        proposal = proposer.propose()
        assert proposal is not None
        values = problem.values(proposal.choice[None])[0]
        if number % 2:
            values[0] = ALL_LOST
        assert proposer.add(Result(proposal.choice, proposal.arm, values, proposal.weights)) >= 0
    proposer.propose()
    fair = [
        problem.profile.evaluate(r.choice[None])[0, 0] for r in proposer.results if r.values[0] < ALL_LOST
    ]
    assert float(proposer.model.lost(np.array(fair)).max()) < 1.0


def test_weights_of_another_profile_are_still_told(problem: Synthetic) -> None:
    first = Proposer(problem.profile, SCALES, OBJECTIVES, seed=0)
    told = [p for p in (first._by_weights(np.random.default_rng(i)) for i in range(3)) if p is not None]
    other = replace(problem.profile, loss=tuple(100 * table for table in problem.profile.loss))
    second = Proposer(other, SCALES, OBJECTIVES, seed=0)
    for proposal in told:
        second.add(Result(proposal.choice, "weights", np.array([0.2, 0.4, 0.4]), proposal.weights))
    assert second._by_weights(np.random.default_rng(9)) is not None


def test_anchors_of_one_axis_lie_on_one_line_where_training_goes_on_along_it(problem: Synthetic) -> None:
    def within(row: np.ndarray) -> list[np.ndarray]:
        return [
            np.arange(len(loss)) >= option for loss, option in zip(problem.profile.loss, row, strict=True)
        ]

    proposer = Proposer(problem.profile, SCALES, ("accuracy", "size"), seed=0, within=within)
    anchors = proposer.anchors(5)
    assert 3 <= len(anchors) <= 5
    for mild, deep in zip(anchors, anchors[1:], strict=False):
        assert (deep >= mild).all()
        assert (deep > mild).any()
    values = proposer.values_of(np.stack(anchors))
    assert (np.diff(values[:, 0]) > 0).all()
    assert (np.diff(values[:, 1]) < 0).all()
    # The line costs hardly anything against solutions that stand alone.
    alone = Proposer(problem.profile, SCALES, ("accuracy", "size"), seed=0).anchors(5)
    free = proposer.values_of(np.stack(alone))
    assert values[-1].prod() <= 1.3 * free[-1].prod() or values[-1, 0] <= 1.3 * free[-1, 0]
