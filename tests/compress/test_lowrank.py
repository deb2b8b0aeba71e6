"""Low-rank layers: known errors, the data's part in them, and what is left whole."""

from __future__ import annotations

import itertools
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoprune.compress.discovery import find_groups
from autoprune.compress.layers import Conv
from autoprune.compress.lowrank import (
    LowRank,
    factorise,
    low_rank_factors,
    shape_factors,
    wins,
    with_factors,
)
from autoprune.compress.statistics import LayerStatistics, collect_statistics
from autoprune.compress.surgery import kept_channels, prune
from autoprune.deploy.onnxruntime import OnnxRuntime
from autoprune.deploy.runtime import Formats
from autoprune.errors import CompressionError
from autoprune.measure.cost import count_macs, count_params
from autoprune.space.groups import Group, Groups, Member
from autoprune.space.recipe import GroupChoice, Recipe, uniform_recipe
from autoprune.target import Target
from tests.compress.networks import Plain


def matrix(out: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(out, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(features: int, examples: int, seed: int = 1) -> Tensor:
    x = matrix(examples, features, seed) * torch.logspace(0, -2, features, dtype=torch.float64)
    return x.T @ x / examples


def groups_of(model: nn.Module) -> Groups:
    """Return one group for each weighted layer, without discovery."""
    made = []
    for name, module in model.named_modules():
        if isinstance(module, Conv | nn.Linear):
            member = Member(layer=name, kind="conv", axis="out", index_map=((0,),))
            made.append(Group(name=name, type="conv", size=1, members=(member,), prunable=False))
    return Groups(groups=tuple(made), input_shape=(3, 8, 8))


def low_rank(
    model: nn.Module, ratio: float, x: Tensor, statistics: LayerStatistics | None = None, width: int = 1
) -> tuple[nn.Module, dict[str, int], dict[str, str]]:
    groups = groups_of(model)
    recipe = Recipe(groups={g.name: GroupChoice(rank_ratio=ratio) for g in groups.groups}, width=width)
    copy = deepcopy(model)
    found = factorise(copy, groups, recipe, x, kept_inputs={}, statistics=statistics, refreshed=False)
    return copy, dict(found.ranks), dict(found.left_whole)


@pytest.mark.parametrize(("out", "features"), [(6, 10), (10, 6)])
@pytest.mark.parametrize("examples", [None, 3, 50])
def test_full_rank_is_exact_also_where_the_data_lacks_directions(
    out: int, features: int, examples: int | None
) -> None:
    weight = matrix(out, features)
    first, second = low_rank_factors(weight, 6, None if examples is None else moments(features, examples))
    assert first.shape == (6, features) and second.shape == (out, 6)
    torch.testing.assert_close(second @ first, weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_is_that_of_the_discarded_singular_values(rank: int) -> None:
    weight, seen = matrix(7, 9), moments(9, 40)
    first, second = low_rank_factors(weight, rank)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close((weight - second @ first).square().sum(), values[rank:].square().sum())
    torch.testing.assert_close(first.norm(dim=1), second.norm(dim=0))
    first, second = low_rank_factors(weight, rank, seen)
    lost = weight - second @ first
    root = torch.linalg.cholesky(seen + 1e-3 * seen.diagonal().mean() * torch.eye(9))
    values = torch.linalg.svdvals(weight @ root)
    torch.testing.assert_close((lost @ root).square().sum(), values[rank:].square().sum())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(CompressionError, match="rank 8 does not fit a weight 7 x 9"):
        low_rank_factors(matrix(7, 9), 8)
    with pytest.raises(CompressionError, match=r"moments \(5, 5\) do not fit a weight that reads 9"):
        low_rank_factors(matrix(7, 9), 2, moments(5, 10))


LAYERS = [
    nn.Conv2d(16, 24, 3, padding=1),
    nn.Conv2d(16, 24, (1, 3), stride=2, padding=(0, 1), bias=False),
    nn.Conv2d(16, 24, 3, padding=2, dilation=2, padding_mode="reflect"),
    nn.Conv2d(16, 24, 1, stride=2),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(layer.kernel_size))
def test_a_convolution_becomes_two_that_compute_the_nearest_one(layer: nn.Conv2d) -> None:
    x = torch.randn(2, 16, 9, 9)
    model = nn.Sequential(layer).eval()
    made, ranks, _ = low_rank(model, 0.75, x)
    full = min(24, 16 * layer.kernel_size[0] * layer.kernel_size[1])
    assert ranks == {"0": full // 4}
    first, second = low_rank_factors(layer.weight.flatten(1), ranks["0"])
    nearest = deepcopy(model)
    nearest.get_parameter("0.weight").data = (second @ first).float().reshape(layer.weight.shape)
    torch.testing.assert_close(made(x), nearest(x), rtol=1e-4, atol=1e-5)
    assert count_params(made) < count_params(model)
    assert count_macs(made, (16, 9, 9)) < count_macs(model, (16, 9, 9))


def test_two_layers_win_exactly_where_they_have_fewer_weights_and_operations() -> None:
    for out, channels, rank in itertools.product((4, 9), (3, 8), (1, 2, 3, 4, 5, 6, 7, 8)):
        if rank > min(out, channels * 4):
            continue
        one = nn.Conv2d(channels, out, 2, bias=False)
        two = nn.Sequential(nn.Conv2d(channels, rank, 2, bias=False), nn.Conv2d(rank, out, 1, bias=False))
        shape = (channels, 5, 5)
        expected = count_params(two) < count_params(one)
        assert (count_macs(two, shape) < count_macs(one, shape)) == expected
        assert wins(out, channels * 4, rank) == expected


@torch.no_grad()
def test_the_data_aware_factors_beat_the_plain_ones_on_the_data_they_saw() -> None:
    torch.manual_seed(0)
    model = Plain(16).eval()
    scale = torch.tensor([1.0, 0.2, 3.0])[:, None, None]
    images = torch.nn.functional.avg_pool2d(torch.randn(64, 3, 18, 18), 3, 1) * scale
    groups = find_groups(model, images[:2])
    statistics = collect_statistics(model, groups, [(images, torch.zeros(64).long())])
    recipe = uniform_recipe(groups, 0.0, 32, rank_ratio=0.7)
    errors = []
    for known in (statistics, None):
        made = deepcopy(model)
        factorise(made, groups, recipe, images[:2], kept_inputs={}, statistics=known, refreshed=False)
        hidden = torch.relu(model.bn1(model.conv1(images)))
        layer = made.get_submodule("conv2")
        assert isinstance(layer, LowRank)
        lost = layer(hidden) - model.conv2(hidden)
        errors.append(float(lost.square().mean()))
        if known is not None:  # the bias takes up the shift of the mean, up to the sampling of places
            assert float(lost.mean((0, 2, 3)).abs().max()) < 0.1 * float(lost.std())
    assert errors[0] < 0.6 * errors[1]


def test_moments_are_those_of_the_inputs_that_stayed() -> None:
    torch.manual_seed(0)
    model = Plain(16).eval()
    images = torch.randn(32, 3, 8, 8)
    batches = [(images, torch.zeros(32).long())]
    groups = find_groups(model, images[:2])
    plan = {"conv1": tuple(range(0, 16, 2)), "conv2": tuple(range(3, 14))}
    cut = prune(model, groups, plan).eval()
    own = find_groups(cut, images[:2])
    made = []
    for known, its_groups, kept in (
        (collect_statistics(model, groups, batches), groups, kept_channels(model, groups, plan)),
        (collect_statistics(cut, own, batches), own, {}),
    ):
        copy = deepcopy(cut)
        recipe = Recipe(groups={"conv2": GroupChoice(rank_ratio=0.5)}, width=1)
        inputs = {name: sides["in"] for name, sides in kept.items() if "in" in sides}
        found = factorise(
            copy, its_groups, recipe, images[:2], kept_inputs=inputs, statistics=known, refreshed=False
        )
        assert dict(found.ranks) == {"conv2": 5}
        made.append(copy(images))
    torch.testing.assert_close(made[0], made[1], rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """Layers that cannot be two, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Conv2d(3, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.transposed = nn.ConvTranspose2d(32, 32, 3, padding=1)
        self.read = nn.Linear(32, 32)
        self.one = nn.Linear(32, 32)
        self.other = nn.Linear(32, 32)
        self.other.weight = self.one.weight
        self.hooked = nn.Linear(32, 32)
        self.hooked.register_forward_hook(lambda _m, _i, outputs: outputs * 2)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transposed(self.grouped(self.depthwise(self.good(x)))).mean((2, 3))
        x = self.hooked(self.other(self.one(nn.functional.linear(x, self.read.weight))))
        y: Tensor = self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        return y


def test_what_cannot_be_two_layers_or_does_not_win_is_left_whole_by_name() -> None:
    model = Odd().eval()
    x = torch.randn(2, 3, 8, 8)
    made, ranks, left = low_rank(model, 0.5, x)
    assert ranks == {"good": 13}
    assert [name for name, module in made.named_modules() if isinstance(module, LowRank)] == ["good"]
    parts = {
        "depthwise": "depthwise convolution",
        "grouped": "grouped convolution",
        "transposed": "ConvTranspose2d",
        "read": "does not run it as a layer",
        "one": "shares its weight",
        "other": "shares its weight",
        "hooked": "hooks",
        "attention.out_proj": "NonDynamicallyQuantizableLinear",
    }
    assert set(left) == set(parts)
    for name, part in parts.items():
        assert part in left[name]
    _, few, many = low_rank(model, 0.05, x)
    assert "good" not in few
    assert "rank 26 of 27 saves nothing in a weight 32 x 27" in many["good"]


def test_a_network_that_reads_attributes_of_the_layer_is_refused() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            return y / self.fc.in_features

    with pytest.raises(
        CompressionError, match=r"does not run with low-rank layers: AttributeError.*in_features"
    ):
        low_rank(Reader().eval(), 0.8, torch.randn(2, 32))


def test_shapes_come_back_and_take_the_weights() -> None:
    model = Plain(16).eval()
    x = torch.randn(4, 3, 8, 8)
    made, ranks, _ = low_rank(model, 0.8, x)
    again = deepcopy(model)
    shape_factors(again, ranks)
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(again.eval()(x), made(x), rtol=0, atol=0)
    assert with_factors(made, ["conv2", "bn1", "gone"]) == ["conv2.0", "conv2.1", "bn1", "gone"]


def test_both_layers_are_exported_in_int8_and_no_dense_weight_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Plain(32, norm=False).eval()
    x = torch.randn(32, 3, 8, 8)
    with torch.no_grad():  # of rank 4 in truth, so that the dense network's own graph gives the same outputs
        for name in ("conv1", "conv2"):
            weight = model.get_parameter(f"{name}.weight")
            first, second = low_rank_factors(weight.flatten(1), 4)
            weight.copy_((second @ first).reshape(weight.shape))
    runtime = OnnxRuntime(Target())
    runtime.prepare(model, x[:2])
    dense = runtime.build(model, tmp_path / "dense.onnx", Formats(), [x])
    groups = groups_of(model)
    recipe = Recipe(groups={name: GroupChoice(rank_ratio=0.85) for name in ("conv1", "conv2")}, width=4)
    made = deepcopy(model)
    found = factorise(made, groups, recipe, x[:2], kept_inputs={}, statistics=None, refreshed=False)
    assert dict(found.ranks) == {"conv1": 4, "conv2": 4}
    torch.testing.assert_close(made(x), model(x), rtol=1e-3, atol=1e-4)
    plain = runtime.build(made, tmp_path / "plain.onnx", Formats(), [x])
    assert plain.parity_error < 1e-3
    assert plain.path.stat().st_size < 0.8 * dense.path.stat().st_size
    asked = with_factors(made, ["conv1", "conv2"])
    int8 = runtime.build(made, tmp_path / "int8.onnx", Formats(int8=asked), [x])
    assert int8.executed.asked_int8 == int8.executed.int8_layers == 4
    assert int8.path.stat().st_size < plain.path.stat().st_size
