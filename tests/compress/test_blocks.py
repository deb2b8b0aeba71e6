"""Residual blocks that are taken out whole."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from autoprune.compress.blocks import take_out, that_can_go
from autoprune.compress.discovery import cuttable, find_groups
from autoprune.compress.graph import residual
from autoprune.compress.graph.find import trace
from autoprune.compress.graph.network import GraphNetwork
from autoprune.compress.lineage import groups_after
from autoprune.compress.pipeline import compress
from autoprune.compress.statistics import collect_statistics
from autoprune.compress.stream import TeacherStream
from autoprune.compress.surgery import Plan, kept_channels, make_plan, prune
from autoprune.errors import CompressionError, UsageError
from autoprune.space.groups import Groups, kept_count
from autoprune.space.recipe import GroupChoice, Recipe, Recovery
from autoprune.workloads.cifar_resnet import cifar_resnet

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("cifar"):
        return cifar_resnet("cifar_resnet20").eval()
    model: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=10)
    return model.eval()


def blocks_of(model: nn.Module) -> tuple[Groups, dict[str, str]]:
    groups = find_groups(model, IMAGES)
    return groups, {g.name: g.block for g in groups.groups if g.block}


def with_groups(name: str) -> tuple[nn.Module, Groups, dict[str, str]]:
    model = network(name)
    groups, found = blocks_of(model)
    return cuttable(model, groups, IMAGES), groups, found


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        (
            "cifar_resnet20",
            {"layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"},
        ),
        ("resnet18", {"layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"}),
        ("mobilenet_v3_small", {f"features.{i}" for i in (3, 5, 6, 8, 10, 11)}),
    ],
)
def test_blocks_are_those_that_add_to_their_input(name: str, blocks: set[str]) -> None:
    _, found = blocks_of(network(name))
    assert set(found.values()) == blocks


class Chain(nn.Module):
    """Two convolutions in a row that keep the shape, and a gate: neither adds its input."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
        self.gate = torchvision.ops.SqueezeExcitation(3, 4)
        self.head = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gate(self.chain(x)))
        return y


def test_chains_and_gates_are_no_blocks() -> None:
    groups, found = blocks_of(Chain().eval())
    assert {g.name for g in groups.prunable} >= {"chain.0"}
    assert found == {}


class InPlace(nn.Module):
    """A gate and a chain that write into their input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.gate = _Gate()
        self.chain = nn.Sequential(
            nn.ReLU6(inplace=True), nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1)
        )
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.chain(self.gate(self.stem(x))))
        return y


class _Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(torch.sigmoid(self.up(torch.relu(self.down(x)))))


def test_writing_into_the_input_makes_no_block() -> None:
    groups, found = blocks_of(InPlace().eval())
    assert {g.name for g in groups.prunable} >= {"gate.down", "chain.1"}
    assert found == {}


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet18", "mobilenet_v3_small"])
def test_taking_a_block_out_equals_the_identity_and_goes_with_other_cuts(name: str) -> None:
    model, groups, found = with_groups(name)
    gone = dict(list(found.items())[::2])
    plan: Plan = dict.fromkeys(gone, ())
    wanted = deepcopy(model)
    for block in gone.values():
        take_out(wanted, block)
    torch.testing.assert_close(prune(model, groups, plan)(IMAGES), wanted(IMAGES))
    # The other groups, those of the residual stream among them, are cut as in the network without the blocks.
    rest = groups.without(list(gone.values()))
    others: Plan = {g.name: tuple(range(g.size - g.size // 4)) for g in rest.prunable}
    cut = prune(model, groups, {**plan, **others})
    torch.testing.assert_close(cut(IMAGES), prune(wanted, rest, others)(IMAGES))


def test_counts_and_plans_say_none_is_left() -> None:
    model, groups, _ = with_groups("cifar_resnet20")
    assert kept_count(16, 1.0, 8) == 0
    recipe = Recipe(groups={"layer1.1.conv1": GroupChoice(ratio=1.0, bits=8)})
    plan = make_plan(model, groups, recipe, None)
    assert plan == {"layer1.1.conv1": ()}
    assert kept_channels(model, groups, plan) == {}
    assert groups.removed_blocks(recipe.kept_counts(groups)) == ("layer1.1",)


def test_a_group_without_a_block_keeps_something() -> None:
    model, groups, _ = with_groups("cifar_resnet20")
    with pytest.raises(CompressionError, match="keeps no unit"):
        prune(model, groups, {"layer2.0.conv1": ()})
    recipe = Recipe(groups={"layer2.0.conv1": GroupChoice(ratio=1.0)})
    with pytest.raises(UsageError, match=r"'layer2.0.conv1' has ratio 1.* allowed: below 1"):
        recipe.check(groups)


def test_a_network_that_lost_blocks_is_cut_further() -> None:
    model, groups, found = with_groups("cifar_resnet20")
    first: Plan = {"layer1.1.conv1": (), "layer2.2.conv1": tuple(range(0, 32, 2))}
    parent = prune(model, groups, first).eval()
    left = groups_after(model, groups, first)
    assert "layer1.1.conv1" not in left.by_name
    assert left.by_name["layer2.2.conv1"].size == 16
    statistics = collect_statistics(parent, left, [(IMAGES, torch.tensor([1, 2]))])
    assert "layer2.2.conv2" in statistics.second_moment
    second: Plan = {"layer2.2.conv1": tuple(range(8)), "layer3.1.conv1": ()}
    both: Plan = {**first, "layer2.2.conv1": tuple(range(0, 16, 2)), "layer3.1.conv1": ()}
    torch.testing.assert_close(prune(parent, left, second)(IMAGES), prune(model, groups, both)(IMAGES))
    assert isinstance(parent, GraphNetwork)
    blocks = residual.removable_blocks(parent, left, IMAGES)
    assert blocks == {g: b for g, b in found.items() if b != "layer1.1"}


def test_a_network_that_is_no_graph_and_lost_blocks_has_the_others() -> None:
    model, groups, found = with_groups("resnet18")
    first: Plan = {"layer1.1.conv1": ()}
    parent = prune(model, groups, first).eval()
    left = groups_after(model, groups, first)
    blocks = residual.removable_blocks(trace(parent, IMAGES).network, left, IMAGES)
    assert blocks == {g: b for g, b in found.items() if b != "layer1.1"}


class Asking(nn.Module):
    """A network that asks its first block for an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x) * self.first.out_channels)
        return y


def test_blocks_that_the_code_asks_something_of_stay() -> None:
    assert that_can_go(Asking().eval(), {"a": "first", "b": "second"}, IMAGES) == {"b": "second"}
    assert that_can_go(Asking().eval(), {"b": "second"}, IMAGES) == {"b": "second"}


def test_a_network_that_only_lost_a_block_is_trained_further() -> None:
    model, groups, _ = with_groups("cifar_resnet20")
    recipe = Recipe(
        groups={"layer1.1.conv1": GroupChoice(ratio=1.0)},
        recovery=Recovery(least_squares=False, finetune_steps=2),
    )
    parent = prune(model, groups, {"layer1.1.conv1": ()}).eval()
    left = groups_after(model, groups, {"layer1.1.conv1": ()})
    targets = torch.tensor([1, 2])
    further = compress(
        parent,
        left,
        recipe,
        statistics=None,
        calibration_batches=[(IMAGES, targets)],
        stream=TeacherStream(model, Same(), seed=0, batch_size=2),
        loss=nn.functional.cross_entropy,
        batch_size=2,
        device=torch.device("cpu"),
        counts=recipe.kept_counts(groups),
    )
    assert further.train_steps == 2


class Same:
    """The same two images at every step."""

    def training_batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        return IMAGES, torch.tensor([1, 2])
