"""What torch would be asked for on a GPU, as far as a processor shows it: none was at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.deploy.runtime import Formats
from autoprune.deploy.sessions import torch as sessions
from autoprune.deploy.sessions.pt2 import read_pt2
from autoprune.deploy.torch import Torch
from autoprune.errors import ExportError
from autoprune.target import Target
from tests.deploy.contract import inputs
from tests.deploy.networks import residual

__all__ = ["inputs"]

CPU = Target(runtime="torch")
CUDA = Target(runtime="torch", device="cuda", precision="float16")


def test_float32_is_float32_on_a_gpu(inputs: Tensor, tmp_path: Path) -> None:
    made = Torch(CPU).build(residual(), tmp_path / "m.pt2", Formats(), [inputs])
    session = sessions.open_session(CPU, made.path, 1)
    session.device = torch.device("cuda")
    before = torch.backends.cudnn.allow_tf32
    with session.ready():
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_gpu_s_file_names_the_kernels_for_two_of_four(inputs: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    with torch.no_grad():
        model[1].weight.reshape(-1, 4)[:, :2] = 0  # type: ignore[operator]
    written = Torch(CUDA)._write(model, Formats(packed=True), [inputs])
    # The second layer has no such weight.
    assert written.asked == {"1": "2:4 float16"}
    nodes = read_pt2(written.raw).module.graph.nodes
    kernels = {
        n.meta["custom"]["layer"]: n.meta["custom"].get("kernel") for n in nodes if n.meta.get("custom")
    }
    assert kernels == {"1": "2:4", "3": None}
    assert Torch(CPU)._write(model, Formats(packed=True), [inputs]).asked == {}


def test_sparse_kernels_get_compressed_weights(inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 64)).eval()
    with torch.no_grad():
        model[1].weight.reshape(-1, 4)[:, :2] = 0  # type: ignore[operator]
    written = Torch(CUDA)._write(model, Formats(packed=True), [inputs])
    opened = sessions.folded(read_pt2(written.raw).module)
    given: list[Tensor] = []

    def compress(weight: Tensor) -> Tensor:
        given.append(weight)
        return 2 * weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", compress)
    before = opened(inputs)
    sessions._lower_sparse(opened)
    assert given[0].shape == (64, 768)
    bias = model[1].bias.detach().half().float()  # type: ignore[operator]
    assert torch.allclose(opened(inputs) - bias, 2 * (before - bias), atol=1e-2)


@pytest.mark.parametrize(("capability", "runs"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_fp8_asks_for_the_gpu_s_capability(
    inputs: Tensor, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    runtime = Torch(Target(runtime="torch", device="cuda", precision="bfloat16"))
    if not runs:
        with pytest.raises(ExportError, match="fp8 runs on GPUs of capability 8.9"):
            runtime._write(residual(), Formats(fp8=["head"]), [inputs])
        return
    written = runtime._write(residual(), Formats(fp8=["head"]), [inputs])
    assert written.asked == {"head": "fp8"}
    assert written.described().shape == (8, 10)
    targets = [str(n.target) for n in read_pt2(written.raw).module.graph.nodes]
    assert "aten._scaled_mm.default" in targets


def test_on_a_gpu_time_is_taken_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.name = f"event {len([e for e in log if e.startswith('made')])}"
            log.append(f"made {self.name}")

        def record(self) -> None:
            log.append(f"record {self.name}")

        def synchronize(self) -> None:
            log.append(f"wait for {self.name}")

        def elapsed_time(self, end: Any) -> float:
            assert (self.name, end.name) == ("event 0", "event 1")
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    assert sessions._event_s(lambda images: log.append("run") or images, torch.zeros(1)) == 0.0025  # type: ignore[func-returns-value]
    assert log[2:] == ["synchronize", "record event 0", "run", "record event 1", "wait for event 1"]
