"""Training that knows of integers: gradients by the paper, networks that end on their grids."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from autoprune.compress.aware import IntegerTraining, learned
from autoprune.compress.discovery import find_groups
from autoprune.compress.finetune import TeacherStream, Trainer, finetune
from autoprune.compress.pipeline import Compressed, compress
from autoprune.compress.quantization import quantized
from autoprune.compress.quantizers import grid_of, scales
from autoprune.compress.statistics import collect_statistics
from autoprune.space.quantization import Quantization
from autoprune.space.recipe import Recipe, Recovery, uniform_recipe
from tests.compress.networks import Plain, Split

BATCHES = [Split().training_batch(step, 16, 0) for step in range(3)]
LOSS = nn.functional.cross_entropy


def seeded() -> Plain:
    torch.manual_seed(0)
    return Plain().eval()


def test_gradients_are_those_of_the_paper() -> None:
    """With scale 0.5 and integers up to 3: 0.6 rounds to 0.5, -0.1 to 0, 9 is clipped to 1.5."""
    weight = torch.tensor([[0.6, -0.1, 9.0]], requires_grad=True)
    log_scale = torch.tensor([[math.log(0.5)]], requires_grad=True)
    made = learned(weight, log_scale, 3)
    assert made.tolist() == [[0.5, 0.0, 1.5]]
    up = torch.tensor([[1.0, 2.0, 3.0]])
    made.backward(up)  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1.0, 2.0, 0.0]]
    # d/ds: round(v) - v inside, the largest integer outside; times 1 / sqrt(3 * 3), and s for the logarithm.
    by_scale = 1.0 * (1 - 1.2) + 2.0 * (0 + 0.2) + 3.0 * 3
    assert log_scale.grad is not None
    assert log_scale.grad.item() == pytest.approx(by_scale / 3 * 0.5, rel=1e-5)


def recipe_of(
    aware: float, bits: int, steps: int = 6, ratio: float = 0.0, activation_bits: int = 8
) -> Recipe:
    groups = find_groups(seeded(), BATCHES[0][0])
    made = uniform_recipe(groups, ratio, 32, width=1, recovery=Recovery(finetune_steps=steps))
    choices = {
        name: c.model_copy(update={"bits": bits, "activation_bits": activation_bits})
        for name, c in made.groups.items()
    }
    return made.model_copy(update={"groups": choices, "quantization": Quantization(aware=aware)})


def run(recipe: Recipe) -> Compressed:
    model = seeded()
    groups = find_groups(model, BATCHES[0][0])
    return compress(
        model,
        groups,
        recipe,
        statistics=collect_statistics(model, groups, BATCHES),
        calibration_batches=BATCHES,
        stream=TeacherStream(model, Split(), seed=0, batch_size=16),
        loss=LOSS,
        batch_size=16,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(("aware", "ratio"), [(1.0, 0.0), (0.5, 0.0), (0.5, 0.5)])
def test_weights_end_on_grids_that_quantization_keeps(aware: float, ratio: float) -> None:
    made = run(recipe_of(aware, 3, ratio=ratio))
    assert made.train_steps == 6
    plain = seeded()
    assert set(made.model.state_dict()) == set(plain.state_dict())
    layers = {n: m for n, m in made.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for module in layers.values():
        assert "forward" not in vars(module)
        assert grid_of(module.weight.detach().flatten(1), 3) is not None
    stored, codes, _ = quantized(
        made.model, dict.fromkeys(layers, 3), Quantization(rounding="gptq"), [BATCHES[0][0]]
    )
    for name, module in layers.items():
        torch.testing.assert_close(stored.get_submodule(name).get_parameter("weight"), module.weight)
        assert int(codes[name].abs().max()) <= 3


def test_without_a_share_nothing_is_trained_that_is_not_cut() -> None:
    recipe = recipe_of(0.0, 3)
    assert not recipe.prunes
    assert run(recipe).train_steps == 0


@pytest.mark.parametrize(
    ("steps", "share", "integer_steps"), [(4, 0.5, 2), (10, 0.1, 1), (3, 1.0, 3), (2, 0.5, 1)]
)
def test_the_share_of_steps_that_know_of_integers(steps: int, share: float, integer_steps: int) -> None:
    model = seeded()
    training = IntegerTraining(model, {"conv1": 4, "fc2": 4}, ["conv1"], share)
    seen: list[bool] = []

    def watch(trainer: Trainer) -> None:
        training.watch(trainer)
        # Whether the step whose gradients are there was taken with integers.
        trainer.observe(before=lambda m: seen.append(bool(m.get_submodule("conv1").quantizing)))

    trained, _ = finetune(
        model,
        TeacherStream(seeded(), Split(), seed=0, batch_size=16),
        Recovery(finetune_steps=steps),
        loss=LOSS,
        device=torch.device("cpu"),
        watch=watch,
    )
    assert sum(seen) == integer_steps
    assert seen == sorted(seen)
    final = training.finish(trained)
    assert grid_of(final.get_submodule("conv1").get_parameter("weight").detach().flatten(1), 4) is not None


class _Padded(nn.Conv2d):
    """A convolution with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def test_a_layer_keeps_its_own_forward_pass() -> None:
    model = nn.Sequential(_Padded(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    x = BATCHES[0][0]
    with torch.no_grad():
        before = model(x)
        training = IntegerTraining(model, {"0": 4, "2": 4}, (), 1.0)
        assert torch.equal(model(x), before)
        training._begin(model)
        within = model(x)
        assert within.shape == before.shape
        assert not torch.equal(within, before)
        torch.testing.assert_close(training.finish(model)(x), within)
    assert list(dict(model.named_parameters())) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_the_order_that_trains_before_the_cut_trains_no_integers() -> None:
    recipe = recipe_of(1.0, 3).model_copy(update={"order": "tune-prune-quantize"})
    assert not recipe.trains_integers


def test_a_training_that_never_came_to_integers_leaves_plain_weights() -> None:
    model = seeded()
    training = IntegerTraining(model, {"conv1": 4}, ["conv1"], 0.5)
    before = model.conv1.weight.detach().clone()
    assert torch.equal(training.finish(model).get_submodule("conv1").get_parameter("weight"), before)


def test_what_is_trained_is_what_the_rounded_network_computes() -> None:
    inputs = BATCHES[0][0]
    model = seeded()
    training = IntegerTraining(model, {"conv1": 2, "conv2": 2, "fc1": 2, "fc2": 2}, (), 1.0)
    training._begin(model)
    with torch.no_grad():
        within = model(inputs)
        after: Tensor = training.finish(model)(inputs)
    torch.testing.assert_close(within, after)


def test_training_with_integers_loses_less_than_rounding_after_it() -> None:
    """A linear layer's outputs by 2 bits: rounded as well as scales allow, and trained from there."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    wanted = torch.randn(6, 24, generator=generator)
    start = scales(wanted, 2, "mse").log()

    def error(weight: Tensor, log_scale: Tensor) -> Tensor:
        return ((learned(weight, log_scale, 2) - wanted) @ inputs.T).square().mean()

    weight, log_scale = wanted.clone().requires_grad_(), start.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight, log_scale], lr=0.02)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.02 * (1.0 - step / 600)
        optimizer.zero_grad()
        error(weight, log_scale).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        assert float(error(weight, log_scale)) < 0.75 * float(error(wanted, start))
    assert not torch.equal(log_scale, start)


def test_weights_on_a_grid_are_told_from_others() -> None:
    step = torch.tensor([[0.3], [0.01]])
    codes = torch.randint(-3, 4, (2, 40), generator=torch.Generator().manual_seed(0)).float()
    codes[1, :] = codes[1].clamp(-2, 2)  # a channel that does not reach the end
    found = grid_of(codes * step, 3)
    assert found is not None
    torch.testing.assert_close(found, step)
    torch.testing.assert_close(scales(codes * step, 3, "mse"), step)
    assert grid_of(torch.randn(2, 40, generator=torch.Generator().manual_seed(0)), 8) is None
