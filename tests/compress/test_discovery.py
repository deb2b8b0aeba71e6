"""Groups of small networks whose couplings are known, and what happens when discovery goes wrong."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx, nn

from autoprune.compress import verification
from autoprune.compress.discovery import cuttable, find_groups
from autoprune.compress.graph import find
from autoprune.compress.graph.propagate import Propagation
from autoprune.compress.graph.shape_rules import SHAPE_RULES
from autoprune.compress.layers import channel_count
from autoprune.compress.surgery import prune
from autoprune.space.groups import Groups
from autoprune.workloads.cifar_resnet import cifar_resnet
from tests.compress.networks import Mixed, OptionA, Plain

EXAMPLE = torch.randn(2, 3, 8, 8)


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def check_every_layer_once(model: nn.Module, groups: Groups) -> None:
    assert sorted(name for g in groups.groups for name in g.producers) == sorted(layers_of(model))
    order = layers_of(model)
    names = [g.name.partition("/")[0] for g in groups.groups]
    assert names == sorted(names, key=order.index)


def test_plain_network() -> None:
    model = Plain()
    groups = find_groups(model, EXAMPLE)
    check_every_layer_once(model, groups)
    assert groups.input_shape == (3, 8, 8)
    assert [g.name for g in groups.prunable] == ["conv1", "conv2", "fc1"]
    conv2 = groups.by_name["conv2"]
    assert (conv2.size, conv2.type, conv2.producers, conv2.consumers) == (8, "conv", ("conv2",), ("fc1",))
    read = next(m for m in conv2.members if m.layer == "fc1")
    assert read.index_map[1] == tuple(range(16, 32)), "a channel owns its 16 places in the flattened input"
    assert groups.by_name["fc1"].type == "linear"
    assert groups.by_name["fc2"].reason == "its channels are the network's output"


def test_discovery_leaves_the_model_alone() -> None:
    model = Plain().train()
    model.conv1.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_groups(model, EXAMPLE)
    assert model.training and not model.conv1.weight.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_concatenated_grouped_depthwise_reused_and_unused_layers() -> None:
    model = Mixed()
    groups = find_groups(model, EXAMPLE)
    check_every_layer_once(model, groups)
    # The grouped convolution has 4 groups of 3 inputs: 3 places, each tied over all groups, which ties left and right.
    first = groups.by_name["left"]
    assert first.producers == ("left", "right", "depthwise")
    assert (first.size, first.prunable) == (3, True)
    left = next(m for m in first.members if m.layer == "left")
    assert left.index_map == ((0, 3, 6), (1, 4, 7), (2, 5))
    # A layer that feeds itself is cut on both sides alike.
    second = groups.by_name["grouped"]
    assert second.producers == ("grouped", "twice")
    assert second.consumers == ("twice", "head")
    assert second.prunable
    assert not groups.by_name["unused"].prunable
    assert "does not use it" in groups.by_name["unused"].reason


def test_the_padding_of_an_option_a_shortcut_is_cut_with_its_channels() -> None:
    model = OptionA()
    groups = find_groups(model, EXAMPLE)
    check_every_layer_once(model, groups)
    assert groups.rewritten
    # The stem's channels go on through the block; those that padding adds are made by its second layer alone.
    assert {g.name: g.size for g in groups.prunable} == {
        "stem": 8,
        "conv1": 16,
        "conv2/part": 4,
        "conv2/part2": 4,
    }
    assert groups.by_name["stem"].producers == ("stem", "conv2")
    sizes = {
        m.layer: name for name in ("conv2/part", "conv2/part2") for m in groups.by_name[name].members
        if m.kind == "size"
    }  # fmt: skip
    network = cuttable(model, groups, EXAMPLE)
    assert [getattr(network, size) for size in sizes] == [4, 4]
    cut = prune(network, groups, {"stem": tuple(range(1, 8)), "conv2/part": (2, 3), "conv2/part2": (0, 1, 3)})
    assert channel_count(cut.get_submodule("stem"), "out") == 7
    assert channel_count(cut.get_submodule("conv2"), "out") == 12
    assert [getattr(cut, size) for size in sizes] == [2, 3]


def test_cifar_resnet_is_cut_everywhere() -> None:
    model = cifar_resnet("cifar_resnet20")
    groups = find_groups(model, torch.randn(2, 3, 32, 32))
    check_every_layer_once(model, groups)
    inner = [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in (0, 1, 2)]
    # The residual stream of each stage is that of the one before, and what padding adds before and after it.
    streams = {"conv1": 16}
    streams |= {f"layer{s}.0.conv2/part{n}": 4 * 2**s // 2 for s in (2, 3) for n in ("", "2")}
    assert {g.name: g.size for g in groups.prunable if g.name not in inner} == streams
    assert set(inner) <= {g.name for g in groups.prunable}


class FixedSize(nn.Module):
    """A forward pass that holds a number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.second = nn.Conv2d(6, 6, 1)
        self.third = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.second(x.view(-1, 6, 8, 8))
        y: Tensor = self.third(torch.relu(x))
        return y


def test_a_fixed_size_in_the_forward_pass_is_a_member() -> None:
    model = FixedSize()
    groups = find_groups(model, EXAMPLE)
    assert groups.rewritten
    assert [g.name for g in groups.prunable] == ["first", "second"]
    assert [m.kind for m in groups.by_name["first"].members] == ["size", "conv", "conv"]
    network = cuttable(model, groups, EXAMPLE)
    cut = prune(network, groups, {"first": (1, 4)})
    assert cut(torch.randn(5, 3, 8, 8)).shape == (5, 4, 8, 8)
    assert network(EXAMPLE).equal(model(EXAMPLE))


class HeldBatch(FixedSize):
    """A forward pass that holds the number of examples too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).view(2, 6, 8, 8))
        y: Tensor = self.third(torch.relu(x))
        return y


def test_a_number_of_examples_in_the_code_is_the_reason() -> None:
    groups = find_groups(HeldBatch(), EXAMPLE)
    assert not groups.rewritten
    assert [g.name for g in groups.prunable] == ["second"]
    assert "number of examples" in groups.by_name["first"].reason


class MeanOverChannels(nn.Module):
    """Divides by the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.second = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.second(x - x.mean(1, keepdim=True))
        return y


def test_a_mean_over_channels_is_that_of_what_is_left() -> None:
    groups = find_groups(MeanOverChannels(), EXAMPLE)
    assert groups.by_name["first"].prunable


def test_a_wrong_result_without_an_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(p: Propagation, node: fx.Node) -> object:
        """Take a reversal of channels for nothing."""
        return p.of[node.all_input_nodes[0]]

    class Flipped(MeanOverChannels):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x).flip(1))
            return y

    assert find_groups(Flipped(), EXAMPLE).by_name["first"].prunable
    monkeypatch.setitem(SHAPE_RULES, "aten.flip.default", wrong)
    groups = find_groups(Flipped(), EXAMPLE)
    assert not groups.by_name["first"].prunable
    assert "differs by" in groups.by_name["first"].reason


class Tied(nn.Module):
    """A language model whose head reads the very weights of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        y: Tensor = self.head(x + self.down(torch.relu(self.up(x))))
        return y


def test_what_shares_a_weight_is_cut_together_and_shares_it_afterwards() -> None:
    model = Tied()
    tokens = torch.arange(10).reshape(2, 5)
    groups = find_groups(model, tokens)
    assert [(g.name, g.size) for g in groups.prunable] == [("up", 16), ("down", 8)]
    assert not groups.by_name["head"].prunable
    cut = prune(model, groups, {"down": (0, 2, 5)})
    assert cut.get_submodule("head").weight is cut.get_submodule("table").weight
    assert cut(tokens).shape == (2, 5, 11)


class Attention(nn.Module):
    """A transformer's layer on the pixels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(torch.relu(self.up(x)))
        y: Tensor = self.head(x.mean(1))
        return y


def test_attention_is_cut_by_heads_by_their_width_and_by_the_embedding() -> None:
    model = Attention().eval()
    groups = find_groups(model, EXAMPLE)
    assert groups.rewritten
    assert {g.name: g.size for g in groups.prunable} == {
        "embed": 8,
        "attention.in_proj": 2,
        "attention.in_proj/width": 4,
        "up": 16,
    }
    assert groups.by_name["embed"].producers == ("embed", "attention.out_proj", "down")
    heads, widths = groups.by_name["attention.in_proj"], groups.by_name["attention.in_proj/width"]
    assert heads.producers == ("attention.in_proj",)
    assert widths.producers == (), "bits belong to the heads"
    made = next(m for m in heads.members if m.layer == "attention.in_proj" and m.axis == "out")
    assert made.index_map[1] == (4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23), "queries, keys and values"
    network = cuttable(model, groups, EXAMPLE)
    torch.testing.assert_close(network(EXAMPLE), model(EXAMPLE))
    plan = {"attention.in_proj": (1,), "attention.in_proj/width": (0, 3), "embed": (0, 1, 2, 4, 6, 7)}
    cut = prune(network, groups, plan)
    assert cut.get_submodule("attention.in_proj").weight.shape == (3 * 1 * 2, 6)
    assert cut.get_submodule("attention.out_proj").weight.shape == (6, 2)
    assert cut(torch.randn(5, 3, 8, 8)).shape == (5, 2)


def test_a_hang_ends_in_time_with_everything_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "trace", lambda *_: time.sleep(600))
    begun = time.monotonic()
    model = Plain()
    groups = find_groups(model, EXAMPLE, time_limit_s=0.5)
    assert time.monotonic() - begun < 5
    check_every_layer_once(model, groups)
    assert not groups.prunable
    assert all("more than 0.5 s" in g.reason for g in groups.groups)


def test_a_hang_while_proving_keeps_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification._Checker, "fault", lambda *_: time.sleep(600))
    groups = find_groups(Plain(), EXAMPLE, time_limit_s=2)
    assert not groups.prunable
    assert groups.by_name["conv1"].consumers == ("conv2",)
    assert "not proved" in groups.by_name["conv1"].reason


def test_a_failure_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(find, "trace", fail)
    groups = find_groups(Plain(), EXAMPLE)
    assert {g.reason for g in groups.groups} == {"the search for groups failed: ZeroDivisionError: by zero"}


def test_a_crash_of_the_child_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr(find, "trace", lambda *_: os._exit(9))
    groups = find_groups(Plain(), EXAMPLE)
    assert all("exit code 9" in g.reason for g in groups.groups)


def test_faulty_groups_are_told_from_sound_ones() -> None:
    calls: list[tuple[str, ...]] = []

    def fault(names: Sequence[str]) -> str:
        listed = tuple(names)
        calls.append(listed)
        return "bad" if {"b", "g"} & set(listed) else ""

    verdicts = dict(verification._bisect(list("abcdefgh"), fault))
    assert {name for name, reason in verdicts.items() if reason} == {"b", "g"}
    assert len(calls) < 2 * 8


def test_what_is_not_examined_in_time_is_left_alone() -> None:
    over = iter([False, False, True, True])
    verdicts = dict(
        verification._bisect(list("abc"), lambda names: "bad" if len(names) > 1 else "", lambda: next(over))
    )
    assert verdicts["a"] == ""
    assert verdicts["b"] == verdicts["c"] == "surgery was not proved in time"


def test_groups_that_fail_only_together_are_told() -> None:
    verdicts = dict(
        verification._jointly(list("abc"), lambda names: "clash" if {"a", "c"} <= set(names) else "")
    )
    assert verdicts["a"] == "" and verdicts["b"] == ""
    assert "together with other groups: clash" in verdicts["c"]
