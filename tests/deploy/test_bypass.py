"""The dense graph serves networks that lost blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from autoprune.compress.blocks import take_out
from autoprune.deploy import onnx_file as module
from autoprune.deploy import template
from autoprune.deploy.onnxruntime import OnnxRuntime
from autoprune.deploy.runtime import Formats
from autoprune.target import Target
from autoprune.workloads.cifar_resnet import cifar_resnet

IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "cache"))


def exports(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Count what is exported by itself."""
    seen: list[nn.Module] = []
    real = template.export_fresh

    def noting(model: nn.Module, *args: object, **kwargs: object) -> object:
        seen.append(model)
        return real(model, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "export_fresh", noting)
    return seen


@pytest.mark.parametrize("bits", [8, 32])
def test_a_network_without_blocks_is_built_from_the_dense_graph(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    dense = cifar_resnet("cifar_resnet20").eval()
    runtime = OnnxRuntime(Target())
    runtime.prepare(dense, IMAGES[:2])
    alone = exports(monkeypatch)
    whole = runtime.build(dense, tmp_path / "dense.onnx", Formats(), [IMAGES])
    smaller = cifar_resnet("cifar_resnet20").eval()
    smaller.load_state_dict(dense.state_dict())
    for block in ("layer1.1", "layer3.2"):
        take_out(smaller, block)
    layers = [n for n, m in smaller.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    artifact = runtime.build(
        smaller, tmp_path / "smaller.onnx", Formats(int8=layers if bits == 8 else []), [IMAGES]
    )
    assert alone == []
    assert artifact.executed.layers == whole.executed.layers - 4
    assert artifact.executed.int8_layers == (artifact.executed.layers if bits == 8 else 0)
    # The weights of the lost layers are not in the file.
    lost = 2 * (16 * 16 * 9 + 64 * 64 * 9)
    assert whole.path.stat().st_size - artifact.path.stat().st_size > lost * 4
    if bits == 32:
        torch.testing.assert_close(
            runtime.predict(artifact.path, [IMAGES]), smaller(IMAGES).detach(), rtol=1e-3, atol=1e-3
        )


def test_a_block_that_the_graph_does_not_show_is_exported_once_for_all_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    dense = torchvision.models.vit_b_16(weights=None, image_size=32, num_classes=5).eval()
    # Small: two encoder layers of twelve.
    dense.encoder.layers = dense.encoder.layers[:2]
    runtime = OnnxRuntime(Target())
    runtime.prepare(dense, IMAGES[:2])
    alone = exports(monkeypatch)
    smaller = torchvision.models.vit_b_16(weights=None, image_size=32, num_classes=5).eval()
    smaller.encoder.layers = smaller.encoder.layers[:2]
    smaller.load_state_dict(dense.state_dict())
    take_out(smaller, "encoder.layers.encoder_layer_1")
    for number in range(2):
        artifact = runtime.build(smaller, tmp_path / f"{number}.onnx", Formats(), [IMAGES[:8]])
        outputs = runtime.predict(artifact.path, [IMAGES[:4]])
        torch.testing.assert_close(outputs, smaller(IMAGES[:4]).detach(), rtol=1e-3, atol=1e-3)
    assert len(alone) <= 1
