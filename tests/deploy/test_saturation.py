"""Processors whose int8 kernels add in 16 bits: that they are told, and that everything makes the narrower weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from autoprune.compress.aware import IntegerTraining
from autoprune.compress.formats import grid_bits
from autoprune.compress.rounding import round_weight, rounded
from autoprune.deploy import linear, saturation
from autoprune.deploy.parity import INT8_KERNEL_PARITY
from autoprune.deploy.probe import probe
from autoprune.deploy.registry import make_runtime
from autoprune.deploy.runtime import Formats
from autoprune.deploy.saturation import also_run_elsewhere, bits_here, int8_bits, kernels_off
from autoprune.errors import ExportError
from autoprune.measure.probes import DYNAMIC, INT8, Asked, in_format
from autoprune.search.formats import stored_weights
from autoprune.space.quantization import ActivationBits, Quantization
from autoprune.space.recipe import Recipe, uniform_recipe
from autoprune.target import RUNTIMES, Target
from tests.deploy.networks import LAYERS, residual
from tests.search.test_quantized_files import weighted_groups

INPUTS = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def largest_codes(path: Path) -> list[int]:
    """Return the largest magnitude of each matrix of integers in a file."""
    values = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    return [int(np.abs(each.astype(int)).max()) for each in values if each.dtype == np.int8 and each.ndim > 1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "cache"))


def filled(model: nn.Module, *names: str) -> nn.Module:
    """Give layers weights that are all alike, whose sums are the largest."""
    with torch.no_grad():
        for name in names:
            model.get_parameter(f"{name}.weight").fill_(0.01)
    return model.eval()


def force(monkeypatch: pytest.MonkeyPatch, *, saturates: bool) -> None:
    monkeypatch.setattr(saturation, "_saturates", lambda runtime: saturates)


@pytest.mark.parametrize(("saturates", "bits", "top"), [(False, 8, 127), (True, 7, 63)])
@pytest.mark.usefixtures("cache")
def test_weights_left_to_the_runtime_end_where_its_kernels_can_add(
    saturates: bool, bits: int, top: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, saturates=saturates)
    target, model = Target(), residual(16)
    assert int8_bits(target) == bits
    assert int8_bits(Target(runtime="torch")) == 8
    runtime = make_runtime(target)
    runtime.prepare(model, INPUTS[:2])
    written = runtime.files.write(model, Formats(int8=LAYERS), [INPUTS])  # type: ignore[attr-defined]
    (tmp_path / "m.onnx").write_bytes(written.raw)
    assert largest_codes(tmp_path / "m.onnx") == [top] * 4
    assert written.stored == ({"7": 4} if saturates else {})
    # They are the integers that the screen simulates, to the last one.
    values = {
        t.name: numpy_helper.to_array(t) for t in onnx.load_model_from_string(written.raw).graph.initializer
    }
    codes = next(v for v in values.values() if v.dtype == np.int8 and v.ndim == 2)
    codes = codes if len(codes) == 10 else codes.T
    weight = rounded(model, ["head"], int8_bits=bits).get_parameter("head.weight")
    step = model.get_parameter("head.weight").abs().amax(1, keepdim=True) / top
    torch.testing.assert_close(torch.tensor(codes).float() * step, weight)


@pytest.mark.usefixtures("cache")
def test_files_fit_the_machine_that_measures_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saturation, "_elsewhere", {})
    force(monkeypatch, saturates=True)
    there = bits_here()
    assert there["onnxruntime"] == 7
    force(monkeypatch, saturates=False)
    assert set(bits_here().values()) == {8}
    model = residual(16)
    runtime = make_runtime(Target())
    runtime.prepare(model, INPUTS[:2])
    also_run_elsewhere(there)  # once the runtime is made: nodes that measure are found later
    assert int8_bits(Target()) == 7
    written = runtime.files.write(model, Formats(int8=LAYERS), [INPUTS])  # type: ignore[attr-defined]
    (tmp_path / "m.onnx").write_bytes(written.raw)
    assert largest_codes(tmp_path / "m.onnx") == [63] * 4


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.usefixtures("cache")
def test_what_is_made_here_runs_right_here(runtime: str, tmp_path: Path) -> None:
    """On either kind of processor: layers whose sums are as large as they can be."""
    facts = RUNTIMES[runtime]
    if not facts.installed:
        pytest.skip(f"{runtime} is not installed: {facts.install}")
    target = Target(runtime=runtime)
    model = filled(nn.Sequential(nn.Conv2d(64, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16)), "0", "3")
    inputs = torch.rand(8, 64, 3, 3) + 1.0
    made = make_runtime(target)
    made.prepare(model, inputs[:2])
    path = tmp_path / "m.onnx"
    artifact = made.build(model, path, Formats(int8=["0", "3"]), [inputs])
    assert artifact.executed.ran == {"int8": 2}
    assert artifact.parity_error < 0.02
    assert max(largest_codes(path)) == 2 ** (int8_bits(target) - 1) - 1
    assert kernels_off(target, path.read_bytes(), inputs.numpy()) < 0.02


@pytest.mark.usefixtures("cache")
def test_a_file_of_another_machine_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights of all 8 bits are cut off where kernels add in 16, and are right elsewhere."""
    here = int8_bits(Target())
    force(monkeypatch, saturates=False)
    model = filled(nn.Sequential(nn.Linear(64, 16)), "0")
    inputs = torch.ones(8, 64)
    runtime = make_runtime(Target())
    runtime.prepare(model, inputs[:2])
    raw = runtime.files.write(model, Formats(int8=["0"]), [inputs]).raw  # type: ignore[attr-defined]
    assert kernels_off(Target(), raw, inputs.numpy()) == 0.0  # not looked at
    force(monkeypatch, saturates=True)
    off = kernels_off(Target(), raw, inputs.numpy())
    assert (off > INT8_KERNEL_PARITY) == (here == 7)


@pytest.mark.usefixtures("cache")
def test_sums_of_dynamic_int8_are_checked_by_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator itself is no reference: its kernel may be the one that cuts off."""
    model = filled(nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)), "0")
    inputs = torch.ones(8, 64)
    network, formats = in_format(model, DYNAMIC, 8)
    runtime = make_runtime(Target())
    runtime.prepare(model, inputs[:2])
    if int8_bits(Target()) < 8:
        with pytest.raises(ExportError, match="integer kernels differ"):
            runtime.build(network, tmp_path / "m.onnx", formats, [inputs])
    network, formats = in_format(model, DYNAMIC, int8_bits(Target()))
    artifact = runtime.build(network, tmp_path / "m.onnx", formats, [inputs])
    assert artifact.executed.ran == {"dynamic int8": 2}
    assert artifact.parity_error < 0.02
    raw = linear.in_float(artifact.path.read_bytes())
    operators = {node.op_type for node in onnx.load_model_from_string(raw).graph.node}
    assert "MatMulInteger" not in operators and "MatMul" in operators


def test_weights_of_int8_layers_alone_are_narrower() -> None:
    model = residual(16)
    groups = weighted_groups(model)
    asked: tuple[tuple[ActivationBits, int], ...] = ((8, 7), (16, 8), (32, 8))
    for activation_bits, bits in asked:
        recipe = uniform_recipe(groups, 0.0, 8, activation_bits=activation_bits)
        assert grid_bits(model, recipe, groups, int8_bits=7) == dict.fromkeys(LAYERS, bits)
        assert grid_bits(model, recipe, groups) == dict.fromkeys(LAYERS, 8)
    # A layer of a kind that has no kernel there stays as it is; so do fewer bits.
    eight = uniform_recipe(groups, 0.0, 8)
    assert grid_bits(model, eight, groups, ("linear",), 7) == {**dict.fromkeys(LAYERS, 8), "head": 7}
    assert set(grid_bits(model, uniform_recipe(groups, 0.0, 4), groups, int8_bits=7).values()) == {4}


def quantized_recipe(**how: object) -> Recipe:
    groups = weighted_groups(residual(16))
    return uniform_recipe(groups, 0.0, 8, quantization=Quantization.model_validate(how))


@pytest.mark.parametrize(
    "how", [{"scale": "mse"}, {"rounding": "gptq"}, {"rounding": "adaptive"}, {"bias_correction": True}]
)
def test_given_grids_are_narrower(how: dict[str, object]) -> None:
    model = residual(16)
    recipe, groups = quantized_recipe(**how), weighted_groups(model)
    _, wide = stored_weights(model, recipe, groups, [INPUTS])
    _, narrow = stored_weights(model, recipe, groups, [INPUTS], int8_bits=7)
    assert {(w.bits, int(np.abs(w.codes).max()) > 63) for w in wide.values() if w.codes is not None} == {
        (8, True)
    }
    assert {(w.bits, int(np.abs(w.codes).max()) > 63) for w in narrow.values() if w.codes is not None} == {
        (7, False)
    }


def test_training_rounds_to_the_narrower_grids() -> None:
    recipe, groups = quantized_recipe(aware=1.0), weighted_groups(residual(16))
    assert IntegerTraining.of(residual(16), recipe, groups).layers == dict.fromkeys(LAYERS, 8)
    assert IntegerTraining.of(residual(16), recipe, groups, int8_bits=7).layers == dict.fromkeys(LAYERS, 7)


def test_probes_ask_for_weights_that_run_right() -> None:
    model = nn.Sequential(nn.Linear(32, 8)).eval()
    tops = {}
    for asked in (DYNAMIC, Asked("8 bit weights", 8), Asked("int8, 4 bit weights", 4, 8)):
        weights = in_format(model, asked, 7)[1].weights
        tops[asked.name] = [
            (w.bits, int(np.abs(w.codes).max())) for w in weights.values() if w.codes is not None
        ]
    assert tops == {"dynamic int8": [(7, 63)], "8 bit weights": [(8, 127)], "int8, 4 bit weights": [(4, 7)]}
    assert in_format(model, INT8, 7)[1].weights == {}


@pytest.mark.usefixtures("cache")
def test_doctor_tells_which(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, saturates=True)
    found = probe(Target())
    assert found.bits == (32, 8)
    assert found.note.endswith("weights of int8 have 7 of 8 bits, since its kernels add in 16 bits here")


def test_the_smallest_step_is_the_grid_s() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    step = weight.abs().amax(1, keepdim=True) / 63
    assert float((round_weight(weight, 0, 7) / step).abs().max()) == pytest.approx(63)


def test_the_extreme_case_is_the_one_that_is_asked() -> None:
    """In whole sums every output of the probe's layers is 1; two products at once go beyond 16 bits."""
    from autoprune.deploy.sessions.onnxruntime import run_onnx

    for convolution in (True, False):
        raw, inputs = saturation._largest(convolution, 8)
        np.testing.assert_allclose(run_onnx(raw, inputs, optimized=False), 1.0, atol=1e-3)
    assert 2 * 255 * 127 > np.iinfo(np.int16).max >= 2 * 255 * 63
