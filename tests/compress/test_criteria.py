"""Each criterion against its definition on tensors small enough to check by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoprune.compress import importance
from autoprune.compress.criteria import score_group
from autoprune.compress.discovery import find_groups
from autoprune.compress.layers import weight_rows
from autoprune.compress.statistics import LayerStatistics, collect_statistics
from autoprune.errors import CompressionError, UsageError
from autoprune.space.groups import Group, Groups
from autoprune.space.recipe import CRITERIA
from tests.compress.networks import Mixed, Plain, Split

ROWS = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1.0, 1.0]])


def test_l1_and_l2() -> None:
    assert importance.l1_scores(ROWS).tolist() == [7.0, 0.0, 2.0]
    assert importance.l2_scores(ROWS).tolist() == pytest.approx([5.0, 0.0, 2**0.5])


def test_bn_scale() -> None:
    assert importance.bn_scale_scores(torch.tensor([-2.0, 0.5])).tolist() == [2.0, 0.5]


def test_activation_is_squared_norm_times_second_moment() -> None:
    assert importance.activation_scores(ROWS, torch.tensor([2.0, 9.0, 0.5])).tolist() == [50.0, 0.0, 1.0]
    with pytest.raises(CompressionError, match="3 channels and second moments of 2"):
        importance.activation_scores(ROWS, torch.ones(2))


def test_taylor_squares_each_batch_before_the_mean() -> None:
    products = torch.tensor([[1.0, 2.0], [-1.0, 4.0]])
    assert importance.taylor_scores(products).tolist() == [1.0, 10.0]
    with pytest.raises(CompressionError, match="batches, units"):
        importance.taylor_scores(torch.zeros(0, 3))


def test_fpgm_is_the_sum_of_distances() -> None:
    scores = importance.fpgm_scores(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]))
    assert scores.tolist() == pytest.approx([6.0, 5.0 + 18**0.5, 1.0 + 18**0.5])
    # The filter in the middle of the others can be replaced by them, whatever its norm.
    assert int(importance.fpgm_scores(torch.tensor([[1.0], [2.0], [3.0], [40.0]])).argmin()) in (1, 2)


def test_fisher_takes_the_weights_of_a_unit_one_by_one() -> None:
    squares = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert importance.fisher_scores(squares).tolist() == [1.0, 2.0]
    with pytest.raises(CompressionError, match="batches, units"):
        importance.fisher_scores(torch.zeros(0, 3))


def test_lamp_is_the_share_of_what_is_not_smaller() -> None:
    found = importance.lamp_scores(torch.tensor([2.0, 1.0, 3.0]))
    assert found.tolist() == pytest.approx([4 / 13, 1 / 14, 1.0])
    # Equal ones come by their index; nothing is not divided by nothing.
    assert importance.lamp_scores(torch.tensor([1.0, 1.0])).tolist() == [0.5, 1.0]
    assert importance.lamp_scores(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_random_depends_on_the_name_alone() -> None:
    first = importance.random_scores("layer1", 5)
    torch.manual_seed(7)
    assert torch.equal(first, importance.random_scores("layer1", 5))
    assert not torch.equal(first, importance.random_scores("layer2", 5))


def test_pooling_of_units() -> None:
    values = torch.tensor([3.0, 4.0, 1.0])
    index_map = ((0, 1), (2,), ())
    assert importance.pool_units(values, index_map).tolist() == [7.0, 1.0, 0.0]
    assert importance.pool_units(values, index_map, power=2.0).tolist() == pytest.approx([5.0, 1.0, 0.0])
    both = importance.pool_units(torch.stack([values, -values]), index_map)
    assert both.tolist() == [[7.0, 1.0, 0.0], [-7.0, -1.0, 0.0]]


def test_normalised_sum_weighs_layers_alike() -> None:
    total = importance.normalised_sum(
        [torch.tensor([1.0, 3.0]), torch.tensor([300.0, 100.0]), torch.zeros(2)]
    )
    assert total.tolist() == [2.0, 2.0]
    with pytest.raises(CompressionError, match="not finite"):
        importance.normalised_sum([torch.tensor([1.0, float("nan")])])


def test_weight_rows_of_linear_grouped_and_transposed_layers() -> None:
    linear = nn.Linear(3, 2)
    assert torch.equal(weight_rows(linear, "out"), linear.weight)
    assert torch.equal(weight_rows(linear, "in"), linear.weight.T)
    grouped = nn.Conv2d(4, 6, 1, groups=2)
    rows = weight_rows(grouped, "in")
    assert rows.shape == (4, 3)
    assert torch.equal(rows[3], grouped.weight[3:, 1].flatten()), (
        "channel 3 is the second of the second group"
    )
    transposed = nn.ConvTranspose2d(3, 5, 2)
    assert torch.equal(weight_rows(transposed, "out")[4], transposed.weight[:, 4].flatten())
    assert torch.equal(weight_rows(transposed, "in")[1], transposed.weight[1].flatten())


def prepared(model: nn.Module) -> tuple[Groups, LayerStatistics]:
    batches = [Split().training_batch(step, 16, 0) for step in range(3)]
    groups = find_groups(model.eval(), batches[0][0])
    return groups, collect_statistics(model, groups, batches, gradients=True)


def test_a_group_adds_up_its_layers() -> None:
    torch.manual_seed(0)
    model = Plain()
    groups, _ = prepared(model)
    made = model.conv2.weight.detach().flatten(1).double().norm(dim=1)
    read = model.fc1.weight.detach().double().reshape(10, 8, 16).permute(1, 0, 2).flatten(1).norm(dim=1)
    expected = made / made.mean() + read / read.mean()
    assert torch.allclose(score_group(model, groups.by_name["conv2"], "l2"), expected)


def test_activation_reads_the_consumers_inputs() -> None:
    torch.manual_seed(0)
    model = Plain()
    groups, statistics = prepared(model)
    inputs: list[Tensor] = []
    handle = model.conv2.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for step in range(3):
            model(Split().training_batch(step, 16, 0)[0])
    handle.remove()
    moment = torch.cat(inputs).square().mean((0, 2, 3)).double()
    energy = model.conv2.weight.detach().double().square().sum((0, 2, 3)) * moment
    scores = score_group(model, groups.by_name["conv1"], "activation", statistics)
    assert torch.allclose(scores, energy / energy.mean(), rtol=1e-5)


def test_taylor_is_gradient_times_weight() -> None:
    torch.manual_seed(0)
    model = Plain()
    groups, statistics = prepared(model)
    products, squares = [], []
    for step in range(3):
        inputs, targets = Split().training_batch(step, 16, 0)
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        assert model.conv1.weight.grad is not None
        products.append((model.conv1.weight.grad * model.conv1.weight.detach()).sum((1, 2, 3)).double())
        squares.append(
            (model.conv1.weight.grad * model.conv1.weight.detach()).square().sum((1, 2, 3)).double()
        )
    assert torch.allclose(statistics.products_of("conv1", "out"), torch.stack(products), rtol=1e-4, atol=1e-9)
    assert torch.allclose(statistics.squares_of("conv1", "out"), torch.stack(squares), rtol=1e-4, atol=1e-12)
    scores = score_group(model, groups.by_name["conv1"], "taylor", statistics)
    assert scores.shape == (8,) and bool((scores >= 0).all())


def test_bn_scale_falls_back_to_l2_without_batchnorm() -> None:
    torch.manual_seed(0)
    model = Plain(norm=False)
    groups, _ = prepared(model)
    group = groups.by_name["conv1"]
    assert torch.equal(score_group(model, group, "bn_scale"), score_group(model, group, "l2"))
    normed = Plain()
    with torch.no_grad():
        assert isinstance(normed.bn1, nn.BatchNorm2d)
        normed.bn1.weight.copy_(torch.arange(8.0))
    scores = score_group(normed, prepared(normed)[0].by_name["conv1"], "bn_scale")
    assert scores.tolist() == pytest.approx([i / 3.5 for i in range(8)])


def by_definition(model: Plain, criterion: str, statistics: LayerStatistics) -> list[Tensor]:
    """Return what each layer of group ``conv1`` says of its units, from the weights and their gradients themselves."""
    made = model.conv1.weight.detach().double().flatten(1)
    read = model.conv2.weight.detach().double().transpose(0, 1).flatten(1)
    sides = (made, read)
    if criterion == "l1":
        return [rows.abs().sum(1) for rows in sides]
    if criterion in ("l2", "lamp"):
        return [rows.norm(dim=1) for rows in sides]
    if criterion == "fpgm":
        return [(made[:, None] - made[None]).norm(dim=2).sum(1)]
    if criterion == "bn_scale":
        assert isinstance(model.bn1, nn.BatchNorm2d)
        return [model.bn1.weight.detach().double().abs()]
    if criterion == "activation":
        return [read.square().sum(1) * statistics.moment_of("conv2").double()]
    kind = {"taylor": _first_order, "fisher": _second_order}[criterion]
    found = [[kind(g * w) for g, w in batch] for batch in _gradients(model)]
    return [torch.stack(layer).mean(0) for layer in zip(*found, strict=True)]


def _first_order(products: Tensor) -> Tensor:
    return products.flatten(1).sum(1).square()


def _second_order(products: Tensor) -> Tensor:
    return 0.5 * products.flatten(1).square().sum(1)


def _gradients(model: Plain) -> list[list[tuple[Tensor, Tensor]]]:
    """Return gradient and weight of what makes and what reads the units of ``conv1``, for each batch."""
    batches = []
    for step in range(3):
        inputs, targets = Split().training_batch(step, 16, 0)
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        pairs = [(layer.weight.grad, layer.weight.detach()) for layer in (model.conv1, model.conv2)]
        made, read = [(g.double(), w.double()) for g, w in pairs if g is not None]
        batches.append([made, (read[0].transpose(0, 1), read[1].transpose(0, 1))])
    return batches


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_is_its_definition_on_a_group(criterion: str) -> None:
    torch.manual_seed(0)
    model = Plain()
    assert isinstance(model.bn1, nn.BatchNorm2d)
    nn.init.normal_(model.bn1.weight)
    groups, statistics = prepared(model)
    found = score_group(model, groups.by_name["conv1"], criterion, statistics)
    if criterion == "random":
        assert torch.equal(found, importance.random_scores("conv1", 8))
        return
    expected = torch.stack([s / s.mean() for s in by_definition(model, criterion, statistics)]).sum(0)
    if criterion == "lamp":
        squares = expected.square()
        expected = torch.stack([s / squares[squares >= s].sum() for s in squares])
    assert torch.allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_every_group(criterion: str) -> None:
    for model in (Plain(), Plain(norm=False), Mixed()):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
        groups, statistics = prepared(model)
        for group in groups.prunable:
            scores = score_group(model, group, criterion, statistics)
            assert scores.shape == (group.size,)
            assert bool(torch.isfinite(scores).all()) and bool((scores >= 0).all())
            assert len(set(scores.tolist())) > 1, f"{criterion} tells nothing apart in {group.name}"


def test_unknown_criterion_and_missing_statistics() -> None:
    model = Plain()
    groups, _ = prepared(model)
    group: Group = groups.by_name["conv1"]
    with pytest.raises(UsageError, match="did you mean 'taylor'"):
        score_group(model, group, "talyor")
    with pytest.raises(CompressionError, match="'activation' needs statistics"):
        score_group(model, group, "activation")
    with pytest.raises(CompressionError, match="no gradients of layer 'conv1'"):
        score_group(model, group, "taylor", LayerStatistics())
