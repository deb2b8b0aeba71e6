"""Networks of many forms through the whole deployment: parity, one export, and int8 exactly where it was asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.deploy import onnx_file as module
from autoprune.deploy.onnxruntime import OnnxRuntime
from autoprune.deploy.runtime import Artifact, Formats
from autoprune.deploy.sessions.onnxruntime import session_options
from autoprune.deploy.template import export_fresh, fixed_batch
from autoprune.measure.cost import count_macs
from autoprune.target import Target

Build = Callable[[], nn.Module]
IMAGE, SEQUENCE = (3, 8, 8), (5, 8)


class Twice(nn.Module):
    """One layer called twice, and two names where one begins with the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.conv_out = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 16)
        self.fc_out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        x = F.relu(self.conv_out(x)).mean((2, 3))
        outputs: Tensor = self.fc_out(F.relu(self.fc(x)))
        return outputs


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 3, 3, padding=1)
        self.two = nn.Conv2d(3, 3, 3, padding=1)
        self.two.weight = self.one.weight
        self.fc = nn.Linear(3 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.fc(self.two(F.relu(self.one(x))).flatten(1))
        return outputs


class Fixed(nn.Module):
    """A forward that makes the batch a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.fc(self.conv(x).reshape(int(x.shape[0]), -1))
        return outputs


class Attention(nn.Module):
    """An embedding, one encoder layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Linear(8, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.fc = nn.Linear(80, 4)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.fc(self.encoder(self.emb(x)).flatten(1))
        return outputs


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)
    )


def transposed() -> nn.Module:
    up = nn.ConvTranspose2d(8, 6, 2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), up, nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(294, 4)
    )


def plain_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip


def prepared(build: Build, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build().eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                assert layer.running_mean is not None and layer.running_var is not None
                layer.running_mean.uniform_(-0.3, 0.3)
                layer.running_var.uniform_(0.5, 2.0)
    return model


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count exports of single candidates."""
    counted: list[int] = []

    def count(*arguments: object, **options: int) -> object:
        counted.append(1)
        return export_fresh(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "export_fresh", count)
    return counted


def deployed(build: Build, shape: tuple[int, ...], path: Path, asked: list[str], batch: int = 1) -> tuple[
    Artifact, nn.Module, Tensor
]:  # fmt: skip
    """Export one network and put the weights of another one of its kind into the graph."""
    inputs = torch.randn(24, *shape, generator=torch.Generator().manual_seed(1))
    runtime = OnnxRuntime(Target(batch=batch))
    runtime.prepare(prepared(build, 0), inputs[:2])
    model = prepared(build, 1)
    artifact = runtime.build(model, path, Formats(int8=asked), [inputs])
    with torch.no_grad():
        torch.testing.assert_close(
            runtime.predict(path, [inputs]), model(inputs), rtol=1e-3, atol=1e-3 if not asked else 0.2
        )
    return artifact, model, inputs


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (mlp, IMAGE), (transposed, IMAGE), (plain_norm, IMAGE), (grouped, IMAGE), (Twice, IMAGE),
        (Tied, IMAGE), (Fixed, IMAGE), (Attention, SEQUENCE),
    ],
)  # fmt: skip
def test_another_network_s_weights_go_into_the_graph(
    build: Build, shape: tuple[int, ...], tmp_path: Path, exports: list[int]
) -> None:
    artifact, _, _ = deployed(build, shape, tmp_path / "m.onnx", [])
    assert artifact.parity_error < 1e-3
    assert artifact.executed.int8_layers == 0
    assert exports == []


def test_a_candidate_of_another_topology_is_exported_by_itself(tmp_path: Path, exports: list[int]) -> None:
    inputs = torch.randn(4, 3, 8, 8)
    runtime = OnnxRuntime(Target())
    runtime.prepare(prepared(grouped, 0), inputs[:2])
    artifact = runtime.build(prepared(transposed, 0), tmp_path / "m.onnx", Formats(), [inputs])
    assert artifact.parity_error < 1e-3
    assert exports == [1]


@pytest.mark.parametrize(
    ("build", "shape", "asked", "integer_weights"),
    [
        (Twice, IMAGE, ["conv_out", "fc_out"], 2),
        (Twice, IMAGE, ["twice"], 1),
        (transposed, IMAGE, ["0", "6"], 2),
        (Attention, SEQUENCE, ["emb"], 1),
        # The projection of the inputs goes with the projection of the outputs.
        (Attention, SEQUENCE, ["encoder.self_attn.out_proj"], 2),
    ],
)
def test_int8_is_where_it_was_asked_and_nowhere_else(
    build: Build, shape: tuple[int, ...], asked: list[str], integer_weights: int, tmp_path: Path
) -> None:
    artifact, _, _ = deployed(build, shape, tmp_path / "m.onnx", asked)
    constants = onnx.load(artifact.path).graph.initializer
    weights = [c for c in constants if c.data_type == onnx.TensorProto.INT8 and len(c.dims) > 1]
    assert len(weights) == integer_weights
    assert artifact.executed.int8_layers == artifact.executed.asked_int8 == integer_weights
    assert artifact.executed.not_as_asked == ()


def test_a_layer_without_an_int8_kernel_is_named(tmp_path: Path) -> None:
    artifact, _, _ = deployed(transposed, IMAGE, tmp_path / "m.onnx", ["0", "2", "6"])
    assert artifact.executed.not_as_asked == ("2",)
    assert artifact.executed.int8_layers == 2


def test_a_fixed_batch_is_the_target_s(tmp_path: Path) -> None:
    artifact, _, _ = deployed(Fixed, IMAGE, tmp_path / "m.onnx", ["conv"], batch=4)
    assert fixed_batch(onnx.load(artifact.path)) == 4


def test_a_graph_of_another_forward_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    class Head(nn.Module):
        exact = True

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.fc(F.relu(x) if Head.exact else x)
            return outputs

    inputs = torch.randn(8, 8)
    torch.manual_seed(0)
    model = Head().eval()
    for exact in (True, False):
        Head.exact = exact
        runtime = OnnxRuntime(Target())
        runtime.prepare(model, inputs[:2])
        path = tmp_path / "m.onnx"
        assert runtime.build(model, path, Formats(), [inputs]).parity_error < 1e-5


def test_attention_is_counted() -> None:
    # Embedding, projections of inputs and outputs, scores and their sums, the two linear layers, the head.
    by_hand = 5 * 8 * 16 + 5 * 16 * 48 + 5 * 16 * 16 + 2 * 5 * 5 * 16 + 2 * 5 * 16 * 32 + 80 * 4
    assert count_macs(Attention().eval(), SEQUENCE) == by_hand


def test_a_cached_graph_with_a_fixed_batch_serves_no_other_batch(tmp_path: Path) -> None:
    for batch in (1, 4):
        artifact, _, _ = deployed(Fixed, IMAGE, tmp_path / f"{batch}.onnx", [], batch=batch)
        assert fixed_batch(onnx.load(artifact.path)) == batch


def test_a_fold_that_is_not_known_costs_an_export_and_nothing_else(
    tmp_path: Path, exports: list[int]
) -> None:
    def build() -> nn.Module:
        up = nn.ConvTranspose2d(8, 8, 3, groups=2)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), up, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
        )

    artifact, _, _ = deployed(build, IMAGE, tmp_path / "m.onnx", [])
    assert artifact.parity_error < 1e-3
    assert exports == [1]


def test_layers_with_parametrised_weights_are_counted_and_float(tmp_path: Path) -> None:
    def build() -> nn.Module:
        one, two = (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1)) for _ in range(2))
        return nn.Sequential(one, nn.ReLU(), two, nn.Flatten(), nn.Linear(192, 4))

    artifact, _, _ = deployed(build, IMAGE, tmp_path / "m.onnx", ["0", "2", "4"])
    executed = artifact.executed
    assert (executed.layers, executed.asked_int8, executed.int8_layers) == (3, 3, 1)
    assert executed.not_as_asked == ("0", "2")


def test_waiting_threads_leave_the_cores_to_the_next_model() -> None:
    options = session_options(2)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
