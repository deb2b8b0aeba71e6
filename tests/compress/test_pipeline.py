"""The whole flow of one recipe, with each stage switched on and off."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoprune.compress import pipeline
from autoprune.compress.discovery import find_groups
from autoprune.compress.finetune import TeacherStream, finetune
from autoprune.compress.pipeline import Compressed, compress
from autoprune.compress.recovery import solve_following_layers
from autoprune.compress.statistics import collect_statistics
from autoprune.errors import CompressionError, UsageError
from autoprune.space.recipe import GroupChoice, Recipe, Recovery, uniform_recipe
from tests.compress.networks import Plain, Split

BATCHES = [Split().training_batch(step, 32, 0) for step in range(4)]


def run(model: nn.Module, recipe: Recipe, *, batch_size: int = 16) -> Compressed:
    groups = find_groups(model, BATCHES[0][0])
    return compress(
        model,
        groups,
        recipe,
        statistics=collect_statistics(model, groups, BATCHES),
        calibration_batches=BATCHES,
        stream=TeacherStream(model, Split(), seed=0, batch_size=16),
        loss=nn.functional.cross_entropy,
        batch_size=batch_size,
        device=torch.device("cpu"),
    )


def recipe(**recovery: object) -> Recipe:
    groups = find_groups(Plain(), BATCHES[0][0])
    return uniform_recipe(groups, 0.5, 8, "activation", 4, Recovery.model_validate(recovery))


def test_the_whole_flow() -> None:
    model = Plain().eval()
    result = run(model, recipe(finetune_steps=2))
    assert {name: len(units) for name, units in result.plan.items()} == {"conv1": 4, "conv2": 4, "fc1": 4}
    assert result.solved == ["conv2", "fc1", "fc2"]
    assert result.train_steps == 2
    assert not result.model.training
    assert result.model(BATCHES[0][0]).shape == (32, 3)
    assert model.conv1.out_channels == 8


def test_a_recipe_that_prunes_nothing_gives_the_dense_network() -> None:
    model = Plain().eval()
    result = run(model, Recipe(groups={"conv1": GroupChoice(bits=8)}))
    assert result == Compressed(model=model, plan={}, train_steps=0, solved=[])


@pytest.mark.parametrize(
    ("off", "spared"),
    [
        ({"least_squares": False}, "solve_following_layers"),
        ({"batchnorm": False}, "refresh_batchnorm"),
        ({"finetune_steps": 0}, "finetune"),
    ],
)
def test_every_stage_can_be_switched_off(
    off: dict[str, object], spared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    for name in ("solve_following_layers", "refresh_batchnorm", "finetune"):
        original = getattr(pipeline, name)

        def noted(*args: object, name: str = name, original: object = original, **options: object) -> object:
            done.append(name)
            return original(*args, **options)  # type: ignore[operator]

        monkeypatch.setattr(pipeline, name, noted)
    run(Plain().eval(), recipe(**{"finetune_steps": 1, **off}))
    every = ["solve_following_layers", "refresh_batchnorm", "finetune"]
    assert done == [name for name in every if name != spared]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown group 'conv9'"):
        run(Plain().eval(), Recipe(groups={"conv9": GroupChoice(ratio=0.5)}))
    with pytest.raises(CompressionError, match="batch_size is 8"):
        run(Plain().eval(), recipe(), batch_size=8)


def test_low_rank_comes_after_least_squares_and_before_batchnorm_statistics() -> None:
    model = Plain(16).eval()
    groups = find_groups(model, BATCHES[0][0])
    low = uniform_recipe(groups, 0.5, 8, "l2", 4, Recovery(finetune_steps=2), rank_ratio=0.5)
    result = run(model, low)
    assert {name: len(units) for name, units in result.plan.items()} == {"conv1": 8, "conv2": 8, "fc1": 4}
    # Of full rank 8, 8 and 4; the layer that makes the output is left out.
    assert result.factorised.ranks == {"conv1": 4, "conv2": 4, "fc1": 2}
    assert result.train_steps == 2
    assert result.model(BATCHES[0][0]).shape == (32, 3)
    untrained = low.model_copy(update={"recovery": Recovery(finetune_steps=0)})
    state = run(model, untrained).model.state_dict()
    stale = low.model_copy(update={"recovery": Recovery(finetune_steps=0, batchnorm=False)})
    assert not torch.equal(
        state["bn2.running_mean"], run(model, stale).model.state_dict()["bn2.running_mean"]
    )


def test_low_rank_alone_recovers_too() -> None:
    model = Plain(16).eval()
    groups = find_groups(model, BATCHES[0][0])
    result = run(model, uniform_recipe(groups, 0.0, 8, "l2", 4, Recovery(finetune_steps=0), rank_ratio=0.5))
    assert (result.plan, result.train_steps) == ({}, 0)
    assert set(result.factorised.ranks) == {"conv1", "conv2", "fc1"}
    mean = model.get_buffer("bn2.running_mean")
    assert not torch.equal(result.model.get_buffer("bn2.running_mean"), mean)


def test_training_first_trains_the_dense_network_and_nothing_after_the_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained: list[nn.Module] = []
    solved_with: list[object] = []

    def tune(network: nn.Module, *args: object, **options: object) -> object:
        result = finetune(network, *args, **options)  # type: ignore[arg-type]
        trained.extend([network, result[0]])
        return result

    def solve(*args: object, **options: object) -> object:
        solved_with.extend(args)
        return solve_following_layers(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "finetune", tune)
    monkeypatch.setattr(pipeline, "solve_following_layers", solve)
    torch.manual_seed(0)
    model = Plain().eval()
    first = recipe(finetune_steps=3).model_copy(update={"order": "tune-prune-quantize"})
    result = run(model, first)
    assert trained[0] is model
    tuned = trained[1]
    assert len(trained) == 2 and solved_with[0] is tuned
    assert result.train_steps == 3
    own = collect_statistics(tuned, find_groups(tuned, BATCHES[0][0]), BATCHES)
    used = solved_with[4]
    assert isinstance(used, type(own))
    assert torch.equal(used.gram["conv2"], own.gram["conv2"])
    # Rows that stay are the tuned network's own: nothing was trained after the cut.
    kept = torch.tensor(result.plan["conv1"])
    assert torch.equal(result.model.get_parameter("conv1.weight"), tuned.get_parameter("conv1.weight")[kept])


def test_without_steps_the_order_makes_no_difference() -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    usual = recipe(finetune_steps=0)
    states = [
        run(model, usual.model_copy(update={"order": order})).model.state_dict()
        for order in ("prune-tune-quantize", "tune-prune-quantize")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
