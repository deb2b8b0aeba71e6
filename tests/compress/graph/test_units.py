"""Units and dimensions on arrays small enough to check by hand."""

from __future__ import annotations

import numpy as np

from autoprune.compress.graph.dims import broadcast, divided, reshaped, tie
from autoprune.compress.graph.units import Units, fixed, flat, merged


def classes(units: Units, *dims: np.ndarray) -> list[list[tuple[int, ...]]]:
    """Return resolved dimensions with units renumbered in the order in which they come."""
    numbers: dict[int, int] = {0: 0}
    return [
        [
            tuple(numbers.setdefault(unit, len(numbers)) for unit in row)
            for row in units.resolved(dim).tolist()
        ]
        for dim in dims
    ]


def test_joined_units_are_one_however_they_are_joined() -> None:
    units = Units()
    a, b, c = units.new(4), units.new(4), units.new(4)
    units.join(b, c, "first")
    units.join(a, c, "second")
    assert np.array_equal(units.find(a), units.find(b))
    units.join(a[:2], np.array([a[2], a[2]]), "third")
    assert len(set(units.find(c).tolist())) == 2


def test_what_is_joined_with_what_stays_has_to_stay_and_says_why() -> None:
    units = Units()
    a, b = units.new(3), units.new(3)
    tie(units, flat(a), fixed(3), "the output")
    tie(units, flat(b), flat(a), "an addition")
    assert {units.reason(int(u)) for u in b} == {"the output"}
    assert units.reason(int(units.new(1)[0])) == ""


def test_a_division_makes_heads_and_places() -> None:
    units = Units()
    channels = flat(units.new(6))
    heads, places = divided(units, channels, (2, 3), "view")
    assert classes(units, channels, heads, places) == [
        [(1, 2), (1, 3), (1, 4), (5, 2), (5, 3), (5, 4)],
        [(1,), (5,)],
        [(2,), (3,), (4,)],
    ]
    # Back again it is the same dimension.
    assert classes(units, channels) == classes(units, merged([heads, places]))
    units.fix(heads, "they are counted")
    assert units.reason(int(units.resolved(channels)[0, 0])) == "they are counted"
    assert units.reason(int(units.resolved(channels)[0, 1])) == ""


def test_a_flat_dimension_takes_the_shape_of_what_it_is_tied_to() -> None:
    units = Units()
    one, two = flat(units.new(6)), flat(units.new(6))
    heads, places = divided(units, one, (2, 3), "view")
    tie(units, merged([heads, places]), two, "addition")
    assert classes(units, one) == classes(units, two)
    # Two divisions of one kind are one division; of another kind they are not followed.
    tie(units, two, merged(divided(units, flat(units.new(6)), (2, 3), "view")), "addition")
    assert units.reason(int(units.resolved(one)[0, 0])) == ""
    tie(units, two, merged(divided(units, flat(units.new(6)), (3, 2), "view")), "a product")
    assert "a product" in units.reason(int(units.resolved(one)[0, 0]))


def test_shuffled_channels_are_tied_ever_more() -> None:
    units = Units()
    channels = flat(units.new(8))
    outer, inner = divided(units, channels, (2, 4), "view")
    shuffled = merged([inner, outer])
    assert units.reason(int(units.resolved(channels)[0, 0])) == ""
    divided(units, shuffled[:4], (2, 2), "again")
    assert classes(units, shuffled[:4])
    other = np.concatenate([shuffled[:4], np.pad(flat(units.new(4)), ((0, 0), (0, 1)))])
    divided(units, other, (2, 4), "once more")
    assert units.resolved(other).shape[0] == 8
    assert len({tuple(row) for row in units.resolved(channels).tolist()}) == 4


def test_reshapes_leave_what_they_do_not_touch() -> None:
    units = Units()
    channels = flat(units.new(4))
    x = [fixed(2), channels, fixed(3), fixed(3)]
    assert [d.shape for d in reshaped(units, x, (2, 4, 9), "view")] == [(2, 0), (4, 1), (9, 0)]
    flattened = reshaped(units, x, (2, 36), "flatten")[1]
    assert np.array_equal(flattened[:, 0], np.repeat(channels[:, 0], 9))
    back = reshaped(units, [fixed(2), flattened], (2, 4, 3, 3), "view")
    assert [d.shape for d in back] == [(2, 0), (4, 1), (3, 0), (3, 0)]
    assert np.array_equal(back[1], units.resolved(channels))
    assert [len(d) for d in reshaped(units, x, (1, 2, 4, 1, 9, 1), "view")] == [1, 2, 4, 1, 9, 1]


def test_what_is_spread_over_others_has_to_stay() -> None:
    units = Units()
    one, many = units.new(1), units.new(5)
    found = broadcast(units, [[flat(one)], [fixed(2), flat(many)]], "an addition")
    assert [len(d) for d in found] == [2, 5]
    assert units.reason(int(one[0])) == "an addition spreads it"
    assert units.reason(int(many[0])) == ""
