"""Masks in a network: exact numbers of zeros, criteria on real layers, and zeros that stay through training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoprune.compress import masks
from autoprune.compress.discovery import find_groups
from autoprune.compress.finetune import TeacherStream, Trainer, finetune
from autoprune.compress.mask_statistics import input_moments, score_weights, weight_of
from autoprune.compress.masking import apply_masks, hold_zeros, make_masks, masked_layers
from autoprune.compress.pipeline import Compressed, compress
from autoprune.compress.statistics import collect_statistics
from autoprune.errors import CompressionError
from autoprune.space.groups import Groups
from autoprune.space.mask import Mask
from autoprune.space.recipe import GroupChoice, Recipe, Recovery
from tests.compress.networks import Mixed, Plain, Split

BATCHES = [Split().training_batch(step, 16, 0) for step in range(3)]
LAYERS = ("conv1", "conv2", "fc1", "fc2")
LOSS = nn.functional.cross_entropy


def seeded(seed: int = 0) -> Plain:
    torch.manual_seed(seed)
    return Plain().eval()


@pytest.fixture(scope="module")
def groups() -> Groups:
    return find_groups(seeded(), BATCHES[0][0])


def run(recipe: Recipe, groups: Groups, model: nn.Module | None = None) -> Compressed:
    model = model or seeded()
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


def sparse(groups: Groups, sparsity: float, mask: Mask, ratio: float = 0.0, **recovery: object) -> Recipe:
    choices = {
        g.name: GroupChoice(ratio=ratio if g.prunable else 0.0, sparsity=sparsity) for g in groups.groups
    }
    settings = {"finetune_steps": 4, **recovery}
    return Recipe(groups=choices, width=4, mask=mask, recovery=Recovery.model_validate(settings))


def zeros(model: nn.Module) -> dict[str, tuple[int, int]]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            found[name] = (int((module.weight == 0).sum()), module.weight.numel())
    return found


CASES = [
    Mask(allocation=allocation, criterion=criterion)  # type: ignore[arg-type]
    for allocation, criterion in [
        ("layer", "magnitude"),
        ("layer", "activation"),
        ("layer", "taylor"),
        ("layer", "fisher"),
        ("layer", "movement"),
        ("layer", "random"),
        ("global", "magnitude"),
        ("erk", "activation"),
        ("lamp", "magnitude"),
        ("erk", "movement"),
    ]
]


@pytest.mark.parametrize("mask", CASES, ids=lambda mask: f"{mask.allocation}-{mask.criterion}")
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_the_number_of_zeros_is_exact_after_training(mask: Mask, ratio: float, groups: Groups) -> None:
    result = run(sparse(groups, 0.7, mask, ratio), groups)
    found = zeros(result.model)
    wanted = {name: masks.zero_count(0.7, size) for name, (_, size) in found.items()}
    if mask.allocation == "layer":
        assert {name: count for name, (count, _) in found.items()} == wanted
    assert sum(count for count, _ in found.values()) == sum(wanted.values())
    assert all(count < size for count, size in found.values())
    assert result.train_steps == 4
    moved = {n: t for n, t in result.model.state_dict().items() if n.endswith("weight")}
    assert ratio > 0 or any(not torch.equal(t, seeded().state_dict()[n]) for n, t in moved.items())


def test_the_same_weights_stay_zero_through_every_step(groups: Groups) -> None:
    model = seeded()
    with torch.no_grad():
        for name in LAYERS:
            weight = weight_of(model, name)
            weight.zero_()
            weight.view(-1)[::3] = 0.5
    seen: list[bool] = []

    def watch(trainer: Trainer) -> None:
        hold_zeros(LAYERS)(trainer)

        def look(network: nn.Module) -> None:
            for name in LAYERS:
                flat = weight_of(network, name).detach().flatten()
                free = torch.arange(len(flat)) % 3 == 0
                seen.append(bool((flat[~free] == 0).all()) and bool((flat[free] != 0.5).any()))

        trainer.observe(after=look)

    stream = TeacherStream(seeded(), Split(), seed=0, batch_size=16)
    recovery = Recovery(finetune_steps=3)
    finetune(model, stream, recovery, loss=LOSS, device=torch.device("cpu"), watch=watch)
    assert seen == [True] * 12


def test_a_group_without_sparsity_keeps_its_weights(groups: Groups) -> None:
    recipe = Recipe(
        groups={"conv2": GroupChoice(sparsity=0.5)},
        mask=Mask(allocation="erk"),
        recovery=Recovery(finetune_steps=0),
    )
    result = run(recipe, groups)
    assert {name: count for name, (count, _) in zeros(result.model).items()} == {
        "conv1": 0,
        "conv2": 288,
        "fc1": 0,
        "fc2": 0,
    }
    kept = weight_of(result.model, "conv2")
    dense = seeded().conv2.weight.detach()
    assert torch.equal(kept != 0, dense.abs() > dense.abs().flatten().sort().values[287])
    assert torch.equal(kept.detach()[kept != 0], dense[kept != 0])


def test_masks_refresh_batchnorm_and_leave_the_dense_network_alone(groups: Groups) -> None:
    model = seeded()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = run(sparse(groups, 0.5, Mask(), finetune_steps=0), groups, model)
    assert not torch.equal(result.model.state_dict()["bn2.running_mean"], before["bn2.running_mean"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_pattern_holds_in_every_block_after_training(groups: Groups) -> None:
    result = run(sparse(groups, 0.5, Mask(pattern="2:4", criterion="activation")), groups)
    for name in LAYERS:
        weight = weight_of(result.model, name)
        along = (weight.detach() != 0).movedim(1, -1)
        for block in torch.split(along, 4, dim=-1):
            assert bool((block.sum(-1) == min(2, block.shape[-1])).all())


def test_moments_and_activation_scores_of_every_kind_of_layer() -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    layers = ("left", "depthwise", "grouped", "twice", "head")
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, a, name=name: inputs[name].append(a[0]))
        for name in layers
    ]
    with torch.no_grad():
        for batch, _ in BATCHES:
            model(batch)
    for handle in handles:
        handle.remove()
    moments = input_moments(model, [*layers, "unused"], BATCHES)
    assert set(moments) == set(layers)
    for name in layers:
        seen = torch.cat(inputs[name]).double()
        dims = [d for d in range(seen.dim()) if d != 1]
        torch.testing.assert_close(moments[name], seen.square().mean(dims))
    scores = score_weights(model, [*layers, "unused"], "activation", BATCHES, LOSS)
    weight = model.grouped.weight.detach().double()
    # 12 inputs in 4 groups: outputs 4 to 7 read inputs 3 to 5.
    expected = weight[4:8].abs() * moments["grouped"][3:6].sqrt()[None, :, None, None]
    torch.testing.assert_close(scores["grouped"][4:8], expected)
    depthwise = model.depthwise.weight.detach().double().abs()
    torch.testing.assert_close(
        scores["depthwise"], depthwise * moments["depthwise"].sqrt()[:, None, None, None]
    )
    torch.testing.assert_close(scores["unused"], model.unused.weight.detach().double().abs())


def test_gradient_scores_are_the_gradients_of_the_batches() -> None:
    model = seeded()
    products = []
    for inputs, targets in BATCHES:
        model.zero_grad()
        LOSS(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        assert model.fc2.weight.grad is not None
        products.append((model.fc2.weight.grad * model.fc2.weight.detach()).double())
    model.zero_grad()
    stacked = torch.stack(products)
    taylor = score_weights(model, ["fc2"], "taylor", BATCHES, LOSS)["fc2"]
    fisher = score_weights(model, ["fc2"], "fisher", BATCHES, LOSS)["fc2"]
    torch.testing.assert_close(taylor, stacked.mean(0).abs())
    torch.testing.assert_close(fisher, 0.5 * stacked.square().mean(0))
    assert model.fc2.weight.grad is None


def test_one_weight_of_a_layer_stays_however_small_all_of_them_are(groups: Groups) -> None:
    model = seeded()
    with torch.no_grad():
        model.fc2.weight.mul_(1e-6)
    made = run(sparse(groups, 0.7, Mask(allocation="global"), finetune_steps=0), groups, model).model
    assert int((weight_of(made, "fc2") != 0).sum()) == 1


def test_a_weight_that_is_computed_is_refused_and_a_shared_one_masked_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(CompressionError, match="layer '0' cannot be masked"):
        score_weights(model, ["0"], "magnitude", [], LOSS)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    scores = score_weights(tied, ["0", "1"], "magnitude", [], LOSS)
    made = make_masks(tied, {"0": 0.25, "1": 0.75}, Mask(), scores)
    apply_masks(tied, made)
    assert list(made) == ["0"]
    assert int((weight_of(tied, "1") == 0).sum()) == 4


def test_layers_of_blocks_that_are_gone_are_not_masked(groups: Groups) -> None:
    recipe = sparse(groups, 0.5, Mask())
    assert list(masked_layers(recipe, groups)) == list(LAYERS)
    assert masked_layers(Recipe(groups={"conv1": GroupChoice(sparsity=0.3)}), groups) == {"conv1": 0.3}
