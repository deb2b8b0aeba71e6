"""Statistics, least squares and BatchNorm refresh."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoprune.compress.discovery import find_groups
from autoprune.compress.recovery import refresh_batchnorm, solve_following_layers, solve_ridge
from autoprune.compress.statistics import collect_statistics, sample_patches
from autoprune.compress.surgery import Plan, prune
from autoprune.errors import CompressionError
from tests.compress.networks import Mixed, Plain, Split, half

BATCHES = [Split().training_batch(step, 32, 0) for step in range(8)]


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": (2, 1)},
        {"kernel_size": 3, "dilation": 2, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
)
def test_patches_times_weight_is_the_convolution(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, bias=False, **options)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 9, 8)
    patches = sample_patches(conv, x, 10_000, torch.Generator().manual_seed(0))
    places = torch.randperm(conv(x)[0, 0].numel(), generator=torch.Generator().manual_seed(0))
    expected = conv(x).flatten(2)[:, :, places].movedim(1, 2).flatten(0, 1)
    assert torch.allclose(patches @ conv.weight.flatten(1).T, expected, atol=1e-5)


def test_gram_is_the_mean_of_outer_products_with_a_one_appended() -> None:
    model = Plain().eval()
    groups = find_groups(model, BATCHES[0][0])
    statistics = collect_statistics(model, groups, BATCHES)
    inputs: list[Tensor] = []
    model.fc2.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch, _ in BATCHES:
            model(batch)
    x = torch.cat(inputs).double()
    z = torch.cat([x, x.new_ones(len(x), 1)], 1)
    assert torch.allclose(statistics.gram["fc2"], z.T @ z / len(z), atol=1e-5)
    assert torch.allclose(statistics.moment_of("fc2"), x.square().mean(0), atol=1e-5)
    assert statistics.gram["conv2"].shape == (73, 73)


def test_statistics_leave_no_trace_and_respect_the_limit() -> None:
    model = Plain().train()
    groups = find_groups(model, BATCHES[0][0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = collect_statistics(model, groups, BATCHES, gram_limit=100, gradients=True)
    assert set(statistics.gram) == {"conv2", "fc2"}, "fc1 has 128 inputs"
    assert set(statistics.second_moment) == {"conv2", "fc1", "fc2"}
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.conv1._forward_pre_hooks
    with pytest.raises(CompressionError, match="at least one calibration batch"):
        collect_statistics(model, groups, [])


def outputs_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(inputs) for inputs, _ in BATCHES])


def test_a_channel_that_others_make_up_is_removed_without_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 2, 1)
    ).eval()
    with torch.no_grad():
        first = model[0]
        assert isinstance(first, nn.Conv2d) and first.bias is not None
        first.weight[3] = 2 * first.weight[0] - first.weight[1]
        first.bias[3] = 2 * first.bias[0] - first.bias[1]
    groups = find_groups(model, BATCHES[0][0])
    statistics = collect_statistics(model, groups, BATCHES)
    plan: Plan = {"0": (0, 1, 2)}
    pruned = prune(model, groups, plan)
    dense = outputs_of(model)
    lost = float((outputs_of(pruned) - dense).square().mean())
    assert solve_following_layers(model, pruned, groups, plan, statistics) == ["1"]
    left = float((outputs_of(pruned) - dense).square().mean())
    assert lost > 0.01
    assert left < 1e-5 * lost


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_the_error_of_what_follows_shrinks(norm: bool, bias: bool) -> None:
    torch.manual_seed(1)
    model = Plain(16, norm=norm, bias=bias).eval()
    inputs = [batch for batch, _ in BATCHES]
    refresh_batchnorm(model, inputs)
    groups = find_groups(model, BATCHES[0][0])
    statistics = collect_statistics(model, groups, BATCHES)
    plan = half(groups)
    pruned = prune(model, groups, plan)
    refreshed = prune(model, groups, plan)
    refresh_batchnorm(refreshed, inputs)
    dense = outputs_of(model)
    before = float((outputs_of(refreshed) - dense).square().mean())
    assert solve_following_layers(model, pruned, groups, plan, statistics) == ["conv2", "fc1", "fc2"]
    refresh_batchnorm(pruned, inputs)
    assert float((outputs_of(pruned) - dense).square().mean()) < 0.7 * before


def test_rows_of_cut_outputs_are_left_out_and_concatenations_are_solved_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.b = nn.Conv2d(3, 4, 1)
            self.c = nn.Conv2d(8, 6, 1)
            self.d = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.d(torch.relu(self.c(torch.cat([self.a(x), self.b(x)], 1))))
            return y

    torch.manual_seed(0)
    model = Two().eval()
    with torch.no_grad():
        model.b.weight.copy_(model.a.weight)
        model.b.bias.copy_(model.a.bias)  # type: ignore[union-attr,arg-type]
    groups = find_groups(model, BATCHES[0][0])
    statistics = collect_statistics(model, groups, BATCHES)
    # What a loses b still has, and the other way round; c loses outputs of its own.
    plan = {"a": (0, 1), "b": (2, 3), "c": (0, 2, 4)}
    pruned, reference = prune(model, groups, plan), prune(model, groups, {"c": (0, 2, 4)})
    solved = solve_following_layers(model, pruned, groups, plan, statistics)
    assert solved == ["c", "d"]
    with torch.no_grad():
        x = BATCHES[0][0]
        assert isinstance(pruned, Two) and isinstance(reference, Two)
        got = pruned.c(torch.cat([pruned.a(x), pruned.b(x)], 1))
        want = reference.c(torch.cat([reference.a(x), reference.b(x)], 1))
    assert torch.allclose(got, want, atol=0.02)


def test_grouped_and_depthwise_consumers_are_skipped() -> None:
    model = Mixed().eval()
    groups = find_groups(model, BATCHES[0][0])
    statistics = collect_statistics(model, groups, BATCHES)
    plan = half(groups)
    solved = solve_following_layers(model, prune(model, groups, plan), groups, plan, statistics)
    assert solved == ["twice", "head"]


def test_ridge_copes_with_singular_and_refuses_empty_moments() -> None:
    singular = torch.ones(3, 3, dtype=torch.float64)
    solution = solve_ridge(singular, singular[:, :1])
    assert solution is not None
    assert torch.allclose(singular @ solution, singular[:, :1], atol=1e-2)
    assert solve_ridge(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)) is None


def test_refresh_takes_the_mean_over_batches_and_restores_the_momentum() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.5)).eval()
    batches = [torch.randn(4, 3, 5, 5) + shift for shift in (0.0, 2.0, 4.0)]
    refresh_batchnorm(model, batches)
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    expected = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    assert torch.allclose(norm.running_mean, expected, atol=1e-5)
    assert norm.momentum == 0.3
    assert not norm.training


def test_refresh_does_not_run_a_network_without_batchnorm() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("run for nothing")

    refresh_batchnorm(Fails(), [torch.zeros(2, 3)])


def test_an_empty_plan_solves_nothing() -> None:
    model = Plain().eval()
    groups = find_groups(model, BATCHES[0][0])
    statistics = collect_statistics(model, groups, BATCHES)
    assert solve_following_layers(model, prune(model, groups, {}), groups, {}, statistics) == []


def test_a_single_last_example_joins_the_batch_before_it_and_examples_count_alike() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(17, 4)
    whole, parts = (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    refresh_batchnorm(whole, [inputs])
    refresh_batchnorm(parts, [inputs[:12], inputs[12:16], inputs[16:]])
    torch.testing.assert_close(parts[1].running_mean, whole[1].running_mean)


def test_only_what_a_batchnorm_reads_as_it_is_counts_as_normalised() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.direct, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.rectified, self.second = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.gate, self.fc = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.direct(x)).relu()
            x = self.second(self.rectified(x).relu_())
            x = x.mean((2, 3))
            outputs: Tensor = self.fc(x * self.gate(x).sigmoid())
            return outputs

    model = Net().eval()
    x = torch.randn(4, 3, 5, 5)
    found = collect_statistics(model, find_groups(model, x[:2]), [(x, torch.zeros(4, dtype=torch.long))])
    assert found.before_batchnorm == {"direct"}
