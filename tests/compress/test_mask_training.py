"""Masks set in the midst of a fine-tuning: when, how much, exactly, and never back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoprune.compress.finetune import TeacherStream, Trainer, finetune
from autoprune.compress.mask_statistics import weight_of
from autoprune.compress.mask_training import MaskInTraining, levels
from autoprune.compress.masking import make_masks
from autoprune.compress.sparse_training import shrinkage
from autoprune.space.groups import Groups
from autoprune.space.mask import Allocation, Mask, MaskCriterion
from autoprune.space.recipe import Recovery
from autoprune.space.schedule import Schedule
from tests.compress.test_masking import BATCHES, LAYERS, LOSS, groups, run, sparse, zeros

__all__ = ["groups"]  # a fixture


def in_training(layers: dict[str, float], mask: Mask, schedule: Schedule, steps: int) -> MaskInTraining:
    return MaskInTraining(layers, mask, schedule, steps, BATCHES, LOSS)


class Line(nn.Module):
    """One weight matrix whose steps can be done by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.line.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, 2.0]]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.line(x)
        return y


class Ones:
    """Batches of ones."""

    def training_batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        return torch.ones(size, 2), torch.zeros(size, dtype=torch.long)


def train(masks: MaskInTraining, steps: int, model: nn.Module | None = None) -> list[Tensor]:
    """Train one weight matrix with the gradient 1 everywhere; return its weight after every step."""
    seen: list[Tensor] = []

    def watch(trainer: Trainer) -> None:
        masks.watch(trainer)
        seen.append(weight_of(trainer.model, "line").detach().clone())
        trainer.observe(after=lambda m: seen.append(weight_of(m, "line").detach().clone()))

    finetune(
        model or Line(),
        TeacherStream(Line(), Ones(), seed=0, batch_size=2),
        Recovery(finetune_steps=steps, distill=0.0, clip_norm=1e9, learning_rate=1e-6),
        loss=LOSS,
        device=torch.device("cpu"),
        training_step=lambda m, _: weight_of(m, "line").sum(),
        watch=watch,
    )
    return seen


def wide() -> nn.Module:
    model = Line()
    model.line = nn.Linear(16, 4, bias=False)
    with torch.no_grad():
        model.line.weight.copy_(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    return model


def shares(schedule: Schedule, steps: int, sparsity: float) -> list[tuple[int, float]]:
    return [(at, round(share(sparsity), 6)) for at, share in levels(schedule, steps)]


def test_levels_are_those_of_the_papers() -> None:
    assert shares(Schedule(kind="iterative", rounds=3), 9, 0.488) == [(0, 0.2), (3, 0.36), (6, 0.488)]
    # The cubic rise of Zhu and Gupta: s (1 - (1 - i / n)^3) in the first half of the steps.
    gradual = Schedule(kind="gradual", rounds=2, sparse_steps=0.5)
    assert shares(gradual, 12, 0.8) == [(2, 0.7), (4, 0.8)]
    assert shares(Schedule(kind="sparse", sparse_steps=0.25), 8, 0.8) == [(2, 0.8)]
    assert shares(Schedule(), 8, 0.8) == [(0, 0.8)]


SCHEDULES = [
    Schedule(kind="iterative", rounds=3),
    Schedule(kind="gradual", rounds=3),
    Schedule(kind="sparse"),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: str(s.kind))
@pytest.mark.parametrize(
    ("allocation", "criterion"),
    [("layer", "magnitude"), ("global", "taylor"), ("erk", "activation"), ("lamp", "random"), ("layer", "movement")],
)  # fmt: skip
def test_the_number_of_zeros_is_exact_however_masks_are_set(
    schedule: Schedule, allocation: Allocation, criterion: MaskCriterion, groups: Groups
) -> None:
    mask = Mask(allocation=allocation, criterion=criterion)
    recipe = sparse(groups, 0.7, mask, finetune_steps=8).model_copy(update={"schedule": schedule})
    made = run(recipe, groups)
    assert made.train_steps == 8
    counted = zeros(made.model)
    total = sum(weight_of(made.model, name).numel() for name in LAYERS)
    at_once = zeros(run(recipe.model_copy(update={"schedule": Schedule()}), groups).model)
    assert sum(z for z, _ in counted.values()) == sum(z for z, _ in at_once.values())
    assert abs(sum(z for z, _ in counted.values()) - 0.7 * total) < len(LAYERS)


@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=lambda s: str(s.kind))
@pytest.mark.parametrize("criterion", ["magnitude", "random", "movement"])
def test_zeros_rise_as_planned_and_none_comes_back(schedule: Schedule, criterion: MaskCriterion) -> None:
    weights = train(in_training({"line": 0.5}, Mask(criterion=criterion), schedule, 8), 8, wide())
    planned = [
        max((share for at, share in shares(schedule, 8, 0.5) if at <= step), default=0.0) for step in range(9)
    ]
    assert [int((w == 0).sum()) for w in weights] == [int(p * 64 + 0.5) for p in planned]
    for before, after in zip(weights, weights[1:], strict=False):
        assert bool((after[before == 0] == 0).all())


def test_the_last_level_is_the_whole_share() -> None:
    assert shares(Schedule(kind="iterative", rounds=3), 9, 0.09)[-1] == (6, 0.09)
    assert [share(0.09) for _, share in levels(Schedule(kind="iterative", rounds=3), 9)][-1] == 0.09


def test_zeros_stay_where_layers_are_compared() -> None:
    """By movement under one threshold: a layer whose scores are all far below another's keeps its zeros."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False))
    masks = MaskInTraining(
        {"0": 0.5, "1": 0.5}, Mask(allocation="global", criterion="movement"),
        Schedule(kind="gradual", rounds=3), 12, BATCHES, LOSS,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    before: dict[str, Tensor] = {}
    for step in range(12):
        for place, slope in (("0", -5.0), ("1", 5.0)):
            weight = weight_of(model, place)
            # Scores of one layer rise in the first half and fall below the other's in the second.
            sign = slope if step < 6 else -3 * slope
            weight.grad = sign * weight.detach().sign() * torch.rand(weight.shape, generator=generator)
        masks._add(model)
        masks._hold(model)
        for name, kept in masks.kept.items():
            assert not bool((kept & ~before.get(name, torch.ones_like(kept))).any())
        before = dict(masks.kept)
    assert before


def test_rounds_choose_among_the_weights_of_then() -> None:
    """Magnitudes at first say another thing than after steps that bring large weights down."""
    model = Line()
    with torch.no_grad():
        model.line.weight.copy_(torch.tensor([[1.0, 1.001], [4.0, 5.0]]))
    seen: list[list[float]] = []

    def watch(trainer: Trainer) -> None:
        in_training({"line": 0.5}, Mask(), Schedule(kind="iterative", rounds=2), 2).watch(trainer)
        trainer.observe(after=lambda m: seen.append(weight_of(m, "line").detach().flatten().tolist()))

    # 1 goes at once; then 4 has become -0.5 and goes before 1.001.
    def pulled(model: nn.Module, _: object) -> Tensor:
        return 1e6 * (weight_of(model, "line")[1, 0] - (-0.5)) ** 2

    finetune(
        model,
        TeacherStream(Line(), Ones(), seed=0, batch_size=2),
        Recovery(finetune_steps=2, distill=0.0, clip_norm=1e9, learning_rate=0.5e-6 / 1.9),
        loss=LOSS,
        device=torch.device("cpu"),
        training_step=pulled,
        watch=watch,
    )
    final = [value != 0 for value in seen[-1]]
    assert final == [False, True, False, True]


def zeros_of_blocks(weights: list[Tensor]) -> list[set[int]]:
    return [set((w.view(4, 4, 4) == 0).sum(-1).flatten().tolist()) for w in weights]


def test_a_pattern_rises_to_its_blocks() -> None:
    slow = Schedule(kind="iterative", rounds=4)
    stages = train(in_training({"line": 0.75}, Mask(pattern="1:4"), slow, 8), 8, wide())
    assert zeros_of_blocks(stages) == [{1}] * 2 + [{2}] * 2 + [{3}] * 5
    # A share of less than half a weight of a block masks nothing yet.
    gradual = Schedule(kind="gradual", rounds=10, sparse_steps=1.0)
    stages = train(in_training({"line": 0.25}, Mask(pattern="3:4"), gradual, 22), 22, wide())
    assert zeros_of_blocks(stages)[0] == zeros_of_blocks(stages)[4] == {0}
    assert zeros_of_blocks(stages)[-1] == {1}


def test_sparse_training_shrinks_the_small_more_and_masks_the_smallest() -> None:
    model = wide()
    start = weight_of(model, "line").detach().clone()
    schedule = Schedule(kind="sparse", strength=0.02, sparse_steps=0.5)
    weights = train(in_training({"line": 0.5}, Mask(criterion="random"), schedule, 4), 4, model)
    sizes = start.abs().flatten()
    expected = start * shrinkage(sizes, sizes.mean() * 0.02 * 2 * 1 / (2 * 3)).view_as(start)
    torch.testing.assert_close(weights[1], expected, atol=1e-4, rtol=0.0)
    # The mask comes after the second step, by magnitude; nothing is shrunk from then on.
    assert int((weights[2] == 0).sum()) == 32
    assert bool((weights[2][start.abs() > start.abs().median()] != 0).all())
    torch.testing.assert_close(weights[4], weights[2], atol=1e-4, rtol=0.0)


def test_a_training_that_is_cut_short_still_gives_the_whole_mask() -> None:
    masks = in_training({"line": 0.5}, Mask(), Schedule(kind="gradual"), 100)
    model = wide()
    masks.settle(model)
    assert int((weight_of(model, "line") == 0).sum()) == 32
    kept = make_masks(wide(), {"line": 0.5}, Mask(), {"line": weight_of(wide(), "line").detach().abs()})
    assert torch.equal(weight_of(model, "line") != 0, kept["line"])


def test_movement_adds_up_minus_weight_times_gradient_of_the_first_third_alone() -> None:
    """The loss 3 w00 - 2 w01 - w10 + w11 has the gradient (3, -2; -1, 1) at every step."""
    slopes = torch.tensor([[3.0, -2.0], [-1.0, 1.0]])
    movement = in_training({"line": 0.5}, Mask(criterion="movement"), Schedule(), 6)
    weights: list[Tensor] = []
    set_after: list[bool] = []

    def watch(trainer: Trainer) -> None:
        trainer.observe(before=lambda m: weights.append(weight_of(m, "line").detach().clone()))
        movement.watch(trainer)
        trainer.observe(after=lambda _: set_after.append(bool(movement.kept)))

    model, _ = finetune(
        Line(),
        TeacherStream(Line(), Ones(), seed=0, batch_size=2),
        Recovery(finetune_steps=6, distill=0.0, clip_norm=1e9),
        loss=LOSS,
        device=torch.device("cpu"),
        training_step=lambda m, _: (weight_of(m, "line") * slopes).sum(),
        watch=watch,
    )
    assert set_after == [False, True, True, True, True, True]
    expected = -(weights[0] * slopes) - (weights[1] * slopes)
    torch.testing.assert_close(movement._scores["line"], expected.double())
    # Moved away from zero: w01 (1, rising) stays with the largest score; w10 (-1, rising) goes towards zero.
    final = weight_of(model, "line")
    kept = torch.zeros(4, dtype=torch.bool)
    kept[expected.flatten().argsort(descending=True)[:2]] = True
    assert torch.equal((final != 0).flatten(), kept)


def test_movement_that_had_no_step_falls_back_to_magnitude() -> None:
    movement = in_training({"line": 0.5}, Mask(criterion="movement"), Schedule(), 6)
    model = Line()
    movement.settle(model)
    assert model.line.weight.detach().tolist() == [[0.0, 0.0], [-1.0, 2.0]]
