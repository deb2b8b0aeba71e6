"""The loss model on results whose law is known."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.search.loss_model import LossModel


def results(seed: int, count: int, factors: np.ndarray, noise: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    losses = rng.lognormal(-2, 1, (count, len(factors))) * (rng.random((count, len(factors))) < 0.7)
    lost = 0.3 * (losses @ factors) ** 0.7 * rng.lognormal(0, noise, count)
    return losses, lost


def test_a_law_is_found_again() -> None:
    losses, lost = results(0, 60, np.ones(5))
    model = LossModel.fit(losses, lost)
    assert model.lost(losses.sum(axis=1)) == pytest.approx(lost, rel=0.15)
    assert model.power == pytest.approx(0.7, abs=0.07)
    assert model.lost(np.array([model.total(0.05)])) == pytest.approx([0.05])


def test_a_right_profile_is_not_corrected() -> None:
    model = LossModel.fit(*results(1, 30, np.ones(6), noise=0.15))
    assert not model.is_corrected
    assert not model.corrected_error < 0.95 * model.error


def test_a_wrong_profile_is_corrected_and_predicts_what_it_has_not_seen() -> None:
    factors = np.array([4.0, 0.25, 2.0, 0.5, 1.0, 3.0])
    model = LossModel.fit(*results(2, 40, factors))
    assert model.is_corrected
    assert model.corrected_error < 0.7 * model.error
    losses, lost = results(3, 40, factors)
    plain = LossModel(model.scale, model.power, np.ones(6))

    def error(of: LossModel) -> float:
        return float(np.abs(np.log(of.lost(losses @ of.factors) / lost)).mean())

    assert error(model) < 0.6 * error(plain)


def test_few_results_move_nothing_but_the_scale() -> None:
    model = LossModel.fit(np.array([[0.5, 0.5]]), np.array([0.1]))
    assert not model.is_corrected
    assert model.lost(np.array([1.0])) == pytest.approx([0.1])
    nothing = LossModel.fit(np.zeros((0, 2)), np.zeros(0))
    assert nothing.lost(np.array([0.0, 1.0])) == pytest.approx([0.0, 1.0])


def test_more_loss_is_never_predicted_to_lose_less() -> None:
    rng = np.random.default_rng(4)
    model = LossModel.fit(rng.random((20, 3)), rng.random(20))  # nothing to be learned
    assert (np.diff(model.lost(np.linspace(0, 3, 50))) >= 0).all()
