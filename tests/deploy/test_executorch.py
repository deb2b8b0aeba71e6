"""ExecuTorch: the contract, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

from autoprune.deploy.runtime import Formats, StoredWeight
from autoprune.deploy.session import open_session
from autoprune.errors import ExportError, UsageError
from autoprune.target import Target
from tests.deploy.contract import RuntimeContract, few_bits, inputs, one_cache
from tests.deploy.networks import LAYERS, residual

__all__ = ["inputs", "one_cache"]

pytest.importorskip("executorch", reason="executorch is not installed: pip install 'autoprune[executorch]'")

from autoprune.deploy import executorch as module  # noqa: E402  (loads it)
from autoprune.deploy.executorch import ExecuTorch  # noqa: E402

TARGET = Target(runtime="executorch")


class TestExecuTorch(RuntimeContract):
    target = TARGET
    int16 = False
    storage = False
    dynamic = True
    needs_torch = True
    linear_bits = MappingProxyType({})


@pytest.mark.parametrize("bits", [2, 4])
def test_int8_kernels_run_grids_of_fewer_bits_exactly(inputs: Tensor, tmp_path: Path, bits: int) -> None:
    model, weights = few_bits(residual(64), bits, inputs)
    made = ExecuTorch(TARGET).build(
        model, tmp_path / "m.pte", Formats(int8=LAYERS, weights=weights), [inputs]
    )
    assert made.executed.ran == {"int8": 4}
    assert made.executed.stored_layers == {"8": 4}
    assert made.parity_error < 0.05


def test_what_the_backend_leaves_is_told(
    inputs: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    monkeypatch.setattr(module, "XnnpackPartitioner", lambda: XnnpackPartitioner(configs=[LinearConfig]))
    made = ExecuTorch(TARGET).build(residual(), tmp_path / "m.pte", Formats(dynamic=["head"]), [inputs])
    assert made.executed.ran == {"dynamic int8": 1, "float32": 3}
    assert made.executed.operators["aten.convolution"] == 3
    assert made.executed.operators["XNNPACK aten.linear"] == 1
    left = module._Operator("aten.convolution", "one", False, "float32")
    assert left.why == (
        "it runs as aten.convolution in float32 by ExecuTorch's own operators, XNNPACK does not take it"
    )


def test_networks_that_cannot_run_there_are_refused(inputs: Tensor, tmp_path: Path) -> None:
    class Solid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.solid = nn.Conv3d(1, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.solid(x.unsqueeze(1)).flatten(1)
            return outputs

    with pytest.raises(ExportError, match="no three-dimensional or grouped transposed .*: solid"):
        ExecuTorch(TARGET).build(Solid().eval(), tmp_path / "m.pte", Formats(int8=["solid"]), [inputs])
    with pytest.raises(ExportError, match="ExecuTorch cannot run the file here"):
        ExecuTorch(TARGET).build(Solid().eval(), tmp_path / "m.pte", Formats(), [inputs])
    grouped = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Flatten()).eval()
    with pytest.raises(ExportError, match="no three-dimensional or grouped transposed .*: 1"):
        ExecuTorch(TARGET).build(grouped, tmp_path / "m.pte", Formats(int8=["0", "1"]), [inputs])


def test_projections_of_attention_run_in_int8(inputs: Tensor, tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 4, 4)
            self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
            self.head = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).flatten(2).transpose(1, 2)
            x = x + self.attend(x, x, x, need_weights=False)[0]
            outputs: Tensor = self.head(x.mean(1))
            return outputs

    torch.manual_seed(0)
    made = ExecuTorch(TARGET).build(
        Attention().eval(), tmp_path / "m.pte", Formats(int8=["attend.out_proj"], dynamic=["head"]), [inputs]
    )
    assert made.executed.ran == {"dynamic int8": 1, "float32": 1, "int8": 2}
    assert made.executed.not_as_asked == ()


def test_a_file_is_bound_to_the_target_s_batch(inputs: Tensor, tmp_path: Path) -> None:
    target = Target(runtime="executorch", batch=3)
    model = residual()
    made = ExecuTorch(target).build(model, tmp_path / "m.pte", Formats(), [inputs])
    assert open_session(target, made.path).fixed_batch == 3
    outputs = ExecuTorch(target).predict(made.path, [inputs[:7]])
    with torch.no_grad():
        assert torch.allclose(outputs, model(inputs[:7]), atol=1e-3)


def test_what_has_no_kernel_is_refused_by_name(inputs: Tensor, tmp_path: Path) -> None:
    model, weights = few_bits(residual(), 4, inputs)
    codes = weights["head"].codes
    assert codes is not None
    blocks = {"head": StoredWeight(4, codes, torch.ones(10, 4).numpy())}
    for asked, said in (
        (Formats(int16=["one"]), "no int16 here; asked for: one"),
        (Formats(fp8=["head"]), "no fp8 here; asked for: head"),
        (Formats(dynamic=["one"]), "no convolution in dynamic int8 here; asked for: one"),
        (
            Formats(weights=weights, int8=["stem"]),
            "asked for 4 bits in: head, one, two; allowed: 32, or integers",
        ),
        (Formats(weights={"one": StoredWeight(16)}), "asked for 16 bits in: one"),
        (Formats(int8=["head"], weights=blocks), "not blocks: head"),
    ):
        with pytest.raises(ExportError, match=said):
            ExecuTorch(TARGET).build(model, tmp_path / "m.pte", asked, [inputs])
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_of_executorch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(b"nothing at all, and for long enough to be looked at: " * 10)
    with pytest.raises(UsageError, match=r"model\.pte' cannot be read as a \.pte file"):
        open_session(TARGET, path)
