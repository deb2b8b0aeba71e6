"""Groups: what they are made of, what is left without blocks, and the counts that they may keep."""

from __future__ import annotations

import pytest

from autoprune.space.groups import Axis, Group, Groups, LayerKind, Member, count_step, is_inside, kept_count


def member(layer: str, kind: LayerKind, axis: Axis, *, dim: int = 0, own: bool = True) -> Member:
    return Member(layer=layer, kind=kind, axis=axis, index_map=((0,), (1,)), dim=dim, own=own)


MEMBERS = (
    member("block1.conv", "conv", "out"),
    member("block1.dw", "depthwise", "out"),
    member("block1.bn", "norm", "out"),
    member("block1.heads", "linear", "out", own=False),
    member("token", "parameter", "out", dim=2),
    member("head.fc", "linear", "in"),
    member("head.conv", "conv", "in"),
    member("head.bn", "norm", "in"),
)


def group(name: str, members: tuple[Member, ...] = MEMBERS, block: str = "", prunable: bool = True) -> Group:
    return Group(name=name, type="conv", size=2, members=members, prunable=prunable, block=block)


def test_layers_make_channels_or_read_them() -> None:
    assert group("g").producers == ("block1.conv", "block1.dw")
    assert group("g").consumers == ("head.fc", "head.conv")
    assert [m.side for m in MEMBERS[3:6]] == ["out", 2, "in"]


def test_without_a_block_its_layers_are_gone_and_so_is_a_group_of_none() -> None:
    inner = group(
        "inner", (member("block1.conv", "conv", "out"), member("head.fc", "linear", "in")), "block1"
    )
    outer = group("outer")
    groups = Groups(groups=(inner, outer), input_shape=(3, 8, 8), rewritten=True)
    assert groups.by_name["inner"] is groups.groups[0]
    assert groups.without(()) is groups
    left = groups.without(["block1"])
    # Nothing of the first makes channels any more; of the second a parameter does.
    assert set(left.by_name) == {"outer"}
    assert [m.layer for m in left.groups[0].members] == ["token", "head.fc", "head.conv", "head.bn"]
    assert (left.input_shape, left.rewritten) == ((3, 8, 8), True)
    assert set(groups.by_name) == {"inner", "outer"}


def test_a_block_is_gone_only_where_nothing_of_its_group_is_kept() -> None:
    groups = Groups(groups=(group("a", block="one"), group("b"), group("c", block="two")), input_shape=(3,))
    assert groups.removed_blocks({}) == ()
    assert groups.removed_blocks({"a": 0, "b": 0, "c": 1}) == ("one",)
    assert groups.removed_blocks({"a": 0, "c": 0}) == ("one", "two")


def test_only_groups_whose_surgery_was_verified_are_prunable() -> None:
    groups = Groups(groups=(group("a"), group("b", prunable=False)), input_shape=(3,))
    assert [g.name for g in groups.prunable] == ["a"]


def test_a_layer_is_inside_of_a_block_by_its_whole_name() -> None:
    assert is_inside("layer1.0.conv", ["layer2", "layer1.0"])
    assert not is_inside("layer1.0.conv", ["layer1.0.co", "ayer1", "layer1.0.conv"])


def test_steps_are_halved_until_four_fit() -> None:
    assert [count_step(size, 8) for size in (64, 32, 31, 16, 15, 8, 7, 4, 3, 1)] == [
        8,
        8,
        4,
        4,
        2,
        2,
        1,
        1,
        1,
        1,
    ]
    assert count_step(16, 6) == 3


@pytest.mark.parametrize(
    ("size", "ratio", "width", "kept"),
    [
        (64, 0.5, 8, 32),
        # 64 x 0.7 = 44.8: nearer to 48 than to 40.
        (64, 0.3, 8, 48),
        (64, 0.32, 8, 40),
        # 36 lies between 32 and 40: the smaller one.
        (64, 0.4375, 8, 32),
        # Something goes always, and never everything.
        (64, 0.001, 8, 56),
        (64, 0.999, 8, 8),
        # 60 is 7 steps and a half: the largest cut count below it is 56.
        (60, 0.01, 8, 56),
        (57, 0.001, 8, 56),
        # A group of two has the step 1.
        (2, 0.01, 8, 1),
        (2, 0.99, 8, 1),
        (3, 0.01, 8, 2),
        (1, 0.9, 8, 1),
        (1, 1.0, 8, 0),
        (64, 1.0, 8, 0),
        (64, 0.0, 8, 64),
        (10, 0.5, 1, 5),
        (10, 0.26, 1, 7),
    ],
)
def test_kept_counts_are_the_nearest_steps(size: int, ratio: float, width: int, kept: int) -> None:
    assert kept_count(size, ratio, width) == kept
