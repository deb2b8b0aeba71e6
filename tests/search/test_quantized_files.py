"""Blocks, 16 bits, dynamic ranges and equalisation from the recipe to the file that a runtime executes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.compress.aware import IntegerTraining
from autoprune.compress.discovery import cuttable, find_groups
from autoprune.compress.formats import int8_layers
from autoprune.compress.rounding import rounded
from autoprune.deploy import onnx_file
from autoprune.deploy.onnxruntime import OnnxRuntime
from autoprune.deploy.runtime import Artifact, StoredWeight
from autoprune.deploy.saturation import int8_bits
from autoprune.errors import UsageError
from autoprune.search.formats import formats_of, stored_weights
from autoprune.space.groups import Group, Groups, Member
from autoprune.space.quantization import ActivationBits, Bits, Half, Quantization
from autoprune.space.recipe import Recipe, uniform_recipe
from autoprune.target import Target
from autoprune.workloads.cifar_resnet import cifar_resnet
from tests.compress.test_equalisation import Mobile, uneven

IMAGES = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = [IMAGES[:16], IMAGES[16:]]


@pytest.fixture(scope="module")
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs are exported once for all tests of the file."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def shared_graphs(own_folders: None, one_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every test use it."""
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(one_cache))


class Small(nn.Module):
    """Two convolutions, the second of which divides into blocks, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.two = nn.Conv2d(32, 32, 3, stride=2)
        self.hidden, self.head = nn.Linear(32, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.two(F.relu(self.norm(self.one(x))))).mean((2, 3))
        y: Tensor = self.head(F.relu(self.hidden(x)))
        return y


class Encoder(nn.Module):
    """One block of a transformer over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y: Tensor = self.head(self.norm(self.block(x)).mean(1))
        return y


def weighted_groups(model: nn.Module) -> Groups:
    """Return a group for each layer, none of which can be pruned."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    groups = []
    for name, module in layers.items():
        kind = "linear" if isinstance(module, nn.Linear) else "conv"
        own = Member.model_validate({"layer": name, "kind": kind, "axis": "out", "index_map": ((0,),)})
        groups.append(
            Group.model_validate(
                {
                    "name": name,
                    "type": kind,
                    "size": 1,
                    "members": (own,),
                    "prunable": False,
                    "reason": "a test",
                }
            )
        )
    return Groups(groups=tuple(groups), input_shape=(3, 16, 16))


def deployed(
    model: nn.Module, groups: Groups, recipe: Recipe, path: Path, batches: Sequence[Tensor] = BATCHES
) -> tuple[Artifact, nn.Module, Tensor]:
    """Return the artifact, the network that it was made of, and the outputs of the file."""
    recipe.check(groups)
    runtime = OnnxRuntime(Target())
    runtime.prepare(model, batches[0][:2])
    made, weights = stored_weights(model, recipe, groups, batches, int8_bits=int8_bits(Target()))
    artifact = runtime.build(made, path, formats_of(made, recipe, groups, weights), batches)
    return artifact, made, runtime.predict(artifact.path, batches)


def recipe_of(groups: Groups, bits: Bits, activation_bits: ActivationBits = 8, **how: object) -> Recipe:
    made = Quantization.model_validate(how)
    return uniform_recipe(groups, 0.0, bits, activation_bits=activation_bits, quantization=made)


def off(got: Tensor, model: nn.Module, batches: Sequence[Tensor] = BATCHES) -> float:
    with torch.no_grad():
        wanted = torch.cat([model(batch) for batch in batches])
    return float((got - wanted).abs().max() / wanted.abs().max())


def small() -> tuple[nn.Module, Groups]:
    model = uneven(Small)
    return model, weighted_groups(model)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_blocks_are_stored_with_their_scales_and_run_in_float(bits: Bits, tmp_path: Path) -> None:
    model, groups = small()
    recipe = recipe_of(groups, bits, 32, block_size=32, scale="mse")
    _, weights = stored_weights(model, recipe, groups, BATCHES)
    assert {name: w.blocks for name, w in weights.items()} == {"one": 1, "two": 9, "hidden": 1, "head": 2}
    assert weights["hidden"].scales is None
    artifact, made, outputs = deployed(model, groups, recipe, tmp_path / "m.onnx")
    assert off(outputs, made) < 1e-4
    assert artifact.executed.stored_layers == {str(bits): 4}
    assert artifact.executed.int8_layers == 0
    assert artifact.executed.not_as_asked == ()
    whole, _ = stored_weights(model, recipe_of(groups, bits, 32, scale="mse"), groups, BATCHES)
    errors = [
        float((each.get_parameter("two.weight") - model.get_parameter("two.weight")).detach().norm())
        for each in (made, whole)
    ]
    assert errors[0] < errors[1]


def test_blocks_with_inputs_of_8_bits_are_refused_by_the_group_s_name() -> None:
    _, groups = small()
    recipe = recipe_of(groups, 4, 8, block_size=32)
    with pytest.raises(UsageError, match="group 'one' has blocks of 32 weights .* inputs of 8 bits") as error:
        recipe.check(groups)
    assert "activation bits 16, 32" in str(error.value)
    recipe_of(groups, 4, 16, block_size=32).check(groups)
    recipe_of(groups, 32, 8, block_size=32).check(groups)


@pytest.mark.parametrize(("half", "least", "most"), [("float16", 0.0, 1e-3), ("bfloat16", 1e-3, 5e-2)])
def test_16_bits_are_the_half_that_was_asked_for(
    half: Half, least: float, most: float, tmp_path: Path
) -> None:
    model, groups = small()
    artifact, made, outputs = deployed(model, groups, recipe_of(groups, 16, half=half), tmp_path / "m.onnx")
    assert made is model
    assert artifact.executed.stored_layers == {"16": 4}
    assert least < off(outputs, model) < most


def test_inputs_of_16_bits_change_next_to_nothing(tmp_path: Path) -> None:
    model, groups = small()
    artifact, made, outputs = deployed(model, groups, recipe_of(groups, 6, 16), tmp_path / "m.onnx")
    assert artifact.executed.asked == {"int16": 4}
    eight, own, in_int8 = deployed(model, groups, recipe_of(groups, 6, 8), tmp_path / "8.onnx")
    assert eight.executed.ran == {"int8": 4}
    assert off(outputs, made) < 1e-3 < off(in_int8, own)


def test_dynamic_ranges_are_for_linear_layers(tmp_path: Path) -> None:
    model, groups = small()
    recipe = recipe_of(groups, 8, activations="dynamic")
    made, weights = stored_weights(model, recipe, groups, BATCHES)
    # What the runtime's quantizer makes by itself is left to it, what it does not know is not.
    assert set(weights) == {"hidden", "head"}
    formats = formats_of(made, recipe, groups, weights)
    assert (list(formats.int8), list(formats.dynamic)) == (["one", "two"], ["hidden", "head"])
    artifact, _, _ = deployed(model, groups, recipe, tmp_path / "m.onnx")
    assert artifact.executed.ran == {"int8": 2, "dynamic int8": 2}
    assert artifact.executed.not_as_asked == ()
    # At 4 bits too, and not where inputs stay in float.
    artifact, _, _ = deployed(model, groups, recipe_of(groups, 4, activations="dynamic"), tmp_path / "4.onnx")
    assert artifact.executed.ran == {"int8": 2, "dynamic int8": 2}
    in_float = recipe_of(groups, 4, 32, activations="dynamic")
    assert formats_of(model, in_float, groups, weights).dynamic == []


def test_fp8_is_for_linear_layers_of_8_bits() -> None:
    model, groups = small()
    recipe = recipe_of(groups, 8, activations="fp8")
    made, weights = stored_weights(model, recipe, groups, BATCHES)
    formats = formats_of(made, recipe, groups, weights)
    assert (list(formats.int8), list(formats.fp8), weights) == (["one", "two"], ["hidden", "head"], {})
    fewer = recipe_of(groups, 4, activations="fp8")
    assert formats_of(model, fewer, groups, {}).fp8 == []
    aware = fewer.model_copy(update={"quantization": fewer.quantization.model_copy(update={"aware": 1.0})})
    assert set(IntegerTraining.of(model, aware, groups).layers) == {"one", "two", "hidden", "head"}
    aware = recipe.model_copy(update={"quantization": recipe.quantization.model_copy(update={"aware": 1.0})})
    assert set(IntegerTraining.of(model, aware, groups).layers) == {"one", "two"}


NETWORKS = {
    "resnet20": (lambda: cifar_resnet("cifar_resnet20"), "cross_layer", 32),
    "mobile": (Mobile, "cross_layer", 16),
    "encoder": (Encoder, "both", 16),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_rescaled_network_fits_into_the_dense_one_s_graph(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, form, size = NETWORKS[name]
    model = uneven(build)
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(1))
    groups = find_groups(model, images[:2])
    model = cuttable(model, groups, images[:2])
    runtime = OnnxRuntime(Target())
    runtime.prepare(model, images[:2])

    def never(*_: object, **__: object) -> None:
        raise AssertionError("exported by itself")

    monkeypatch.setattr(onnx_file, "export_fresh", never)
    recipe = recipe_of(groups, 8, 32, equalize=form)
    made, weights = stored_weights(model, recipe, groups, [images])
    assert any(not torch.equal(p, model.get_parameter(n)) for n, p in made.named_parameters())
    artifact = runtime.build(made, tmp_path / "m.onnx", formats_of(made, recipe, groups, weights), [images])
    assert off(runtime.predict(artifact.path, [images]), made, [images]) < 1e-3
    assert off(runtime.predict(artifact.path, [images]), model, [images]) < 0.1
    assert artifact.executed.not_as_asked == ()


def test_equalisation_is_for_recipes_with_integers() -> None:
    model, groups = small()
    same, weights = stored_weights(model, recipe_of(groups, 32, equalize="cross_layer"), groups, BATCHES)
    assert same is model and weights == {}
    other, weights = stored_weights(model, recipe_of(groups, 8, equalize="cross_layer"), groups, BATCHES)
    assert other is not model and weights == {}  # its integers are the runtime's own


def test_equalisation_helps_where_channels_of_inputs_differ() -> None:
    """Inputs of int8 have one scale for all channels: large ones drown the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        model.get_parameter("0.weight")[::8] = 60.0
        model.get_parameter("1.weight")[:, ::8] /= 60.0
    groups = weighted_groups(model)
    batches = [torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    errors = {}
    for form in ("none", "smooth"):
        recipe = recipe_of(groups, 8, equalize=form)
        made, _ = stored_weights(model, recipe, groups, batches)
        errors[form] = off(
            torch.cat([rounded(made, int8_layers(recipe, groups))(b).detach() for b in batches]),
            model,
            batches,
        )
    assert errors["smooth"] < 0.5 * errors["none"]


def test_a_stored_weight_counts_its_blocks() -> None:
    assert StoredWeight(4).blocks == 1
    assert StoredWeight(4, scales=np.ones((3, 5), np.float32)).blocks == 5
