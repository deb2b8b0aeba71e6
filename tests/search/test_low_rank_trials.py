"""Trials with low-rank layers, features and orders: saved, read back, deployed, and searched by a plain sampler."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from autoprune import api
from autoprune.compress.lowrank import LowRank
from autoprune.config import make_config
from autoprune.errors import CompressionError, UsageError
from autoprune.search import bench as module
from autoprune.search.bench import RECIPE_FILE, Bench, check_features, discover
from autoprune.search.lineage import find_parent
from autoprune.space.recipe import Recipe, Recovery, uniform_recipe
from autoprune.study.records import TrialRecord
from autoprune.study.store import StudyStore
from autoprune.workloads.workload import workload_from_objects


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3),
    ).eval()  # fmt: skip


def examples() -> tuple[TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(400, 1, 12, 12, generator=generator)
    labels = (images.mean((1, 2, 3)) * 12).clamp(-1, 1).round().long() + 1
    return TensorDataset(images[:300], labels[:300]), TensorDataset(images[300:], labels[300:])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    config = make_config({"model": "Sequential", "data": "given", "study": "own", "calibration_examples": 64})
    workload = workload_from_objects(network(), examples(), config=config)
    patch = pytest.MonkeyPatch()
    patch.setenv("AUTOPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    made = Bench.build(config, *discover(workload), gradients=False)
    patch.undo()
    return made


def low(bench: Bench, **recovery: float) -> Recipe:
    return uniform_recipe(
        bench.groups,
        0.25,
        8,
        recovery=Recovery.model_validate({"finetune_steps": 1, **recovery}),
        rank_ratio=0.6,
    )


def test_a_low_rank_network_is_saved_read_back_and_no_parent(bench: Bench, tmp_path: Path) -> None:
    recipe = low(bench)
    made = bench.compressed(recipe)
    assert set(made.factorised.ranks) == {"0", "3", "6"} - set(made.factorised.left_whole)
    assert {"3", "6"} <= set(made.factorised.ranks)
    assert made.train_steps == 1
    bench.save(made, recipe, tmp_path)
    again = bench.load(tmp_path)
    x = bench.calibration[0][0]
    assert isinstance(again.model.get_submodule("3"), LowRank)
    torch.testing.assert_close(again.model(x), made.model(x), rtol=0, atol=0)
    assert (again.plan, again.factorised) == (made.plan, made.factorised)
    with pytest.raises(CompressionError, match="low-rank layers, which cannot be cut further"):
        bench.ancestor(tmp_path)
    # What an earlier version wrote names no ranks.
    plain = bench.compressed(uniform_recipe(bench.groups, 0.25, 8, recovery=Recovery(finetune_steps=0)))
    bench.save(plain, recipe, tmp_path)
    content = json.loads((tmp_path / RECIPE_FILE).read_text())
    del content["ranks"], content["left_whole"]
    (tmp_path / RECIPE_FILE).write_text(json.dumps(content))
    torch.testing.assert_close(bench.load(tmp_path).model(x), plain.model(x), rtol=0, atol=0)


def test_both_layers_get_the_group_s_bits(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = low(bench)
    made = bench.compressed(recipe)
    artifact = bench.deploy(made, recipe, tmp_path)
    layers = 4 + len(made.factorised.ranks)
    assert (artifact.executed.layers, artifact.executed.asked_int8) == (layers, layers)
    assert artifact.executed.int8_layers == layers
    asked: list[list[str]] = []
    original = module.__dict__["rounded"]

    def noted(model: nn.Module, names: list[str], bits: dict[str, int], own: int) -> nn.Module:
        asked.append(names)
        rounded: nn.Module = original(model, names, bits, own)
        return rounded

    monkeypatch.setattr(module, "rounded", noted)
    bench.screened(recipe, 50)
    assert {"3.0", "3.1", "6.0", "6.1", "11"} <= set(asked[0])


def test_a_low_rank_network_is_found_as_no_parent(bench: Bench) -> None:
    def record(recipe: Recipe) -> TrialRecord:
        return TrialRecord(number=1, state="complete", recipe=recipe, train_steps=40)

    def kept(record: TrialRecord) -> dict[str, int]:
        assert record.recipe is not None
        return record.recipe.kept_counts(bench.groups)

    counts = uniform_recipe(bench.groups, 0.5, 8).kept_counts(bench.groups)
    plain = record(uniform_recipe(bench.groups, 0.25, 8))
    assert find_parent(counts, [plain], kept, lambda _: True) is plain
    assert find_parent(counts, [record(low(bench))], kept, lambda _: True) is None


def test_features_that_cannot_be_compared_are_refused_before_anything_is_trained(bench: Bench) -> None:
    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss: Tensor = model(batch[0]).sum()
        return loss

    own = replace(bench.workload, training_step=step)
    check_features(False, own)
    with pytest.raises(UsageError, match="training_step of your own"):
        check_features(True, own)
    flat = replace(bench.workload, model=nn.Sequential(nn.Flatten(), nn.Linear(144, 3)))
    with pytest.raises(UsageError, match="the network has none"):
        check_features(True, flat)
    check_features(True, bench.workload)


SPACE = """
width: 4
ratios: [0.0, 0.25]
bits: [8]
sparsities: [0.0, 0.5]
rank_ratios: [0.0, 0.6]
orders: [prune-tune-quantize, tune-prune-quantize]
recovery: {finetune_steps: 2, feature_distill: [0.0, 2.0]}
baselines: {ratios: []}
"""


@pytest.mark.slow
def test_a_plain_sampler_searches_ranks_features_and_orders(tmp_path: Path) -> None:
    space = tmp_path / "low.yaml"
    space.write_text(SPACE, encoding="utf-8")
    study = api.search(
        network(),
        examples(),
        "10trials",
        space=str(space),
        sampler="random",
        study="low",
        calibration_examples=64,
    )
    records = study.records()
    assert {r.state for r in records} == {"complete"}, [(r.failure_kind, r.failure_reason) for r in records]
    recipes = [r.recipe for r in records if r.recipe is not None]
    assert any(r.factorises for r in recipes)
    assert {r.order for r in recipes} == {"prune-tune-quantize", "tune-prune-quantize"}
    finals = [r for r in records if r.fidelity == "final" and r.recipe is not None and r.recipe.factorises]
    assert finals
    # Also of what is masked and of low rank at once.
    notes = StudyStore.open("low").notes()
    assert not [key for key in notes if key.startswith("final_failure")]
    for record in finals:
        assert record.measurement is not None
        assert (study.path / "artifacts").is_dir()
        if record.recipe is not None and record.recipe.order == "tune-prune-quantize":
            assert record.train_steps == 2
    parameters = {r.recipe.factorises: r.measurement.params for r in records if r.recipe and r.measurement}
    assert parameters[True] < parameters[False]
    folders = [path for path in (study.path / "artifacts").glob("trial-*") if (path / "model.onnx").is_file()]
    assert any(json.loads((path / RECIPE_FILE).read_text())["ranks"] for path in folders)


def test_the_default_search_refuses_them_before_it_begins(tmp_path: Path) -> None:
    space = tmp_path / "low.yaml"
    space.write_text(SPACE, encoding="utf-8")
    with pytest.raises(UsageError, match=r"(?s)rank_ratios = \[0.0, 0.6\].*orders = .*feature_distill = "):
        api.search(network(), examples(), "3trials", space=str(space), study="low")
    with pytest.raises(UsageError, match="'low'"):
        api.open_study("low")
