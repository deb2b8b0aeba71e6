"""onnxruntime: parity, int8 that runs, weights put into the dense graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from autoprune.config import Target
from autoprune.deploy import onnxruntime as module
from autoprune.deploy.graph_cache import export_template
from autoprune.deploy.onnxruntime import OnnxRuntime
from autoprune.deploy.runtime import Runtime
from autoprune.deploy.template import export_fresh, instantiate, layer_nodes
from autoprune.errors import ExportError
from tests.deploy.networks import LAYERS, residual


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class RuntimeContract:
    """What every runtime has to do; a subclass gives ``runtime``."""

    @pytest.fixture
    def runtime(self) -> Runtime:
        raise NotImplementedError

    def test_float_artifact_gives_the_network_s_outputs(
        self, runtime: Runtime, inputs: Tensor, tmp_path: Path
    ) -> None:
        model = residual()
        runtime.prepare(model, inputs[:2])
        artifact = runtime.build(model, tmp_path / "model.onnx", int8_layers=[], calibration=[inputs])
        assert artifact.parity_error < 1e-3
        outputs = runtime.predict(artifact.path, [inputs[:20], inputs[20:]])
        torch.testing.assert_close(outputs, model(inputs).detach(), rtol=1e-3, atol=1e-3)
        assert (artifact.executed.layers, artifact.executed.int8_layers) == (4, 0)

    def test_int8_artifact_runs_in_int8_and_is_smaller(
        self, runtime: Runtime, inputs: Tensor, tmp_path: Path
    ) -> None:
        model = residual(64)
        runtime.prepare(model, inputs[:2])
        dense = runtime.build(model, tmp_path / "dense.onnx", int8_layers=[], calibration=[inputs])
        int8 = runtime.build(model, tmp_path / "int8.onnx", int8_layers=LAYERS, calibration=[inputs])
        assert int8.executed.int8_layers == int8.executed.asked_int8 == 4
        assert int8.executed.not_as_asked == ()
        assert int8.path.stat().st_size < 0.45 * dense.path.stat().st_size
        assert 0.0 < int8.parity_error < 0.2

    def test_layers_that_the_recipe_keeps_in_float_run_in_float(
        self, runtime: Runtime, inputs: Tensor, tmp_path: Path
    ) -> None:
        model = residual()
        runtime.prepare(model, inputs[:2])
        artifact = runtime.build(
            model, tmp_path / "m.onnx", int8_layers=["stem", "two", "head"], calibration=[inputs]
        )
        assert artifact.executed.int8_layers == 3
        assert artifact.executed.asked_int8 == 3
        assert artifact.executed.not_as_asked == ()

    def test_a_candidate_with_fewer_channels_keeps_parity(
        self, runtime: Runtime, inputs: Tensor, tmp_path: Path
    ) -> None:
        runtime.prepare(residual(), inputs[:2])
        candidate = residual(8, seed=5)
        artifact = runtime.build(candidate, tmp_path / "m.onnx", int8_layers=[], calibration=[inputs])
        outputs = runtime.predict(artifact.path, [inputs])
        torch.testing.assert_close(outputs, candidate(inputs).detach(), rtol=1e-3, atol=1e-3)


class TestOnnxRuntime(RuntimeContract):
    @pytest.fixture
    def runtime(self) -> Runtime:
        return OnnxRuntime(Target())

    def test_the_dense_graph_is_exported_once(
        self, inputs: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runtime = OnnxRuntime(Target())
        runtime.prepare(residual(), inputs[:2])

        def refuse(*args: object) -> None:
            raise AssertionError("exported again")

        monkeypatch.setattr(module, "export_fresh", refuse)
        runtime.build(residual(8, seed=5), tmp_path / "m.onnx", int8_layers=LAYERS, calibration=[inputs])
        again = OnnxRuntime(Target())
        monkeypatch.setattr("autoprune.deploy.template.export_fresh", refuse)
        again.prepare(residual(), inputs[:2])

    def test_another_topology_is_exported_by_itself(self, inputs: Tensor, tmp_path: Path) -> None:
        runtime = OnnxRuntime(Target())
        runtime.prepare(residual(), inputs[:2])
        other = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(4 * 14 * 14, 10)
        ).eval()
        artifact = runtime.build(other, tmp_path / "m.onnx", int8_layers=[], calibration=[inputs])
        assert artifact.executed.layers == 2
        torch.testing.assert_close(
            runtime.predict(artifact.path, [inputs]), other(inputs).detach(), rtol=1e-3, atol=1e-3
        )

    def test_a_wrong_weight_is_caught(
        self, inputs: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = residual()
        runtime = OnnxRuntime(Target())
        runtime.prepare(model, inputs[:2])
        put_in: Callable[..., onnx.ModelProto] = instantiate

        def corrupt(template: object, network: nn.Module, **options: bool) -> onnx.ModelProto:
            spoiled = residual(seed=9)
            return put_in(template, spoiled, **options)

        monkeypatch.setattr(module, "instantiate", corrupt)
        monkeypatch.setattr(
            module, "export_fresh", lambda *_, **__: export_fresh(residual(seed=9), inputs[:2])
        )
        with pytest.raises(ExportError, match="outputs differ"):
            runtime.build(model, tmp_path / "m.onnx", int8_layers=[], calibration=[inputs])
        assert not (tmp_path / "m.onnx").exists()

    def test_the_file_holds_no_exporter_metadata_and_names_its_layers(
        self, inputs: Tensor, tmp_path: Path
    ) -> None:
        runtime = OnnxRuntime(Target())
        runtime.prepare(residual(), inputs[:2])
        artifact = runtime.build(residual(), tmp_path / "m.onnx", int8_layers=LAYERS, calibration=[inputs])
        proto = onnx.load(artifact.path)
        assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
        assert sorted(layer_nodes(proto)) == sorted(LAYERS)

    def test_batchnorm_is_folded(self, inputs: Tensor) -> None:
        template = export_template(residual(), inputs[:2])
        assert {node.op_type for node in template.proto.graph.node}.isdisjoint({"BatchNormalization"})
        assert set(template.folded) == {"stem.weight", "one.weight", "two.weight"}

    def test_a_damaged_cache_is_ignored(self, inputs: Tensor, tmp_path: Path) -> None:
        export_template(residual(), inputs[:2])
        for path in (tmp_path / "cache" / "export").rglob("template.onnx"):
            path.write_bytes(b"torn")
        assert len(layer_nodes(export_template(residual(), inputs[:2]).proto)) == 4
