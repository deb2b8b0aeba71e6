"""A network that was cut is cut further by groups that were not found anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from autoprune.compress.discovery import find_groups
from autoprune.compress.lineage import groups_after, in_dense_units
from autoprune.compress.pipeline import compress
from autoprune.compress.statistics import collect_statistics
from autoprune.compress.stream import TeacherStream
from autoprune.compress.surgery import Plan, prune
from autoprune.space.recipe import Recipe, Recovery, uniform_recipe
from tests.compress.networks import Mixed, Plain, Split
from tests.deploy.networks import residual


@pytest.mark.parametrize("build", [Plain, Mixed, residual])
def test_cutting_twice_equals_cutting_once(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    images = torch.randn(2, 3, 16, 16)
    groups = find_groups(model, images)
    first: Plan = {g.name: tuple(range(1, g.size)) for g in groups.prunable if g.size > 2}
    parent = prune(model, groups, first).eval()
    after = groups_after(model, groups, first)
    assert {g.name: g.size for g in after.prunable} == {
        g.name: len(first.get(g.name, range(g.size))) for g in groups.prunable
    }
    second: Plan = {g.name: tuple(range(0, g.size, 2)) for g in after.prunable if g.size > 1}
    both = in_dense_units(first, second)
    torch.testing.assert_close(prune(parent, after, second)(images), prune(model, groups, both)(images))
    assert both != second


def test_the_groups_after_a_cut_are_those_that_would_be_found() -> None:
    torch.manual_seed(0)
    model = residual().eval()
    images = torch.randn(2, 3, 16, 16)
    groups = find_groups(model, images)
    plan: Plan = {g.name: tuple(range(g.size // 2)) for g in groups.prunable}
    found = find_groups(prune(model, groups, plan).eval(), images)
    after = groups_after(model, groups, plan)
    assert {g.name: (g.size, g.members) for g in after.prunable} == {
        g.name: (g.size, g.members) for g in found.prunable
    }


def test_a_recipe_starts_from_recovered_weights_and_counts_by_the_dense_network() -> None:
    torch.manual_seed(0)
    model = Plain(16).eval()
    images, targets = torch.randn(16, 3, 16, 16), torch.randint(0, 3, (16,))
    groups = find_groups(model, images[:2])
    batches = [(images, targets)]
    first: Plan = {"conv1": tuple(range(12))}
    parent = prune(model, groups, first).eval()
    last = parent.get_submodule("fc2")
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.bias.fill_(0.5)  # something that the dense network does not have
    after = groups_after(model, groups, first)
    untrained = Recovery(least_squares=False, finetune_steps=0)
    recipe = uniform_recipe(groups, 0.5, 32, "l2", 1, untrained)
    result = compress(
        parent,
        after,
        recipe,
        statistics=collect_statistics(parent, after, batches),
        calibration_batches=batches,
        stream=TeacherStream(model, Split(), seed=0, batch_size=4),
        loss=nn.functional.cross_entropy,
        batch_size=4,
        device=torch.device("cpu"),
        counts=recipe.kept_counts(groups),
    )
    assert result.model.get_parameter("conv1.weight").shape[0] == 8
    assert torch.equal(result.model.get_parameter("fc2.bias"), last.bias)
    assert len(result.plan["conv1"]) == 8
    unchanged = compress(
        parent,
        after,
        Recipe(groups={"conv1": recipe.choice("conv1")}, width=1, recovery=Recovery(finetune_steps=0)),
        statistics=None,
        calibration_batches=batches,
        stream=TeacherStream(model, Split(), seed=0, batch_size=4),
        loss=nn.functional.cross_entropy,
        batch_size=4,
        device=torch.device("cpu"),
        counts={g.name: g.size for g in after.groups},
    )
    assert unchanged.plan == {}
    torch.testing.assert_close(unchanged.model(images), parent(images))
