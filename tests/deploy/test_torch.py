"""torch: the contract in float32, in bfloat16 and compiled; what it tells of itself, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

from autoprune.deploy import torch as module
from autoprune.deploy.runtime import Formats, StoredWeight
from autoprune.deploy.session import NodeTime, open_session
from autoprune.deploy.sessions import torch as sessions
from autoprune.deploy.sessions.pt2 import read_pt2
from autoprune.deploy.torch import Torch
from autoprune.deploy.torch_executed import read_back
from autoprune.deploy.torch_layers import Int8Linear
from autoprune.errors import ExportError
from autoprune.target import Target
from tests.deploy.contract import RuntimeContract, few_bits, inputs, one_cache
from tests.deploy.networks import LAYERS, residual

__all__ = ["inputs", "one_cache"]

CPU = Target(runtime="torch")
BFLOAT16 = Target(runtime="torch", precision="bfloat16")
COMPILED = Target(runtime="torch", compile=True)
CUDA = Target(runtime="torch", device="cuda", precision="float16")


class TestTorch(RuntimeContract):
    target = CPU
    int8 = False
    int16 = False
    dynamic = True
    needs_torch = True
    linear_bits = MappingProxyType({})


class TestTorchInBfloat16(TestTorch):
    target = BFLOAT16
    dense_bits = 12.5  # the exponents of weights are much alike, and compressed
    tolerance = 5e-2


@pytest.mark.slow
class TestTorchCompiled(TestTorch):
    target = COMPILED


class Attention(nn.Module):
    """A layer of attention between two convolutions, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.mix = nn.Conv2d(16, 16, 1)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.mix(self.stem(x))).flatten(2).transpose(1, 2)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        outputs: Tensor = self.head(x.mean(1))
        return outputs


@pytest.fixture
def attention() -> Attention:
    torch.manual_seed(0)
    return Attention().eval()


@pytest.mark.parametrize("target", [CPU, BFLOAT16])
def test_what_runs_is_read_back_layer_by_layer(
    inputs: Tensor, tmp_path: Path, target: Target, attention: Attention
) -> None:
    asked = Formats(int8=["attend.out_proj"], dynamic=["head"])
    made = Torch(target).build(attention, tmp_path / "m.pt2", asked, [inputs])
    executed = made.executed
    # The input projection of attention goes with its output projection.
    assert executed.ran == {"dynamic int8": 1, "int8": 2, target.precision: 2} == executed.asked
    assert (executed.layers, executed.int8_layers, executed.asked_int8) == (5, 3, 3)
    assert executed.operators["aten::_int_mm"] == 3
    assert executed.as_asked == 1.0
    session = open_session(target, made.path)
    seen, _ = read_back(session, inputs[:1].numpy())  # type: ignore[arg-type]
    assert set(seen) == {"stem", "mix", "mix#2", "attend.in_proj", "attend.out_proj", "head"}
    assert "aten::_int_mm" in seen["head"].operators
    assert seen["mix#2"].runs_in == target.precision
    assert seen["stem"].why == f"it runs as aten::convolution on {target.precision}"


def test_a_layer_that_runs_otherwise_is_told_with_its_reason(
    inputs: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Int8Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.described(inputs)

    monkeypatch.setattr(module, "Int8Linear", Broken)
    made = Torch(CPU).build(residual(), tmp_path / "m.pt2", Formats(dynamic=["head"]), [inputs])
    assert made.executed.not_as_asked == ("head",)
    assert made.executed.ran == {"float32": 3, "float64": 1}
    assert made.executed.reasons == {"head": "it runs as aten::mm on float64"}
    assert made.executed.as_asked == 0.75


def test_int8_linear_layers_are_small_and_near(inputs: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    runtime = Torch(CPU)
    dense = runtime.build(model, tmp_path / "dense.pt2", Formats(), [inputs])
    made = runtime.build(model, tmp_path / "m.pt2", Formats(int8=["1", "3"]), [inputs])
    assert made.executed.ran == {"int8": 2}
    assert made.path.stat().st_size < 0.27 * dense.path.stat().st_size
    assert 0 < made.parity_error < 0.05
    # Static: what lies beyond the calibrated range is cut off.
    with torch.no_grad():
        far = model(10 * inputs)
    outputs = runtime.predict(made.path, [10 * inputs])
    assert float((outputs - far).abs().max() / far.abs().max()) > 0.1
    # A range that is given is taken instead.
    wide = Formats(int8=["1", "3"], ranges={"1": (-50.0, 50.0), "3": (0.0, 50.0)})
    outputs = runtime.predict(runtime.build(model, tmp_path / "w.pt2", wide, [inputs]).path, [10 * inputs])
    assert float((outputs - far).abs().max() / far.abs().max()) < 0.1


@pytest.mark.parametrize("target", [CPU, BFLOAT16])
def test_a_file_opens_in_torch_alone(inputs: Tensor, tmp_path: Path, target: Target) -> None:
    model, weights = few_bits(residual(64), 4, inputs)
    asked = Formats(dynamic=["head"], weights=weights)
    made = Torch(target).build(model, tmp_path / "m.pt2", asked, [inputs])
    opened = torch.export.load(made.path).module()
    with torch.no_grad():
        assert torch.equal(opened(inputs), Torch(target).predict(made.path, [inputs]))


def test_int8_layers_keep_grids_of_fewer_bits(inputs: Tensor, tmp_path: Path) -> None:
    model, weights = few_bits(residual(64), 3, inputs)
    asked = Formats(int8=["head"], weights=weights)
    made = Torch(CPU).build(model, tmp_path / "m.pt2", asked, [inputs])
    assert made.executed.ran == {"float32": 3, "int8": 1}
    assert made.executed.stored_layers == {"3": 4}
    assert made.parity_error < 0.02


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Formats(int8=["one", "head"]), r"no convolution in int8; asked for: one; allowed: linear layers"),
        (Formats(dynamic=["stem"]), r"no convolution in dynamic int8; asked for: stem"),
        (Formats(fp8=["stem"]), r"no convolution in fp8; asked for: stem"),
        (
            Formats(fp8=["head"]),
            r"fp8 runs on GPUs of capability 8.9 and above, not on target 'torch' here.*head",
        ),
        (Formats(int16=["head"]), r"no inputs of int16; asked for: head"),
    ],
)
def test_what_has_no_kernel_is_refused_by_name(
    inputs: Tensor, tmp_path: Path, asked: Formats, said: str
) -> None:
    with pytest.raises(ExportError, match=said):
        Torch(CPU).build(residual(), tmp_path / "m.pt2", asked, [inputs])
    assert not list(tmp_path.iterdir())


def test_blocks_of_scales_are_refused_in_int8_and_stored_in_float(inputs: Tensor, tmp_path: Path) -> None:
    model, weights = few_bits(residual(), 4, inputs)
    codes = weights["head"].codes
    assert codes is not None
    scale = (model.get_parameter("head.weight").detach().numpy() / codes.astype("float32").clip(1)).max(1)
    scales = torch.from_numpy(scale)[:, None].expand(-1, 4).numpy()
    with torch.no_grad():
        model.get_parameter("head.weight").copy_(torch.from_numpy(codes) * torch.from_numpy(scale)[:, None])
    blocks = {"head": StoredWeight(4, codes, scales)}
    with pytest.raises(ExportError, match="one scale for each output channel, not blocks; asked for: head"):
        Torch(CPU).build(model, tmp_path / "m.pt2", Formats(int8=["head"], weights=blocks), [inputs])
    made = Torch(CPU).build(model, tmp_path / "m.pt2", Formats(weights=blocks), [inputs])
    assert made.parity_error < 1e-5


def test_a_network_with_a_fixed_batch_is_bound_to_the_target_s(inputs: Tensor, tmp_path: Path) -> None:
    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(768, 10)

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.head(x.reshape(int(x.shape[0]), 768))
            return outputs + float(x.shape[0] > 3)

    target = Target(runtime="torch", batch=4)
    model = Bound().eval()
    made = Torch(target).build(model, tmp_path / "m.pt2", Formats(int8=["head"]), [inputs])
    assert open_session(target, made.path).fixed_batch in (None, 4)
    outputs = Torch(target).predict(made.path, [inputs[:5]])
    assert outputs.shape == (5, 10)


def test_a_session_leaves_the_process_s_threads_alone(inputs: Tensor, tmp_path: Path) -> None:
    made = Torch(CPU).build(residual(), tmp_path / "m.pt2", Formats(), [inputs])
    before = torch.get_num_threads()
    session = open_session(CPU, made.path, before + 1)
    seen = []
    session.call = lambda images: seen.append(torch.get_num_threads()) or images  # type: ignore[attr-defined, func-returns-value]
    session.timer(inputs.numpy())()
    session.run(inputs.numpy())
    assert seen == [before + 1] * 2
    assert torch.get_num_threads() == before


def test_weights_are_computed_once_when_a_file_is_opened(inputs: Tensor, tmp_path: Path) -> None:
    model, weights = few_bits(residual(), 4, inputs)
    made = Torch(CPU).build(model, tmp_path / "m.pt2", Formats(weights=weights), [inputs])
    whole = read_pt2(made.path).module
    small = sessions.folded(read_pt2(made.path).module)
    before, after = (sum(n.op == "call_function" for n in m.graph.nodes) for m in (whole, small))
    plain = Torch(CPU).build(residual(), tmp_path / "p.pt2", Formats(), [inputs])
    assert before > after
    assert after == sum(
        n.op == "call_function" for n in sessions.folded(read_pt2(plain.path).module).graph.nodes
    )
    assert torch.equal(small(inputs), whole(inputs))


def test_what_depends_on_chance_or_changes_in_place_is_not_folded() -> None:
    graph = torch.fx.Graph()
    images, weight = graph.placeholder("images"), graph.get_attr("weight")
    aten = torch.ops.aten
    doubled = graph.call_function(aten.mul.Tensor, (weight, 2.0))
    noisy = graph.call_function(aten.bernoulli.default, (weight,))
    moved = graph.call_function(aten.add_.Tensor, (noisy, 1.0))
    total = graph.call_function(
        aten.add.Tensor, (graph.call_function(aten.add.Tensor, (images, doubled)), moved)
    )
    graph.output(total)
    made = sessions.folded(torch.fx.GraphModule({"weight": torch.full((3,), 0.5)}, graph))
    targets = [n.target for n in made.graph.nodes if n.op == "call_function"]
    assert targets == [aten.bernoulli.default, aten.add_.Tensor, aten.add.Tensor, aten.add.Tensor]
    assert set(made(torch.zeros(3)).tolist()) <= {2.0, 3.0}


def test_additions_work_for_the_layer_before_them(inputs: Tensor, tmp_path: Path) -> None:
    made = Torch(CPU).build(residual(), tmp_path / "m.pt2", Formats(dynamic=["head"]), [inputs])
    nodes = [n for n in sessions.folded(read_pt2(made.path).module).graph.nodes if n.op == "call_function"]
    timed = [NodeTime(n.name, str(n.target), (1.0,)) for n in nodes]
    owners = dict(
        zip((n.name for n in nodes), module.layers_of_nodes(made.path, timed, LAYERS, CPU), strict=True)
    )
    assert owners["conv2d"] == owners["relu"] == "stem"
    assert owners["add"] == owners["relu_2"] == owners["adaptive_avg_pool2d"] == "two"
    assert owners["_int_mm"] == "head"
    assert [name for name, owner in owners.items() if owner == ""] == ["to", "contiguous"]


def test_a_compiled_target_needs_a_compiler(inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ExportError, match="'torch:compile' needs a C\\+\\+ compiler") as caught:
        Torch(COMPILED).prepare(residual(), inputs[:2])
    assert "install g++" in caught.value.hint
    monkeypatch.undo()
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(ExportError, match="needs Triton"):
        sessions.check_compiler(Target(runtime="torch", device="cuda", compile=True))


def test_networks_that_give_several_tensors_are_refused(inputs: Tensor) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(ExportError, match="allowed: one tensor"):
        Torch(CPU).prepare(Two().eval(), inputs[:2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
class TestTorchOnAGpu(TestTorch):
    target = CUDA
    tolerance = 2e-2
