"""Groups of small networks whose couplings are known, and what happens when discovery goes wrong."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from autoprune.compress import verification
from autoprune.compress.discovery import find_groups
from autoprune.compress.graph import find
from autoprune.space.groups import Groups
from autoprune.workloads.cifar_resnet import cifar_resnet
from tests.compress.networks import Mixed, OptionA, Plain

EXAMPLE = torch.randn(2, 3, 8, 8)


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def check_every_layer_once(model: nn.Module, groups: Groups) -> None:
    assert sorted(name for g in groups.groups for name in g.producers) == sorted(layers_of(model))
    order = layers_of(model)
    assert [g.name for g in groups.groups] == sorted((g.name for g in groups.groups), key=order.index)


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


def test_option_a_shortcut_is_left_alone_by_name() -> None:
    model = OptionA()
    groups = find_groups(model, EXAMPLE)
    check_every_layer_once(model, groups)
    assert [g.name for g in groups.prunable] == ["conv1"]
    assert "padding" in groups.by_name["stem"].reason


def test_cifar_resnet_prunes_the_inner_channels_of_every_block() -> None:
    model = cifar_resnet("cifar_resnet20")
    groups = find_groups(model, torch.randn(2, 3, 32, 32))
    check_every_layer_once(model, groups)
    assert [g.name for g in groups.prunable] == [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in (0, 1, 2)]
    assert all(g.reason for g in groups.groups if not g.prunable)


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


def test_a_fixed_size_in_the_forward_pass_is_named_with_its_error() -> None:
    groups = find_groups(FixedSize(), EXAMPLE)
    assert [g.name for g in groups.prunable] == ["second"]
    assert groups.by_name["first"].reason.startswith("cut, layer 'second' fails: RuntimeError: ")


class MeanOverChannels(nn.Module):
    """Divides by the number of channels, so that cutting some is not the same as ignoring them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.second = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.second(x - x.mean(1, keepdim=True))
        return y


def test_a_wrong_result_without_an_error_is_found() -> None:
    groups = find_groups(MeanOverChannels(), EXAMPLE)
    assert not groups.by_name["first"].prunable
    assert "differs by" in groups.by_name["first"].reason


class SharedWeight(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(
            torch.relu(self.second(torch.relu(self.first(x.mean((2, 3)).repeat(1, 2)[:, :4]))))
        )
        return y


def test_shared_parameters_are_left_alone() -> None:
    groups = find_groups(SharedWeight(), EXAMPLE)
    assert not groups.by_name["first"].prunable
    assert "share" in groups.by_name["first"].reason


def test_attention_is_left_alone_and_what_follows_is_cut() -> None:
    class Attention(nn.Module):
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

    groups = find_groups(Attention(), EXAMPLE)
    assert [g.name for g in groups.prunable] == ["up"]
    assert "MultiheadAttention 'attention'" in groups.by_name["embed"].reason
    assert groups.by_name["embed"].producers == ("embed", "attention.out_proj", "down")


def test_a_hang_ends_in_time_with_everything_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "trace_groups", lambda *_: time.sleep(600))
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

    monkeypatch.setattr(find, "trace_groups", fail)
    groups = find_groups(Plain(), EXAMPLE)
    assert {g.reason for g in groups.groups} == {"the search for groups failed: ZeroDivisionError: by zero"}


def test_a_crash_of_the_child_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr(find, "trace_groups", lambda *_: os._exit(9))
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
