"""The whole flow of one recipe, with each stage switched on and off."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoprune.compress import pipeline
from autoprune.compress.discovery import find_groups
from autoprune.compress.finetune import TeacherStream
from autoprune.compress.pipeline import Compressed, compress
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
