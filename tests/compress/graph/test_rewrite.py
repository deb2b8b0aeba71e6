"""Networks written as graphs: what they compute, what they hold, and what is cut of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.compress.discovery import cuttable, find_groups
from autoprune.compress.graph.find import trace
from autoprune.compress.graph.ignoring import run_ignoring
from autoprune.compress.graph.network import GraphNetwork, block_ends, bypass
from autoprune.compress.lineage import groups_after, in_dense_units
from autoprune.compress.surgery import Plan, make_plan, prune
from autoprune.space.groups import Groups
from autoprune.space.recipe import uniform_recipe

TOKENS = torch.arange(20).reshape(4, 5) % 13


class Turned(nn.Module):
    """A linear layer whose weight is ``(in, out)``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class Layer(nn.Module):
    """Grouped-query attention, a gated mixture, RMS normalisation in the open, and sizes in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(16) + 0.5)
        self.norm = nn.LayerNorm(16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.out = Turned(16, 16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        n, places, _ = x.shape
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        query = self.query(normed).view(n, places, 4, 4).transpose(1, 2)
        key, value = (
            layer(normed).view(n, places, 2, 4).transpose(1, 2)[:, :, None].expand(n, 2, 2, places, 4)
            .reshape(n, 4, places, 4)
            for layer in (self.key, self.value)
        )  # fmt: skip
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, places, 16))
        y = self.norm(x)
        return x + F.dropout(self.down(F.silu(self.gate(y)) * self.up(y)), 0.5, self.training)


class Words(nn.Module):
    """A small language model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 16)
        self.places = nn.Parameter(torch.randn(1, 5, 16))
        self.layers = nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(16, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(self.table(tokens) + self.places))
        return y


@pytest.fixture(scope="module")
def words() -> tuple[Words, Groups, GraphNetwork]:
    torch.manual_seed(0)
    model = Words().eval()
    groups = find_groups(model, TOKENS[:2])
    network = cuttable(model, groups, TOKENS[:2])
    assert isinstance(network, GraphNetwork)
    return model, groups, network


def test_a_graph_computes_the_same_for_any_number_of_examples(
    words: tuple[Words, Groups, GraphNetwork],
) -> None:
    model, _, network = words
    for count in (1, 3, 4):
        torch.testing.assert_close(network(TOKENS[:count]), model(TOKENS[:count]))
    assert network.get_submodule("layers.0.query").weight is model.get_submodule("layers.0.query").weight
    assert isinstance(network.get_submodule("layers.0.out"), nn.Linear), "a product with a weight is a layer"


def test_dropout_works_in_training_alone(words: tuple[Words, Groups, GraphNetwork]) -> None:
    network = words[2]
    assert torch.equal(network.eval()(TOKENS), network(TOKENS))
    torch.manual_seed(0)
    trained = network.train()(TOKENS)
    assert not torch.allclose(trained, network.eval()(TOKENS))


def test_every_kind_of_group_is_found(words: tuple[Words, Groups, GraphNetwork]) -> None:
    groups = words[1]
    sizes = {g.name: g.size for g in groups.prunable if not g.name.startswith("layers.1")}
    assert sizes == {
        "layers.0.query": 2,  # heads that share keys and values go together
        "layers.0.query/width": 4,
        "layers.0.value/width": 4,
        "layers.0.out": 16,  # the embedding
        "layers.0.gate": 24,
    }
    assert groups.by_name["layers.0.query"].producers == ("layers.0.query", "layers.0.key", "layers.0.value")
    embedding = groups.by_name["layers.0.out"]
    kinds = {m.layer: m.kind for m in embedding.members}
    assert kinds["table"] == "embedding" and kinds["places"] == kinds["layers.0.scale"] == "parameter"
    assert {m.layer: m.dim for m in embedding.members}["places"] == 2
    assert {g.block for g in groups.groups if g.block} == {"layers.0", "layers.1"}


def plan_of(groups: Groups, share: float = 0.5) -> Plan:
    generator = torch.Generator().manual_seed(0)
    return {
        g.name: tuple(
            sorted(torch.randperm(g.size, generator=generator)[: max(1, int(g.size * share))].tolist())
        )
        for g in groups.prunable
    }


def test_what_was_cut_is_cut_further(words: tuple[Words, Groups, GraphNetwork]) -> None:
    model, groups, network = words
    first: Plan = {
        "layers.0.query": (1,),
        "layers.0.out": tuple(range(0, 16, 2)),
        "layers.1.query/width": (0, 3),
    }
    parent = prune(network, groups, first)
    left = groups_after(network, groups, first)
    second: Plan = {"layers.0.query/width": (1, 2), "layers.0.out": (0, 3, 4), "layers.1.query": (0,)}
    at_once = prune(network, groups, in_dense_units(first, second))
    torch.testing.assert_close(prune(parent, left, second)(TOKENS), at_once(TOKENS))
    assert at_once.get_submodule("layers.1.query").weight.shape == (4, 3)
    assert network(TOKENS).equal(model(TOKENS)), "the dense network stays"


def test_a_layer_that_is_taken_out_leaves_nothing(words: tuple[Words, Groups, GraphNetwork]) -> None:
    model, groups, network = words
    name = next(g.name for g in groups.groups if g.block == "layers.0")
    cut = prune(network, groups, {name: ()})
    shorter = Words().eval()
    shorter.load_state_dict(model.state_dict())
    shorter.layers[0] = nn.Identity()
    torch.testing.assert_close(cut(TOKENS), shorter(TOKENS))
    assert not any(own.startswith("layers.0") for own in cut.state_dict())
    ends = block_ends(network.graph, "layers.0.gate")
    assert ends is None, "nothing goes through a linear layer"
    with pytest.raises(ValueError, match=r"nothing goes through 'layers.0.gate'"):
        bypass(network, "layers.0.gate")


def test_the_reference_is_the_dense_network_without_the_weights_that_make_and_read_a_unit(
    words: tuple[Words, Groups, GraphNetwork],
) -> None:
    model = words[0]
    traced = trace(model, TOKENS[:2])
    plan: Plan = {"layers.0.gate": tuple(range(5, 24)), "layers.1.query": (0,)}
    by_hand = Words().eval()
    by_hand.load_state_dict(model.state_dict())
    with torch.no_grad():
        by_hand.get_submodule("layers.0.down").weight[:, :5] = 0  # type: ignore[operator]
        by_hand.get_submodule("layers.1.out").weight[8:] = 0  # type: ignore[operator]
    ignoring = run_ignoring(traced.network, traced, plan, (TOKENS,))
    torch.testing.assert_close(ignoring, by_hand(TOKENS))
    assert not torch.allclose(ignoring, model(TOKENS))


class Chunked(nn.Module):
    """Attention that divides queries, keys and values one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 16)
        self.spare = nn.Linear(16, 4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        n, places, width = x.shape
        query, key, value = (each.view(n, places, 4, 4).transpose(1, 2) for each in self.qkv(x).chunk(3, 2))
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).contiguous().view(n, places, width))
        if self.training and float(x.mean()) > 100:  # what depends on values cannot be exported
            x = self.spare(x).repeat(1, 1, 4)
        y: Tensor = self.head(x.mean(1))
        return y


def test_units_of_several_kinds_are_several_groups() -> None:
    torch.manual_seed(0)
    model = Chunked().eval()
    images = torch.randn(2, 3, 16, 16)
    groups = find_groups(model, images)
    sizes = {g.name: g.size for g in groups.prunable}
    assert sizes == {"embed": 16, "qkv": 4, "qkv/width": 4, "qkv/width2": 4}
    assert not groups.by_name["spare"].prunable
    assert groups.by_name["spare"].producers == (), "the graph does not run it"
    network = cuttable(model, groups, images)
    for criterion in ("l2", "fpgm"):
        recipe = uniform_recipe(groups, 0.9, 32, criterion, width=1)
        plan = make_plan(network, groups, recipe, None)
        assert all(plan[name] for name in sizes)
        assert prune(network, groups, plan)(images).shape == (2, 3)


class Everywhere(nn.Module):
    """Group normalisation, a buffer with a value for each channel, a split and a range of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 1)
        self.norm = nn.GroupNorm(2, 12)
        self.register_buffer("shift", torch.randn(12, 1, 1))
        self.second = nn.Conv2d(12, 10, 3, padding=1, padding_mode="reflect")
        self.third = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)) + self.shift)
        left, right = self.second(x).split([6, 4], 1)
        y: Tensor = self.third(torch.relu(right) + left[:, 1:5])
        return y


def test_sizes_follow_what_is_left() -> None:
    torch.manual_seed(0)
    model = Everywhere().eval()
    images = torch.randn(2, 3, 6, 6)
    groups = find_groups(model, images)
    assert groups.rewritten
    # The same places of both halves of the normalisation; channels 1 to 4 of the left part with those of the right.
    # Nothing reads channels 0 and 5, each of which is a kind of its own.
    assert {g.name: g.size for g in groups.prunable} == {"first": 6, "second": 4}
    network = cuttable(model, groups, images)
    torch.testing.assert_close(network(images), model(images))
    plan: Plan = {"first": (0, 1, 4, 5), "second": (0, 2, 3)}
    cut = prune(network, groups, plan)
    assert cut.get_submodule("norm").num_channels == 8
    assert cut.get_buffer("shift").shape == (8, 1, 1)
    assert sorted(value for own, value in vars(cut).items() if own.startswith("size_")) == [3, 4, 5]
    traced = trace(model, images)
    torch.testing.assert_close(cut(images), run_ignoring(traced.network, traced, plan, (images,)))
