"""Shapes of layers against hand-counted shares."""

from __future__ import annotations

import pytest

from autoprune.space.shapes import AxisUse, LayerShape

# 3 x 3 convolution from 8 to 16 channels at 5 x 5 places.
CONV = LayerShape(
    name="conv",
    group="made",
    weights=16 * 8 * 9,
    outputs=16,
    inputs=8,
    makes=(AxisUse(group="made", share=1 / 16, units=16),),
    reads=(AxisUse(group="read", share=1 / 8, units=8),),
    read_elements=8 * 49,
    places=25,
)


def test_a_layer_costs_what_its_two_sides_keep() -> None:
    dense = 25 * 16 * 8 * 9
    assert CONV.macs({}) == pytest.approx(dense)
    assert CONV.macs({"made": 4}) == pytest.approx(dense / 4)
    assert CONV.macs({"made": 4, "read": 6}) == pytest.approx(dense / 4 * 6 / 8)
    assert CONV.macs({"other": 1}) == pytest.approx(dense)
    assert (CONV.output_share({"made": 4}), CONV.input_share({"made": 4})) == (0.25, 1.0)


def test_without_recorded_places_the_inputs_places_are_taken() -> None:
    unknown = CONV.model_copy(update={"places": 0})
    assert unknown.macs({}) == pytest.approx(49 * 16 * 8 * 9)
    # A layer whose input is smaller than its channels is used once.
    assert unknown.model_copy(update={"read_elements": 7}).macs({}) == pytest.approx(16 * 8 * 9)
    # As is one for each place where it was recorded.
    assert CONV.model_copy(update={"places": 1}).macs({}) == pytest.approx(16 * 8 * 9)


def test_a_layer_that_reads_no_group_has_all_of_its_inputs() -> None:
    first = CONV.model_copy(update={"reads": ()})
    assert first.macs({"made": 8, "read": 2}) == pytest.approx(25 * 16 * 8 * 9 / 2)


def test_channels_of_several_groups_add_up() -> None:
    # Six of eight inputs are of one group, two of another: a concatenation.
    both = CONV.model_copy(
        update={
            "reads": (
                AxisUse(group="six", share=1 / 8, units=6),
                AxisUse(group="two", share=1 / 8, units=2),
            )
        }
    )
    assert both.input_share({}) == pytest.approx(1.0)
    assert both.input_share({"six": 3}) == pytest.approx(5 / 8)
    assert both.input_share({"six": 3, "two": 1}) == pytest.approx(4 / 8)
    # Inputs that belong to no group stay.
    some = CONV.model_copy(update={"reads": (AxisUse(group="six", share=1 / 8, units=6),)})
    assert some.input_share({"six": 0}) == pytest.approx(2 / 8)


@pytest.mark.parametrize("part", [0, 2])
def test_groups_that_divide_one_part_multiply(part: int) -> None:
    # Four heads of three places each: 12 channels.
    heads = AxisUse(group="heads", share=3 / 12, units=4, part=part)
    width = AxisUse(group="width", share=4 / 12, units=3, part=part)
    layer = CONV.model_copy(update={"makes": (heads, width)})
    assert layer.output_share({}) == pytest.approx(1.0)
    assert layer.output_share({"heads": 2}) == pytest.approx(1 / 2)
    assert layer.output_share({"width": 2}) == pytest.approx(2 / 3)
    assert layer.output_share({"heads": 2, "width": 2}) == pytest.approx(1 / 3)
    # Beside another part of the axis each keeps its own place.
    half = CONV.model_copy(
        update={
            "makes": (
                AxisUse(group="heads", share=3 / 24, units=4, part=part),
                AxisUse(group="width", share=4 / 24, units=3, part=part),
                AxisUse(group="rest", share=1 / 24, units=12),
            )
        }
    )
    assert half.output_share({"heads": 2, "width": 2, "rest": 3}) == pytest.approx(1 / 6 + 3 / 24)


def test_a_part_is_as_large_as_the_largest_group_says() -> None:
    uses = [
        AxisUse(group="all", share=1 / 8, units=8, part=0),
        AxisUse(group="some", share=1 / 8, units=4, part=0),
    ]
    for order in (uses, uses[::-1]):
        layer = CONV.model_copy(update={"reads": tuple(order)})
        assert layer.input_share({"some": 2}) == pytest.approx(0.5)


def test_what_comes_in_another_type_is_counted_as_a_share_of_the_dense_inputs() -> None:
    both = CONV.model_copy(
        update={
            "reads": (
                AxisUse(group="six", share=1 / 8, units=6),
                AxisUse(group="two", share=1 / 8, units=2),
            )
        }
    )
    assert both.converted_share({}, {"six": 8, "two": 8}, 8) == 0
    assert both.converted_share({}, {"six": 4, "two": 6}, 8) == 0
    assert both.converted_share({}, {"six": 8}, 8) == pytest.approx(2 / 8)
    assert both.converted_share({}, {"six": 8}, 32) == pytest.approx(6 / 8)
    assert both.converted_share({}, {"six": 16, "two": 8}, 32) == pytest.approx(2 / 8)
    assert both.converted_share({}, {}, 8) == pytest.approx(1.0)
    assert both.converted_share({"two": 1}, {"six": 8}, 8) == pytest.approx(1 / 8)
    # A group whose bits are no layer's says nothing.
    silent = CONV.model_copy(update={"reads": (AxisUse(group="w", share=1 / 8, units=8, sets_bits=False),)})
    assert silent.converted_share({}, {}, 8) == 0


def test_two_groups_of_one_part_are_converted_once() -> None:
    layer = CONV.model_copy(
        update={
            "reads": (
                AxisUse(group="heads", share=3 / 12, units=4, part=0),
                AxisUse(group="width", share=4 / 12, units=3, part=0),
            )
        }
    )
    assert layer.converted_share({"heads": 2}, {}, 8) == pytest.approx(1 / 2)


def test_a_layer_goes_with_its_block_alone() -> None:
    inside = CONV.model_copy(update={"block": "whole"})
    assert [inside.is_gone(counts) for counts in ({}, {"whole": 1}, {"whole": 0}, {"made": 0})] == [
        False,
        False,
        True,
        False,
    ]
    assert inside.macs({"whole": 0}) == 0
    assert not CONV.is_gone({"": 0})
