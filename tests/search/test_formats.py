"""Bits in trials: files, screens, saved networks, the profile, and a whole search that chooses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import autoprune
from autoprune import api
from autoprune.compress.pipeline import Compressed
from autoprune.config import make_config
from autoprune.search.bench import Bench, discover
from autoprune.search.formats import stored_weights
from autoprune.search.profile import Profile
from autoprune.space.quantization import Quantization
from autoprune.space.recipe import Recipe, Recovery, uniform_recipe
from autoprune.workloads.workload import workload_from_objects
from tests.search.test_end_to_end import digits, trained


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    config = make_config({"model": "Sequential", "data": "given", "study": "own", "calibration_examples": 64})
    workload = workload_from_objects(trained(), digits(), config=config)
    patch = pytest.MonkeyPatch()
    patch.setenv("AUTOPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    made = Bench.build(config, *discover(workload), gradients=False)
    patch.undo()
    return made


def at(bench: Bench, bits: int, steps: int = 0, ratio: float = 0.0, **how: object) -> Recipe:
    made = uniform_recipe(bench.groups, ratio, 32, recovery=Recovery(finetune_steps=steps))
    groups = {name: c.model_copy(update={"bits": bits}) for name, c in made.groups.items()}
    return made.model_copy(update={"groups": groups, "quantization": Quantization.model_validate(how)})


def inputs_of(bench: Bench) -> list[torch.Tensor]:
    return [inputs for inputs, _ in bench.calibration]


def test_what_the_runtime_does_by_itself_is_left_to_it(bench: Bench) -> None:
    model = bench.workload.model
    same, weights = stored_weights(model, at(bench, 8), bench.groups, inputs_of(bench))
    assert same is model
    assert weights == {}
    other, weights = stored_weights(model, at(bench, 8, rounding="gptq"), bench.groups, inputs_of(bench))
    assert other is not model
    assert {w.bits for w in weights.values()} == {8}
    _, weights = stored_weights(model, at(bench, 16), bench.groups, inputs_of(bench))
    assert [(w.bits, w.codes) for w in weights.values()] == [(16, None)] * 3


def test_fewer_bits_make_smaller_files_that_run_in_int8(bench: Bench, tmp_path: Path) -> None:
    sizes = {}
    for bits in (8, 4, 2):
        folder = tmp_path / str(bits)
        folder.mkdir()
        artifact = bench.deploy(
            Compressed(bench.workload.model), at(bench, bits, rounding="gptq", scale="mse"), folder
        )
        assert artifact.executed.int8_layers == artifact.executed.layers == 3
        sizes[bits] = (folder / "model.onnx").stat().st_size
    assert sizes[2] < sizes[4] < sizes[8]


def test_a_screen_sees_the_bits(bench: Bench) -> None:
    dense = bench.screened(Recipe(), None).value
    eight, two = (bench.screened(at(bench, bits), None).value for bits in (8, 2))
    assert abs(dense - eight) < 0.05
    assert two < eight


def test_trained_integers_are_saved_and_deployed_as_they_are(bench: Bench, tmp_path: Path) -> None:
    recipe = at(bench, 3, steps=4, ratio=0.5, aware=0.5)
    made = bench.compressed(recipe)
    bench.save(made, recipe, tmp_path)
    again = bench.load(tmp_path)
    own, weights = stored_weights(again.model, recipe, bench.groups, inputs_of(bench))
    assert len(weights) == 3
    for name, module in again.model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            torch.testing.assert_close(own.get_submodule(name).get_parameter("weight"), module.weight)


def test_networks_that_train_integers_differ_by_their_bits(bench: Bench) -> None:
    made = [bench.compressed(at(bench, bits, steps=2, aware=1.0)) for bits in (3, 4)]
    assert not torch.equal(made[0].model.state_dict()["0.weight"], made[1].model.state_dict()["0.weight"])
    plain = [bench.compressed(at(bench, bits, steps=2, ratio=0.5)) for bits in (3, 4)]
    assert plain[0] is plain[1]


def test_unknown_widths_are_told_from_the_nearest_known() -> None:
    profile = Profile(dense_loss=0.0, examples=1, int8={"a": 0.01}, fewer_bits={"a": {4: 0.5}})
    assert profile.rounding("a", 4) == 0.5
    assert profile.rounding("a", 3) == 2.0
    assert profile.rounding("a", 6) == pytest.approx(0.5 / 16)
    assert profile.rounding("a", 32) == profile.rounding("b", 4) == 0.0


SPACE = """
ratios: [0.0, 0.5]
bits: [2, 4, 8, 32]
quantization: {scale: mse, rounding: gptq, aware: 0.5}
recovery: {finetune_steps: 4}
rungs: [{steps: 0}, {steps: 2}, {steps: 4}]
baselines: {ratios: [0.5]}
"""


@pytest.mark.slow
def test_the_default_search_chooses_bits(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE, encoding="utf-8")
    study = autoprune.search(
        trained(),
        digits(),
        budget="6trials",
        study="bits",
        space=str(tmp_path / "space.yaml"),
        front_points=3,
    )
    assert isinstance(study, api.Study)
    records = study.records()
    assert not [r for r in records if r.state == "failed"]
    labels = [r.label for r in records if r.origin == "baseline" and r.fidelity == "search"]
    assert labels[:3] == ["int8", "int4", "int2"]
    proposed = [r.recipe for r in records if r.origin not in ("dense", "baseline") and r.recipe]
    widths = {c.bits for recipe in proposed for c in recipe.groups.values()}
    assert widths & {2, 4}
    sizes = {r.label: r.measurement.size_bytes for r in records if r.measurement and r.fidelity == "search"}
    assert sizes["int2"] < sizes["int4"] < sizes["int8"] < sizes["dense"]
    finals = [r for r in records if r.fidelity == "final" and r.measurement]
    assert all(
        sum(r.measurement.executed.stored_layers.values()) > 0
        for r in finals
        if r.label == "int4" and r.measurement
    )
    assert len(study.front()) >= 2
