"""Schedules of pruning: exact counts, plans in dense units, equal steps, and what each kind does on its way."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.compress.discovery import cuttable, find_groups
from autoprune.compress.finetune import TeacherStream, Trainer
from autoprune.compress.pipeline import Compressed, compress
from autoprune.compress.schedule import round_counts, round_steps
from autoprune.compress.sparse_training import cubic_share, shrinkage, train_gradually, train_sparse
from autoprune.compress.statistics import collect_statistics
from autoprune.compress.surgery import prune
from autoprune.compress.unit_scaling import READERS, scale_units, unit_norms
from autoprune.errors import UsageError
from autoprune.space.recipe import GroupChoice, Recipe, Recovery, uniform_recipe
from autoprune.space.schedule import Schedule
from autoprune.workloads.cifar_resnet import cifar_resnet
from tests.compress.networks import Mixed, OptionA, Plain, Split, half
from tests.compress.zeroing import zero_mask

BATCHES = [Split().training_batch(step, 32, 0) for step in range(4)]
CPU = torch.device("cpu")


def stream(model: nn.Module) -> TeacherStream:
    return TeacherStream(model, Split(), seed=0, batch_size=16)


def run(
    model: nn.Module,
    schedule: Mapping[str, Any],
    *,
    steps: int,
    criterion: str = "l2",
    ratio: float = 0.5,
    sparsity: float = 0.0,
    **options: Any,
) -> tuple[Compressed, Recipe]:
    groups = find_groups(model, BATCHES[0][0])
    model = cuttable(model, groups, BATCHES[0][0])
    recovery = Recovery(finetune_steps=steps)
    planned = Schedule.model_validate(schedule)
    recipe = uniform_recipe(groups, ratio, 8, criterion, 1, recovery, sparsity=sparsity, schedule=planned)
    result = compress(
        model,
        groups,
        recipe,
        statistics=collect_statistics(model, groups, BATCHES, gradients=True),
        calibration_batches=BATCHES,
        stream=stream(model),
        loss=nn.functional.cross_entropy,
        batch_size=16,
        device=CPU,
        **options,
    )
    return result, recipe


KINDS: list[dict[str, Any]] = [
    {"kind": "iterative", "rounds": 3},
    {"kind": "gradual", "rounds": 2},
    {"kind": "sparse"},
]


@pytest.mark.parametrize(
    ("network", "criterion"), [(Plain, "taylor"), (Plain, "activation"), (OptionA, "l2"), (Mixed, "l2")]
)
@pytest.mark.parametrize("schedule", KINDS, ids=lambda s: str(s["kind"]))
def test_counts_and_steps_are_exact_and_the_plan_rebuilds_the_network(
    network: type[nn.Module], schedule: dict[str, Any], criterion: str
) -> None:
    torch.manual_seed(0)
    model = network().eval()
    groups = find_groups(model, BATCHES[0][0])
    model = cuttable(model, groups, BATCHES[0][0])
    result, recipe = run(model, schedule, steps=7, criterion=criterion)
    assert {g.name: result.kept(g) for g in groups.groups} == recipe.kept_counts(groups)
    assert result.plan
    assert result.train_steps == 7
    # What an artifact keeps is the plan and the weights: they have to fit the dense network.
    rebuilt = prune(model, groups, result.plan)
    rebuilt.load_state_dict(result.model.state_dict())
    inputs = BATCHES[0][0]
    assert torch.equal(rebuilt.eval()(inputs), result.model(inputs))


def test_iterative_prunes_without_a_step_and_keeps_what_a_round_chose() -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    result, _ = run(model, {"kind": "iterative", "rounds": 2}, steps=0)
    assert result.train_steps == 0
    assert {name: len(units) for name, units in result.plan.items()} == {"conv1": 4, "conv2": 4, "fc1": 5}
    assert result.solved == ["conv2", "fc1", "fc2"]


def test_each_round_of_iterative_ranks_its_own_network(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = collect_statistics

    def noted(model: nn.Module, groups: Any, *rest: Any, **options: Any) -> Any:
        seen.append({g.name: g.size for g in groups.groups})
        return original(model, groups, *rest, **options)

    monkeypatch.setattr("autoprune.compress.schedule.collect_statistics", noted)
    run(Plain().eval(), {"kind": "iterative", "rounds": 3}, steps=3)
    assert [sizes["conv1"] for sizes in seen] == [6, 5]


@pytest.mark.parametrize(
    ("size", "kept", "rounds", "counts"),
    [(64, 8, 3, [32, 16, 8]), (8, 8, 2, [8, 8]), (16, 0, 4, [12, 8, 4, 0]), (2, 1, 3, [2, 1, 1])],
)
def test_rounds_remove_equal_shares_of_what_is_left(
    size: int, kept: int, rounds: int, counts: list[int]
) -> None:
    assert round_counts(size, kept, rounds) == counts


def test_steps_of_rounds_add_up() -> None:
    assert round_steps(7, 3) == [2, 2, 3]
    assert round_steps(1, 3) == [0, 0, 1]


def test_a_block_that_goes_is_taken_out_in_the_last_round() -> None:
    torch.manual_seed(0)
    model = cifar_resnet("cifar_resnet20").eval()
    groups = find_groups(model, BATCHES[0][0])
    group = next(g for g in groups.groups if g.block == "layer2.1")
    recipe = Recipe(
        groups={group.name: GroupChoice(ratio=1.0)},
        recovery=Recovery(finetune_steps=2),
        schedule=Schedule(kind="iterative", rounds=2),
    )
    result = compress(
        model,
        groups,
        recipe,
        statistics=collect_statistics(model, groups, BATCHES),
        calibration_batches=BATCHES,
        stream=stream(model),
        loss=nn.functional.cross_entropy,
        batch_size=16,
        device=CPU,
    )
    assert result.plan == {group.name: ()}
    assert not [name for name, _ in result.model.named_modules() if name.startswith(f"{group.block}.")]


@pytest.mark.parametrize("kind", ["gradual", "sparse"])
def test_a_deadline_ends_the_training_but_not_the_cut(kind: str) -> None:
    model = Plain().eval()
    groups = find_groups(model, BATCHES[0][0])
    result, recipe = run(model, {"kind": kind}, steps=6, deadline=lambda: True)
    assert result.train_steps == 0
    assert {g.name: result.kept(g) for g in groups.groups} == recipe.kept_counts(groups)


@pytest.mark.parametrize("kind", ["gradual", "sparse"])
def test_what_prunes_by_training_needs_steps(kind: str) -> None:
    with pytest.raises(UsageError, match=rf"'{kind}'.*finetune_steps is 0.*at least 1 step"):
        run(Plain().eval(), {"kind": kind}, steps=0)


def test_gradual_zeroes_by_the_cubic_schedule_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Plain(16).eval()
    groups = find_groups(model, BATCHES[0][0])
    trainer = Trainer(
        model, stream(model), Recovery(finetune_steps=8), loss=nn.functional.cross_entropy, device=CPU
    )
    recipe = uniform_recipe(groups, 0.5, 8).model_copy(
        update={"schedule": Schedule(kind="gradual", rounds=3)}
    )
    zeroed, at = [], []

    def noted(network: nn.Module, group: Any, factors: Tensor, axes: Any) -> None:
        if group.name == "conv1":
            zeroed.append(int((factors == 0).sum()))
            at.append(trainer.steps)
        scale_units(network, group, factors, axes)

    monkeypatch.setattr("autoprune.compress.sparse_training.scale_units", noted)
    counts = {g.name: g.size for g in groups.groups} | {"conv1": 4}
    train_gradually(trainer, groups, recipe, counts, 8, lambda _: None)
    assert zeroed == [round(12 * (1 - (1 - i / 3) ** 3)) for i in (1, 2, 3)] == [8, 12, 12]
    assert at == [2, 4, 6]
    assert trainer.steps == 8
    assert cubic_share(0.0) == 0.0 and cubic_share(1.0) == 1.0


@pytest.mark.parametrize("network", [Plain, OptionA, Mixed])
def test_zeroing_what_reads_a_unit_does_what_cutting_it_does(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = network().eval()
    groups = find_groups(model, BATCHES[0][0])
    model = cuttable(model, groups, BATCHES[0][0])
    plan = half(groups)
    copy = deepcopy(model)
    for name, units in plan.items():
        alive = torch.zeros(groups.by_name[name].size)
        alive[list(units)] = 1.0
        scale_units(copy, groups.by_name[name], alive, READERS)
    inputs = BATCHES[0][0]
    assert torch.allclose(copy(inputs), zero_mask(model, groups, plan)(inputs), atol=1e-6)
    assert torch.allclose(copy(inputs), prune(model, groups, plan)(inputs), atol=1e-5)


def test_norms_run_over_every_coupled_weight_and_scale_with_them() -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    groups = find_groups(model, BATCHES[0][0])
    group = groups.by_name["conv1"]
    norms = unit_norms(model, group)
    scales = model.get_parameter("bn1.weight")
    with torch.no_grad():
        expected = (
            model.conv1.weight.flatten(1).square().sum(1)
            + scales.square()
            + model.conv2.weight.transpose(0, 1).flatten(1).square().sum(1)
        ).sqrt()
    assert torch.allclose(norms, expected)
    factors = torch.linspace(0, 1, group.size)
    scale_units(model, group, factors)
    assert torch.allclose(unit_norms(model, group), norms * factors)


def test_the_penalty_takes_most_from_the_weakest_unit() -> None:
    factors = shrinkage(torch.tensor([1.0, 2.0, 3.0]), 0.03)
    assert torch.allclose(factors, torch.tensor([1 - 0.03 * 16, 1 - 0.03 * 4 / 2, 1 - 0.03 / 3]))
    assert shrinkage(torch.tensor([0.1, 3.0]), 0.03)[0] == 0.0


def test_sparse_training_separates_units_and_touches_no_other_group() -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    groups = find_groups(model, BATCHES[0][0])
    group = groups.by_name["conv1"]

    def norms_after(strength: float, rate: float = 1e-9) -> tuple[Tensor, Tensor]:
        trainer = Trainer(
            model,
            stream(model),
            Recovery(finetune_steps=10, learning_rate=rate),
            loss=nn.functional.cross_entropy,
            device=CPU,
        )
        train_sparse(trainer, [group], 10, strength)
        assert trainer.steps == 10
        return unit_norms(trainer.model, group), unit_norms(trainer.model, groups.by_name["fc1"])

    before, other = unit_norms(model, group), unit_norms(model, groups.by_name["fc1"])
    after, other_after = norms_after(0.2)
    strongest, weakest = int(before.argmax()), int(before.argmin())
    # Without a gradient to speak of, the strongest unit loses the strength itself, in the mean norm.
    assert float((before - after)[strongest] / before.mean()) == pytest.approx(0.2, abs=1e-3)
    assert float(after[weakest]) == 0.0
    assert torch.allclose(other, other_after, atol=1e-3)


@pytest.mark.parametrize("schedule", KINDS, ids=lambda s: str(s["kind"]))
def test_a_schedule_of_channels_takes_no_steps_from_what_cuts_none(schedule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    result, _ = run(model, schedule, steps=7, ratio=0.0, sparsity=0.5)
    assert result.train_steps == 7
    weight = result.model.get_submodule("conv2").weight
    assert isinstance(weight, torch.Tensor)
    assert int((weight == 0).sum()) == weight.numel() // 2
