"""Masks of lottery tickets hold, keep what they should, and their controls keep as much of every layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoprune.compress.discovery import find_groups
from autoprune.compress.finetune import TeacherStream
from autoprune.compress.surgery import prune
from autoprune.compress.ticket_masks import (
    Masks,
    by_channel,
    by_magnitude,
    hold,
    random_like,
    share_left,
)
from autoprune.compress.ticket_training import Course, outputs_on, train
from tests.compress.networks import Plain, Split

INPUTS = Split().training_batch(0, 32, 0)[0]


class WithoutNorm(Plain):
    """Trained by AdamW, for it has a LayerNorm alone."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.fc2 = nn.Sequential(nn.LayerNorm(10), nn.Linear(10, 3))  # type: ignore[assignment]


def network(kind: type[nn.Module] = Plain) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def course(model: nn.Module, steps: int = 6) -> Course:
    stream = TeacherStream(model, Split(), seed=0, batch_size=16)
    return Course(stream, nn.functional.cross_entropy, torch.device("cpu"), 0.05, steps)


def is_masked(model: nn.Module, masks: Masks) -> bool:
    return all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())


@pytest.mark.parametrize("kind", [Plain, WithoutNorm])
@pytest.mark.parametrize("structured", [False, True])
def test_masked_weights_stay_zero_through_a_training_and_the_others_move(
    kind: type[nn.Module], structured: bool
) -> None:
    model = network(kind)
    ticket = (
        by_channel(model, find_groups(model, INPUTS), 0.5, 1.0) if structured else by_magnitude(model, 0.3)
    )
    assert not is_masked(model, ticket.masks)
    trained = train(model, course(model), masks=ticket.masks)
    assert trained is not None
    assert is_masked(trained, ticket.masks)
    kept = ticket.masks["conv2.weight"]
    assert not torch.equal(
        trained.get_parameter("conv2.weight")[kept], model.get_parameter("conv2.weight")[kept]
    )


def test_the_largest_weights_of_all_layers_together_stay() -> None:
    model = network()
    masks = by_magnitude(model, 0.25).masks
    assert set(masks) == {"conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"}
    kept = torch.cat([model.get_parameter(name)[mask].abs() for name, mask in masks.items()])
    gone = torch.cat([model.get_parameter(name)[~mask].abs() for name, mask in masks.items()])
    assert kept.min() >= gone.max()
    assert share_left(model, masks) == pytest.approx(0.25, abs=1e-3)
    assert share_left(model, {}) == 1.0


def test_rounds_remove_from_what_is_left() -> None:
    model = network()
    first = by_magnitude(model, 0.5)
    hold(model, first.masks)
    second = by_magnitude(model, 0.25)
    assert all(bool((first.masks[name] | ~mask).all()) for name, mask in second.masks.items())


def test_the_largest_weight_of_a_layer_stays_however_small() -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("conv1.weight").mul_(1e-6)
    assert int(by_magnitude(model, 0.1).masks["conv1.weight"].sum()) == 1


def test_masked_channels_do_what_cut_channels_do() -> None:
    model = network()
    groups = find_groups(model, INPUTS)
    ticket = by_channel(model, groups, 0.5, 1.0)
    assert {name: len(units) for name, units in ticket.plan.items()} == {"conv1": 4, "conv2": 4, "fc1": 5}
    gone = sorted({*range(8)} - {*ticket.plan["conv1"]})
    # What made a channel and what read it are gone both, or shares of weights would not be told right.
    assert not ticket.masks["conv1.weight"][gone].any() and not ticket.masks["conv2.weight"][:, gone].any()
    cut = prune(model, groups, ticket.plan)
    hold(model, ticket.masks)
    assert torch.allclose(model(INPUTS), cut(INPUTS), atol=1e-5)


def test_channels_go_in_equal_shares_of_what_is_left() -> None:
    model = network()
    groups = find_groups(model, INPUTS)
    assert len(by_channel(model, groups, 0.75, 0.5).plan["conv1"]) == 4
    assert len(by_channel(model, groups, 0.75, 1.0).plan["conv1"]) == 2


@pytest.mark.parametrize("structured", [False, True])
def test_the_random_control_keeps_as_much_of_every_layer(structured: bool) -> None:
    model = network()
    groups = find_groups(model, INPUTS) if structured else None
    ticket = by_magnitude(model, 0.3) if groups is None else by_channel(model, groups, 0.5, 1.0)
    control = random_like(ticket, model, groups, 0)
    assert {n: int(m.sum()) for n, m in control.masks.items()} == {
        n: int(m.sum()) for n, m in ticket.masks.items()
    }
    assert any(not torch.equal(control.masks[name], mask) for name, mask in ticket.masks.items())
    again, other = random_like(ticket, model, groups, 0), random_like(ticket, model, groups, 1)
    assert all(torch.equal(again.masks[name], mask) for name, mask in control.masks.items())
    assert any(not torch.equal(other.masks[name], mask) for name, mask in control.masks.items())


def test_a_training_in_two_parts_sees_the_batches_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    seen: list[int] = []

    def noted(self: TeacherStream, step: int) -> object:
        seen.append(step)
        return Split().training_batch(step, 16, 0)

    monkeypatch.setattr(TeacherStream, "inputs", noted)
    early = train(model, course(model), last=2)
    assert early is not None
    # The first batch is looked at once more to choose the memory layout.
    assert set(seen) == {0, 1}
    seen.clear()
    train(early, course(model), first=2)
    assert set(seen) >= {2, 3, 4, 5}
    assert max(seen) == 5


def test_the_last_rate_is_small_and_does_not_move() -> None:
    model = network()
    plan = course(model)
    assert plan.last_rate == pytest.approx(0.05 * 0.0504, rel=0.01)
    moved = []
    for small in (False, True):
        trained = train(model, plan, first=2, at_last_rate=small)
        assert trained is not None
        change = trained.get_parameter("fc1.weight") - model.get_parameter("fc1.weight")
        moved.append(float(change.detach().norm()))
    assert 0 < moved[1] < 0.2 * moved[0]


def test_what_was_stopped_is_no_result() -> None:
    model = network()
    assert train(model, course(model), stop=lambda: True) is None


def test_outputs_come_in_order_after_batchnorm_was_estimated_anew() -> None:
    model = network()
    batches = [Split().training_batch(step, 8, 0) for step in range(3)]
    before = model.get_buffer("bn1.running_mean").clone()
    outputs, targets = outputs_on(model, batches, [INPUTS], torch.device("cpu"))
    assert not torch.equal(model.get_buffer("bn1.running_mean"), before)
    assert torch.equal(targets, torch.cat([t for _, t in batches]))
    with torch.no_grad():
        expected = torch.cat([model(x) for x, _ in batches])
    assert torch.allclose(outputs, expected, atol=1e-5)
