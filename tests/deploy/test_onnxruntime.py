"""onnxruntime: parity, int8 that runs, weights put into the dense graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from autoprune.deploy import onnx_file as module
from autoprune.deploy.graph_cache import export_template
from autoprune.deploy.onnxruntime import OnnxRuntime
from autoprune.deploy.runtime import Formats
from autoprune.deploy.template import export_fresh, instantiate, layer_nodes
from autoprune.errors import ExportError
from autoprune.target import Target
from tests.deploy.contract import RuntimeContract, inputs, one_cache
from tests.deploy.networks import LAYERS, residual

__all__ = ["inputs", "one_cache"]


class TestOnnxRuntime(RuntimeContract):
    dynamic = True

    def test_the_dense_graph_is_exported_once(
        self, inputs: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runtime = OnnxRuntime(Target())
        runtime.prepare(residual(), inputs[:2])

        def refuse(*args: object) -> None:
            raise AssertionError("exported again")

        monkeypatch.setattr(module, "export_fresh", refuse)
        runtime.build(residual(8, seed=5), tmp_path / "m.onnx", Formats(int8=LAYERS), [inputs])
        again = OnnxRuntime(Target())
        monkeypatch.setattr("autoprune.deploy.template.export_fresh", refuse)
        again.prepare(residual(), inputs[:2])

    def test_another_topology_is_exported_by_itself(self, inputs: Tensor, tmp_path: Path) -> None:
        runtime = OnnxRuntime(Target())
        runtime.prepare(residual(), inputs[:2])
        other = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(4 * 14 * 14, 10)
        ).eval()
        artifact = runtime.build(other, tmp_path / "m.onnx", Formats(), [inputs])
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
            runtime.build(model, tmp_path / "m.onnx", Formats(), [inputs])
        assert not (tmp_path / "m.onnx").exists()

    def test_the_file_holds_no_exporter_metadata_and_names_its_layers(
        self, inputs: Tensor, tmp_path: Path
    ) -> None:
        runtime = OnnxRuntime(Target())
        runtime.prepare(residual(), inputs[:2])
        artifact = runtime.build(residual(), tmp_path / "m.onnx", Formats(int8=LAYERS), [inputs])
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
