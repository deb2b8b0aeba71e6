"""Surgery equals ignoring the same channels, on small networks and on torchvision's architectures."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
import torchvision
from torch import nn

from autoprune.compress.discovery import cuttable, find_groups
from autoprune.compress.surgery import Plan, kept_channels, make_plan, prune
from autoprune.errors import CompressionError, UsageError
from autoprune.space.groups import Groups
from autoprune.space.recipe import GroupChoice, Recipe, uniform_recipe
from tests.compress.networks import Mixed, OptionA, Plain, half
from tests.compress.zeroing import zero_mask

ARCHITECTURES = {
    "resnet18": (32, 12),
    "squeezenet1_1": (64, 25),
    "mnasnet0_5": (32, 25),
    "regnet_y_400mf": (32, 53),
    "resnext50_32x4d": (32, 37),
}
SLOW_ARCHITECTURES = {
    "densenet121": (32, 120),
    "googlenet": (32, 57),
    "efficientnet_b0": (32, 40),
    "mobilenet_v3_small": (32, 27),
    "resnet50": (64, 37),
    "mobilenet_v2": (64, 25),
    "vgg11_bn": (32, 10),
    "convnext_tiny": (64, 22),
}


@cache
def network(name: str) -> tuple[nn.Module, Groups, torch.Tensor]:
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    size = (ARCHITECTURES | SLOW_ARCHITECTURES)[name][0]
    x = torch.randn(2, 3, size, size)
    scramble_batchnorm(model, x)
    groups = find_groups(model, x)
    return cuttable(model, groups, x), groups, x


@torch.no_grad()
def scramble_batchnorm(model: nn.Module, x: torch.Tensor) -> None:
    """Give BatchNorms random scales and statistics that keep signals alive through deep networks.

    Parameters that are begun at zero or nearly so (heads, layer scales) would hide what is before them.
    """
    for parameter in model.parameters():
        if float(parameter.abs().max()) < 1e-3:
            nn.init.normal_(parameter, 0.0, 0.3)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.0, 0.3)
        norm.momentum = 1.0
        norm.train()
    model(x)
    for norm in norms:
        norm.eval()
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean += 0.2 * torch.randn_like(norm.running_mean) * norm.running_var.sqrt()
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 1.5)


@torch.no_grad()
def check_equal(model: nn.Module, groups: Groups, plan: Plan, x: torch.Tensor) -> None:
    model, x = deepcopy(model).double(), x.double()
    dense, masked, cut = model(x), zero_mask(model, groups, plan)(x), prune(model, groups, plan)(x)
    scale = float(masked.abs().max())
    assert float((masked - cut).abs().max()) <= 1e-9 * scale
    assert float((masked - dense).abs().max()) > 1e-6 * scale, "the plan has to change something"


@pytest.mark.parametrize(
    "name", [*ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_ARCHITECTURES)]
)
def test_surgery_equals_zero_masking(name: str) -> None:
    model, groups, x = network(name)
    assert len(groups.prunable) == (ARCHITECTURES | SLOW_ARCHITECTURES)[name][1]
    check_equal(model, groups, half(groups), x)
    step = max(1, len(groups.prunable) // 4)
    for group in groups.prunable[::step]:
        check_equal(model, groups, half(groups, group.name), x)


@pytest.mark.parametrize("build", [Plain, Mixed, OptionA])
def test_small_networks(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randn(2, 3, 8, 8)
    groups = find_groups(model, x)
    model = cuttable(model, groups, x)
    check_equal(model, groups, half(groups), x)
    for group in groups.prunable:
        check_equal(model, groups, half(groups, group.name), x)


def test_attributes_follow_the_weights() -> None:
    model = Plain()
    groups = find_groups(model, torch.randn(2, 3, 8, 8))
    cut = prune(model, groups, {"conv1": (0, 5), "conv2": (1, 2, 3), "fc1": (9,)})
    assert isinstance(cut, Plain)
    assert (cut.conv1.out_channels, cut.conv2.in_channels, cut.conv2.out_channels) == (2, 2, 3)
    assert isinstance(cut.bn1, nn.BatchNorm2d) and cut.bn1.num_features == 2
    assert (cut.fc1.in_features, cut.fc1.out_features, cut.fc2.in_features) == (48, 1, 1)
    assert torch.equal(cut.conv2.weight, model.conv2.weight[[1, 2, 3]][:, [0, 5]])
    assert model.conv1.out_channels == 8, "the dense network is not changed"
    assert cut.conv1.weight.requires_grad


def test_grouped_and_depthwise_attributes() -> None:
    model = Mixed()
    groups = find_groups(model, torch.randn(2, 3, 8, 8))
    cut = prune(model, groups, {"left": (0, 2)})
    assert isinstance(cut, Mixed)
    assert (cut.depthwise.groups, cut.depthwise.in_channels, cut.depthwise.out_channels) == (8, 8, 8)
    assert (cut.grouped.groups, cut.grouped.in_channels, cut.grouped.out_channels) == (4, 8, 16)
    assert cut.grouped.weight.shape == (16, 2, 3, 3)


def test_kept_channels_describes_both_sides() -> None:
    model = Mixed()
    groups = find_groups(model, torch.randn(2, 3, 8, 8))
    size = groups.by_name["grouped"].size
    kept = kept_channels(model, groups, {"grouped": tuple(range(size - 1))})
    assert kept["twice"]["in"] == kept["twice"]["out"] == kept["head"]["in"]
    assert set(kept) == {"grouped", "twice", "head"}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"conv1": ()}, "keeps no unit of group 'conv1'"),
        ({"conv1": (1, 0)}, "must be sorted"),
        ({"conv1": (0, 8)}, "0..7"),
        ({"fc2": (0,)}, "'fc2' cannot be pruned: its channels are the network's output"),
    ],
)
def test_plans_that_do_not_fit(plan: Plan, message: str) -> None:
    model = Plain()
    groups = find_groups(model, torch.randn(2, 3, 8, 8))
    with pytest.raises(CompressionError, match=message):
        prune(model, groups, plan)


def test_an_unknown_group_is_named() -> None:
    model = Plain()
    groups = find_groups(model, torch.randn(2, 3, 8, 8))
    with pytest.raises(UsageError, match="did you mean 'conv1'"):
        prune(model, groups, {"conv_1": (0,)})


def test_plan_keeps_the_best_and_the_lower_index_at_ties() -> None:
    model = Plain(norm=False)
    groups = find_groups(model, torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        for channel, size in enumerate([1.0, 4.0, 2.0, 2.0, 4.0, 2.0, 1.0, 2.0]):
            model.conv1.weight[channel] = size
            model.conv2.weight[:, channel] = size
    recipe = Recipe(groups={"conv1": GroupChoice(ratio=0.5)}, width=4)
    assert make_plan(model, groups, recipe, None) == {"conv1": (1, 2, 3, 4)}


def test_plan_counts_follow_the_width() -> None:
    model = Plain()
    groups = find_groups(model, torch.randn(2, 3, 8, 8))
    plan = make_plan(model, groups, uniform_recipe(groups, 0.4, 32, width=4), None)
    assert {name: len(units) for name, units in plan.items()} == {"conv1": 4, "conv2": 4, "fc1": 6}
    assert make_plan(model, groups, Recipe(), None) == {}


def test_recipe_for_a_group_that_is_left_alone_is_refused() -> None:
    model = Plain()
    groups = find_groups(model, torch.randn(2, 3, 8, 8))
    with pytest.raises(UsageError, match="'fc2' cannot be pruned"):
        make_plan(model, groups, Recipe(groups={"fc2": GroupChoice(ratio=0.5)}), None)


class Listed(nn.Module):
    """Holds a parameter twice: by its name and in a list that the forward pass reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.gain = nn.Parameter(torch.ones(2))
        self.gains = [self.gain]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.first(x).relu()) * self.gains[0]
        return out


def test_a_cut_network_shares_nothing_with_the_dense_one() -> None:
    model = Listed()
    groups = find_groups(model, torch.randn(2, 3))
    cut = prune(model, groups, {"first": (0, 3)})
    assert isinstance(cut, Listed)
    assert cut.gains[0] is cut.gain
    own = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert own.isdisjoint(t.data_ptr() for t in [*cut.parameters(), *cut.buffers()])
    whole = prune(model, groups, {})
    assert own.isdisjoint(t.data_ptr() for t in whole.parameters())
