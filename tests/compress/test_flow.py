"""Which channels share a scale: seen in networks whose couplings are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.compress.discovery import cuttable, find_groups
from autoprune.compress.flow.families import families
from autoprune.compress.flow.recorder import channel_flow, input_maxima
from autoprune.compress.flow.units import Flow
from tests.compress.networks import Mixed, OptionA, Plain

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def free(flow: Flow) -> dict[str, int]:
    """Return how many channels that each weight makes may be scaled and are read."""
    read = {unit for reader in flow.readers for unit in reader.units.tolist()}
    return {m.weight: sum(u > 0 and u in read for u in m.units.tolist()) for m in flow.makers}


def units(flow: Flow, weight: str) -> list[int]:
    side = next(s for sides in (flow.makers, flow.readers) for s in sides if s.weight == weight)
    return [int(unit) for unit in side.units.tolist()]


def read_units(flow: Flow, weight: str) -> list[int]:
    return [int(unit) for r in flow.readers if r.weight == weight for unit in r.units.tolist()]


class Of(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], one: nn.Module, two: nn.Module) -> None:
        super().__init__()
        self.between, self.one, self.two = between, one, two

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(self.between(self.one(x)))
        return y


def conv_pair(between: Callable[[Tensor], Tensor], channels: int = 4) -> nn.Module:
    return Of(between, nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(channels, 5, 1)).eval()


PASSING: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu in place": lambda x: x.relu_(),
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "average pool": lambda x: F.avg_pool2d(x, 2, padding=1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 1),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "zero padding": lambda x: F.pad(x, (1, 1, 1, 1)),
    "reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "stride": lambda x: x[:, :, ::2, ::2],
    "resizing": lambda x: F.interpolate(x, scale_factor=2.0),
    "there and back": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "scaled": lambda x: 0.5 * x / 3.0,
    "gate": lambda x: x * torch.ones(4, 1, 1),
    "aten": lambda x: torch.ops.aten.relu.default(x),
}
FIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "clamp": lambda x: x.clamp(max=3.0),
    "offset": lambda x: x + 1.0,
    "square": lambda x: x * x,
    "own gate": lambda x: x * torch.sigmoid(x),
    "constant padding": lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
    "norm": lambda x: x / x.norm(),
    "reciprocal": lambda x: 1.0 / (x + x.abs().max()),
    "softmax": lambda x: x.softmax(1),
    "sum over channels": lambda x: x.sum(1, keepdim=True).expand(-1, 4, -1, -1),
    "number read": lambda x: x * float(x.detach().abs().max()),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_factors_on(name: str) -> None:
    flow = channel_flow(conv_pair(PASSING[name]), IMAGES)
    made, read = units(flow, "one.weight"), read_units(flow, "two.weight")
    assert made == read
    assert len({*made} - {0}) == 4
    assert free(flow)["two.weight"] == 0


@pytest.mark.parametrize("name", FIXING)
def test_what_fixes_channels(name: str) -> None:
    flow = channel_flow(conv_pair(FIXING[name]), IMAGES)
    assert free(flow)["one.weight"] == 0


def test_channels_next_to_each_other_and_split() -> None:
    def halves_swapped(x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        return torch.cat([two, one, F.gelu(two)], 1)

    flow = channel_flow(conv_pair(halves_swapped, 6), IMAGES)
    made, read = units(flow, "one.weight"), read_units(flow, "two.weight")
    # The half that goes through GELU too is fixed.
    assert made[2:] == [0, 0] and 0 not in made[:2]
    assert read == [0, 0, *made[:2], 0, 0]


def test_flattened_places_belong_to_their_channel() -> None:
    model = Of(lambda x: F.relu(x).flatten(1), nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)).eval()
    flow = channel_flow(model, IMAGES)
    made = units(flow, "one.weight")
    assert read_units(flow, "two.weight") == [unit for unit in made for _ in range(36)]


def test_batchnorms_make_channels_of_their_own() -> None:
    flow = channel_flow(Plain(), IMAGES)
    assert free(flow) == {
        "conv1.weight": 0, "bn1.weight": 8, "conv2.weight": 0, "bn2.weight": 8, "fc1.weight": 10, "fc2.weight": 0,
    }  # fmt: skip
    assert [m.layer for m in flow.makers if m.kind == "batchnorm"] == ["conv1.weight", "conv2.weight"]
    bare = Plain()
    bare.bn1 = nn.BatchNorm2d(8, affine=False)
    assert read_units(channel_flow(bare, IMAGES), "conv2.weight") == [0] * 8


def test_a_residual_stream_has_one_unit_for_each_channel_and_padding_none() -> None:
    flow = channel_flow(OptionA(), IMAGES)
    stem, end, head = (
        units(flow, "stem.weight"),
        units(flow, "conv2.weight"),
        read_units(flow, "head.weight"),
    )
    assert end == head
    assert end[4:12] == stem
    assert not {*end[:4], *end[12:]} & {*stem}
    assert 0 not in end


def test_a_layer_that_is_used_twice_makes_and_reads_the_same() -> None:
    flow = channel_flow(Mixed(), IMAGES)
    assert units(flow, "twice.weight") == read_units(flow, "twice.weight") == units(flow, "grouped.weight")
    assert units(flow, "left.weight") + units(flow, "right.weight") == read_units(flow, "depthwise.weight")
    assert len(families(flow, lambda makers, readers: True)) == 3


def test_weights_that_are_read_elsewhere_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.two(F.relu(self.one(x))) + self.two.weight.sum()
            return y

    flow = channel_flow(Tied(), torch.randn(2, 8))
    assert free(flow) == {"one.weight": 0, "two.weight": 0}


def test_what_the_network_returns_is_fixed() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = F.relu(self.one(x))
            return {"features": y[:, :3], "logits": self.two(y)}

    flow = channel_flow(Two(), torch.randn(2, 8))
    assert [unit == 0 for unit in units(flow, "one.weight")] == [True] * 3 + [False] * 5


class ByHand(nn.Module):
    """A normalisation that is written out, and the layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)))
        return y


def test_normalisations_make_what_linear_layers_read() -> None:
    torch.manual_seed(0)
    sequence = torch.randn(2, 5, 8)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).eval()
    flow = channel_flow(encoder, sequence)
    assert free(flow) == {
        "norm1.weight": 8, "self_attn.out_proj.weight": 0, "norm2.weight": 8, "linear1.weight": 16, "linear2.weight": 0,
    }  # fmt: skip
    assert units(flow, "norm1.weight") == read_units(flow, "self_attn.in_proj_weight")
    # Where the normalised values go on as they are, too, nothing may change them.
    after = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    found = free(channel_flow(after, sequence))
    assert (found["norm1.weight"], found["norm2.weight"], found["linear1.weight"]) == (0, 0, 16)
    for model in (nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 4)), ByHand()):
        assert [m.kind for m in channel_flow(model, sequence).makers][0] == "layernorm"
        assert max(free(channel_flow(model, sequence)).values()) == 8


def test_a_network_written_as_a_graph_has_the_same_units() -> None:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=4).eval()
    images = torch.randn(2, 3, 16, 16)
    groups = find_groups(model, images)
    assert groups.rewritten
    plain, written = (free(channel_flow(m, images)) for m in (model, cuttable(model, groups, images)))
    norms = {name: count for name, count in plain.items() if "ln" in name}
    assert set(norms.values()) == {16} and len(norms) == 3
    assert {name: written[name] for name in norms} == norms


def test_the_network_and_its_inputs_are_as_before() -> None:
    model = Plain().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = IMAGES.clone()
    channel_flow(model, images)
    assert model.training and model.bn1.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert vars(images) == {}


def test_largest_inputs_of_each_channel() -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    batches = [torch.randn(4, 3, 8, 8), 3.0 * torch.randn(4, 3, 8, 8)]
    found = input_maxima(model, {"conv1.weight", "fc2.weight"}, batches)
    assert set(found) == {"conv1.weight", "fc2.weight"}
    torch.testing.assert_close(found["conv1.weight"], torch.cat(batches).abs().amax((0, 2, 3)))
    seen = []
    handle = model.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    torch.testing.assert_close(found["fc2.weight"], torch.cat(seen).abs().amax(0))
