"""Training of the dense network: it learns, ends in time, and is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.clock import FakeClock
from autoprune.config import make_config
from autoprune.errors import UsageError
from autoprune.naming import cache_root
from autoprune.workloads.training import plan_training, train_dense
from autoprune.workloads.workload import Workload, load_workload, workload_from_objects

_CONFIG = make_config({"model": "Small", "data": "given"})


def _workload(count: int = 240, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> Workload:
    """Return an untrained network for images whose left or right half is bright."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), norm(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2)
        )
        targets = torch.arange(count) % 2
        inputs = torch.randn(count, 1, 8, 8)
        inputs[targets == 0, :, :, :4] += 0.7
        inputs[targets == 1, :, :, 4:] += 0.7
    made = workload_from_objects(model, (inputs, targets), config=_CONFIG, train_dense=True)
    return replace(made, weights_source="random")


def _accuracy(workload: Workload) -> float:
    with torch.no_grad():
        pairs = [(workload.model(x), y) for x, y in workload.data.report.unseal().batches(50)]
    return workload.metric.score(torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs]))


def _files() -> list[Path]:
    return list((cache_root() / "dense").glob("*.safetensors"))


def _fail(line: str) -> None:
    if line.startswith("training"):
        pytest.fail(f"trained again: {line}")


def test_it_learns_and_leaves_the_given_network_and_global_chance_alone() -> None:
    workload = _workload()
    before = {name: value.clone() for name, value in workload.model.state_dict().items()}
    chance = torch.get_rng_state()
    said: list[str] = []
    trained = train_dense(workload, progress=said.append, seed=0)
    assert _accuracy(trained) > 0.9 > 0.75 > _accuracy(workload)
    assert (
        trained.dense_trained
        and not trained.model.training
        and trained.weights_source.startswith("trained here")
    )
    assert all(torch.equal(before[name], value) for name, value in workload.model.state_dict().items())
    assert torch.equal(chance, torch.get_rng_state())
    assert "accuracy" in said[-1]


def test_an_equal_training_comes_from_the_cache() -> None:
    first = train_dense(_workload(), progress=print, seed=0)
    assert len(_files()) == 1
    said: list[str] = []
    again = train_dense(_workload(), progress=said.append, seed=0)
    assert said == [f"the dense network was trained before (108 steps): {_files()[0]}"]
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    assert again.weights_source == first.weights_source
    train_dense(_workload(), progress=print, seed=1)
    train_dense(_workload(count=200), progress=print, seed=0)
    assert len(_files()) == 3


@pytest.mark.parametrize("keep", [0, 10, 500])
def test_a_damaged_cache_file_is_replaced(keep: int) -> None:
    first = train_dense(_workload(), progress=print, seed=0)
    whole = _files()[0].read_bytes()
    _files()[0].write_bytes(whole[:keep])
    said: list[str] = []
    again = train_dense(_workload(), progress=said.append, seed=0)
    assert "ignoring the damaged cache file" in said[0]
    assert again.weights_source == first.weights_source and _files()[0].read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder")
    assert train_dense(_workload(), progress=print, seed=0).dense_trained


def test_the_deadline_ends_it_with_what_was_learned() -> None:
    calls = 0

    def deadline() -> bool:
        nonlocal calls
        calls += 1
        return calls > 20

    cut = train_dense(_workload(), deadline=deadline, progress=print, seed=0)
    assert cut.dense_trained and cut.weights_source.startswith("trained here, 20 steps")
    resumed = train_dense(_workload(), progress=_fail, seed=0, resuming=True)
    assert resumed.weights_source == cut.weights_source
    whole = train_dense(_workload(), progress=print, seed=0)
    assert whole.weights_source.startswith("trained here, 108 steps")


def test_a_time_limit_shortens_the_schedule() -> None:
    clock = FakeClock()
    workload = _workload()

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        clock.advance(1.0)
        return F.cross_entropy(model(batch[0]), batch[1])

    said: list[str] = []
    trained = train_dense(
        replace(workload, training_step=step), progress=said.append, seed=0, time_limit_s=60.0, clock=clock
    )
    assert clock.monotonic() == 60.0
    assert trained.weights_source.startswith("trained here, 60 steps")
    assert "step 60 of at most 108, 100% done" in said[-2]
    assert not _files()  # a user's own step has no hash


def test_a_slow_beginning_does_not_shorten_a_training_that_fits() -> None:
    clock = FakeClock()

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        clock.advance(5.0 if clock.monotonic() < 50.0 else 0.5)
        return F.cross_entropy(model(batch[0]), batch[1])

    trained = train_dense(
        replace(_workload(), training_step=step), progress=print, seed=0, time_limit_s=200.0, clock=clock
    )
    assert trained.weights_source.startswith("trained here, 108 steps")


def test_a_loss_that_is_not_finite_is_tried_at_lower_rates_and_then_refused() -> None:
    attempts: list[float] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        attempts.append(0.0)
        return outputs.sum() * (float("nan") if len(attempts) in bad else 0.0)

    bad: set[int] = {3}
    said: list[str] = []
    assert train_dense(replace(_workload(), loss=loss), progress=said.append, seed=0, epochs=1).dense_trained
    assert "a fifth of the learning rate" in said[0]
    bad = set(range(1000))
    with pytest.raises(UsageError, match="does not stay finite"):
        train_dense(replace(_workload(), loss=loss), progress=said.append, seed=0)


def test_it_reads_the_train_and_calibration_splits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = _workload()

    def refuse(*args: object) -> None:
        pytest.fail("read")

    monkeypatch.setattr(workload.data.search, "batches", refuse)
    monkeypatch.setattr(workload.data.search, "training_batch", refuse)
    train_dense(workload, progress=print, seed=0)


def test_the_schedule_follows_the_layers() -> None:
    batch, layer = (
        plan_training(_workload(), 128),
        plan_training(_workload(norm=lambda c: nn.LayerNorm([c, 6, 6])), 128),
    )
    assert not batch.adaptive and layer.adaptive and layer.rate < batch.rate
    assert batch.steps == 108 and batch.batch_size == 16 and batch.epochs == 12
    rates = [batch.rate_at((step + 1) / 101) for step in range(100)]
    assert max(rates) == pytest.approx(batch.rate, rel=0.01) and rates[0] < 0.1 * batch.rate > rates[-1] > 0
    assert rates.index(max(rates)) in range(20, 30)


@pytest.mark.slow
def test_resnet18_learns_the_digits() -> None:
    workload = load_workload(make_config({"model": "resnet18", "data": "digits"}))
    assert _accuracy(train_dense(workload, progress=print, seed=0)) > 0.95
