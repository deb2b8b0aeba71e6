"""What every runtime has to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.compress.quantization import quantized
from autoprune.deploy.registry import make_runtime
from autoprune.deploy.runtime import Formats, Runtime, StoredWeight
from autoprune.deploy.saturation import int8_bits
from autoprune.deploy.session import node_times, open_session
from autoprune.errors import ExportError
from autoprune.space.quantization import Quantization
from autoprune.target import RUNTIMES, Target
from tests.deploy.networks import LAYERS, residual


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True, scope="module")
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs are exported once for all tests of a file."""
    return tmp_path_factory.mktemp("cache")


class RuntimeContract:
    """A subclass says which target it is about, and what the target's runtime can do.

    Attributes:
        target: The target.
        int8: Whether layers run in int8.
        int16: Whether inputs can be rounded to 16 bits.
        storage: Whether weights can be stored in fewer bits than they are computed with.
        linear_bits: Bits of linear weights that a kernel reads while it computes in float, and as how many it does.
        dynamic: Whether linear layers can find the range of their inputs at each inference.
        int8_share: Largest share of the bytes of a float file that one in int8 has.
        dense_bits: Bits that a file spends on a weight of which nothing is asked.
        tolerance: Largest difference from the network in float, relative to the largest output.
    """

    target = Target()
    int8 = True
    int16 = True
    storage = True
    linear_bits: Mapping[int, int] = MappingProxyType({2: 2, 4: 4, 8: 8})
    dynamic = False
    int8_share = 0.45
    dense_bits = 32.0
    tolerance = 1e-3

    @pytest.fixture
    def runtime(self, one_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
        monkeypatch.setenv("AUTOPRUNE_CACHE", str(one_cache))
        facts = RUNTIMES[self.target.runtime]
        if not facts.installed:
            pytest.skip(f"{self.target.runtime} is not installed: {facts.install}")
        return make_runtime(self.target)

    def path(self, folder: Path, name: str = "") -> Path:
        return folder / f"{name}{RUNTIMES[self.target.runtime].model_file}"

    def difference(self, one: Tensor, other: Tensor) -> float:
        return float((one - other).abs().max() / other.abs().max())

    def test_a_float_artifact_gives_the_network_s_outputs(
        self, runtime: Runtime, inputs: Tensor, tmp_path: Path
    ) -> None:
        model = residual()
        runtime.prepare(model, inputs[:2])
        artifact = runtime.build(model, self.path(tmp_path), Formats(), [inputs])
        assert artifact.parity_error < self.tolerance
        outputs = runtime.predict(artifact.path, [inputs[:20], inputs[20:]])
        assert self.difference(outputs, model(inputs).detach()) < self.tolerance
        executed = artifact.executed
        assert (executed.layers, executed.int8_layers) == (4, 0)
        assert executed.ran == executed.asked == {self.target.precision: 4}
        assert executed.as_asked == 1.0

    def test_a_candidate_with_fewer_channels_keeps_parity(
        self, runtime: Runtime, inputs: Tensor, tmp_path: Path
    ) -> None:
        runtime.prepare(residual(), inputs[:2])
        candidate = residual(8, seed=5)
        artifact = runtime.build(candidate, self.path(tmp_path), Formats(), [inputs])
        outputs = runtime.predict(artifact.path, [inputs])
        assert self.difference(outputs, candidate(inputs).detach()) < self.tolerance

    def test_int8_runs_in_int8_and_is_smaller(self, runtime: Runtime, inputs: Tensor, tmp_path: Path) -> None:
        model = residual(64)
        runtime.prepare(model, inputs[:2])
        dense = runtime.build(model, self.path(tmp_path, "dense"), Formats(), [inputs])
        if not self.int8:
            with pytest.raises(ExportError, match="int8"):
                runtime.build(model, self.path(tmp_path), Formats(int8=LAYERS), [inputs])
            return
        made = runtime.build(model, self.path(tmp_path), Formats(int8=LAYERS), [inputs])
        assert made.executed.int8_layers == made.executed.asked_int8 == 4
        assert made.executed.ran == made.executed.asked == {"int8": 4}
        assert made.executed.not_as_asked == ()
        assert made.path.stat().st_size < self.int8_share * dense.path.stat().st_size
        assert 0.0 < made.parity_error < 0.2
        outputs = runtime.predict(made.path, [inputs])
        assert self.difference(outputs, model(inputs).detach()) < 0.2

    def test_layers_that_the_recipe_keeps_in_float_run_in_float(
        self, runtime: Runtime, inputs: Tensor, tmp_path: Path
    ) -> None:
        if not self.int8:
            pytest.skip("runs nothing in int8")
        model = residual()
        runtime.prepare(model, inputs[:2])
        made = runtime.build(model, self.path(tmp_path), Formats(int8=["stem", "two", "head"]), [inputs])
        assert made.executed.ran == {"int8": 3, self.target.precision: 1}
        assert (made.executed.int8_layers, made.executed.asked_int8) == (3, 3)
        assert made.executed.not_as_asked == ()

    @pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
    def test_weights_of_few_bits_are_exact_and_packed(
        self, runtime: Runtime, inputs: Tensor, tmp_path: Path, bits: int
    ) -> None:
        if not self.storage:
            pytest.skip("stores weights as they are computed with")
        dense, (model, weights) = residual(64), few_bits(residual(64), bits, inputs)
        runtime.prepare(dense, inputs[:2])
        whole = runtime.build(dense, self.path(tmp_path, "dense"), Formats(), [inputs])
        made = runtime.build(model, self.path(tmp_path), Formats(weights=weights), [inputs])
        outputs = runtime.predict(made.path, [inputs])
        assert self.difference(outputs, model(inputs).detach()) < self.tolerance
        assert made.executed.stored_layers == {str(bits): 4}
        assert made.executed.not_as_asked == ()
        read = {f"{self.linear_bits[bits]} bit weights": 1} if bits in self.linear_bits else {}
        assert made.executed.ran == {**read, self.target.precision: 4 - len(read)}
        # Packed: the file has its bits, names, biases and the operators that rebuild tensors besides.
        share = made.path.stat().st_size / whole.path.stat().st_size
        assert share < (bits + 2.24) / self.dense_bits

    @pytest.mark.parametrize("bits", [2, 4])
    def test_int8_kernels_run_weights_of_fewer_bits(
        self, runtime: Runtime, inputs: Tensor, tmp_path: Path, bits: int
    ) -> None:
        if not (self.int8 and self.storage):
            pytest.skip("runs nothing in int8, or stores weights as they are computed with")
        model, weights = few_bits(residual(64), bits, inputs)
        runtime.prepare(residual(64), inputs[:2])
        eight = runtime.build(model, self.path(tmp_path, "eight"), Formats(int8=LAYERS), [inputs])
        made = runtime.build(model, self.path(tmp_path), Formats(int8=LAYERS, weights=weights), [inputs])
        assert made.executed.ran == {"int8": 4}
        assert made.path.stat().st_size < 0.75 * eight.path.stat().st_size
        outputs = runtime.predict(made.path, [inputs])
        assert self.difference(outputs, model(inputs).detach()) < 0.05

    @pytest.mark.parametrize("bfloat16", [False, True])
    def test_16_bits_halve_the_file(
        self, runtime: Runtime, inputs: Tensor, tmp_path: Path, bfloat16: bool
    ) -> None:
        if not self.storage:
            pytest.skip("stores weights as they are computed with")
        model = residual(64)
        runtime.prepare(model, inputs[:2])
        dense = runtime.build(model, self.path(tmp_path, "dense"), Formats(), [inputs])
        halves = dict.fromkeys(LAYERS, StoredWeight(16, bfloat16=bfloat16))
        made = runtime.build(model, self.path(tmp_path), Formats(weights=halves), [inputs])
        assert made.path.stat().st_size < (17.3 / self.dense_bits) * dense.path.stat().st_size
        assert made.executed.ran == {self.target.precision: 4}
        outputs = runtime.predict(made.path, [inputs])
        assert self.difference(outputs, model(inputs).detach()) < (
            5e-2 if bfloat16 else self.tolerance + 5e-3
        )

    def test_inputs_of_16_bits_are_rounded_and_told_to_run_in_float(
        self, runtime: Runtime, inputs: Tensor, tmp_path: Path
    ) -> None:
        model, weights = few_bits(residual(64), 8, inputs)
        runtime.prepare(model, inputs[:2])
        asked = Formats(int16=["one"], weights=weights)
        if not self.int16:
            with pytest.raises(ExportError, match="int16.*one"):
                runtime.build(model, self.path(tmp_path), asked, [inputs])
            return
        made = runtime.build(model, self.path(tmp_path), asked, [inputs])
        assert made.executed.asked["int16"] == 1
        assert made.executed.not_as_asked == ("one",)
        assert "runs as" in made.executed.reasons["one"]
        assert made.executed.as_asked == 0.75
        outputs = runtime.predict(made.path, [inputs])
        error = self.difference(outputs, model(inputs).detach())
        assert 0.0 < error < self.tolerance

    def test_dynamic_int8_of_linear_layers(self, runtime: Runtime, inputs: Tensor, tmp_path: Path) -> None:
        model, weights = few_bits(residual(64), int8_bits(self.target), inputs)
        runtime.prepare(model, inputs[:2])
        asked = Formats(dynamic=["head"], weights={"head": weights["head"]})
        if not self.dynamic:
            with pytest.raises(ExportError, match="dynamic int8"):
                runtime.build(model, self.path(tmp_path), asked, [inputs])
            return
        made = runtime.build(model, self.path(tmp_path), asked, [inputs])
        assert made.executed.ran == {"dynamic int8": 1, self.target.precision: 3}
        assert made.executed.not_as_asked == ()
        # Inputs ten times as large as any that were calibrated with are not cut off.
        outputs = runtime.predict(made.path, [10 * inputs])
        assert self.difference(outputs, model(10 * inputs).detach()) < 0.02

    def test_zeros_are_packed(self, runtime: Runtime, inputs: Tensor, tmp_path: Path) -> None:
        if not self.storage:
            pytest.skip("stores weights as they are computed with")
        whole, model = residual(64), residual(64)
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    edge = layer.weight.abs().flatten().kthvalue(int(0.8 * layer.weight.numel())).values
                    layer.weight.mul_(layer.weight.abs() > edge)
        runtime.prepare(whole, inputs[:2])
        dense = runtime.build(whole, self.path(tmp_path, "dense"), Formats(), [inputs])
        made = runtime.build(model, self.path(tmp_path), Formats(packed=True), [inputs])
        assert made.path.stat().st_size < (0.2 + 4.8 / self.dense_bits) * dense.path.stat().st_size
        assert made.executed.ran == dense.executed.ran
        outputs = runtime.predict(made.path, [inputs])
        assert self.difference(outputs, model(inputs).detach()) < self.tolerance

    def test_a_session_is_timed_and_gives_what_is_predicted(
        self, runtime: Runtime, inputs: Tensor, tmp_path: Path
    ) -> None:
        model = residual()
        runtime.prepare(model, inputs[:2])
        made = runtime.build(model, self.path(tmp_path), Formats(), [inputs])
        session = open_session(self.target, made.path)
        images = inputs[: session.fixed_batch or self.target.batch].numpy()
        assert session.timer(images)() > 0.0
        outputs = torch.from_numpy(session.run(images))
        assert self.difference(outputs, runtime.predict(made.path, [inputs])[: len(images)]) < self.tolerance

    def test_times_of_layers_are_those_of_the_network(
        self, runtime: Runtime, inputs: Tensor, tmp_path: Path
    ) -> None:
        from autoprune.deploy.owners import layers_of_nodes

        model = residual(64)
        runtime.prepare(model, inputs[:2])
        made = runtime.build(model, self.path(tmp_path), Formats(), [inputs])
        images = inputs[: open_session(self.target, made.path).fixed_batch or self.target.batch].numpy()
        nodes = node_times(self.target, made.path, images, 5, 1.0)
        if nodes is None:
            return
        owners = layers_of_nodes(made.path, nodes, LAYERS, self.target)
        assert len(owners) == len(nodes)
        assert set(LAYERS) <= set(owners) <= {*LAYERS, ""}
        assert all(np.mean(node.durations_s) >= 0.0 for node in nodes)

    def test_what_the_measuring_process_loads(self, runtime: Runtime) -> None:
        """It must not pay for torch where the runtime does without."""
        code = (
            "import json, sys; from importlib import import_module; "
            f"import_module('autoprune.deploy.sessions.{self.target.runtime}'); "
            "print(json.dumps('torch' in sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout.strip().splitlines()[-1]) == self.needs_torch

    needs_torch = False


def few_bits(model: nn.Module, bits: int, inputs: Tensor) -> tuple[nn.Module, dict[str, StoredWeight]]:
    """Return a network with all weights on grids of so many bits, and how they are stored."""
    made, codes, _ = quantized(model, dict.fromkeys(LAYERS, bits), Quantization(), [inputs])
    return made, {name: StoredWeight(bits, each.numpy()) for name, each in codes.items()}
