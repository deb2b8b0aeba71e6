"""Masks of single weights: each score and each allocation against its definition, on numbers done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autoprune.compress import masks
from autoprune.errors import CompressionError


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_scores_of_single_weights_are_their_definitions() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    assert masks.magnitude_scores(weight).tolist() == [[1.0, 2.0], [3.0, 0.5]]
    # |w| * sqrt(E x^2), with E x^2 = 4 and 9.
    assert masks.activation_scores(weight, torch.tensor([[4.0, 9.0]])).tolist() == [[2.0, 6.0], [6.0, 1.5]]
    # Products of two batches, 1 and -3: their mean is -1, the mean of their squares 5.
    assert masks.taylor_scores(double(1.0 - 3.0), 2).tolist() == [1.0]
    assert masks.fisher_scores(double(1.0 + 9.0), 2).tolist() == [2.5]


def test_lamp_divides_a_square_by_the_squares_that_are_not_smaller() -> None:
    # Squares 4, 1, 9: rising 1 / 14, 4 / 13, 9 / 9.
    scores = masks.lamp_scores(torch.tensor([[2.0, -1.0, 3.0]]))
    torch.testing.assert_close(scores, torch.tensor([[4 / 13, 1 / 14, 1.0]], dtype=torch.float64))
    assert masks.lamp_scores(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_random_scores_depend_on_the_name_alone() -> None:
    weight = torch.zeros(4, 5)
    assert torch.equal(masks.random_scores("a", weight), masks.random_scores("a", weight + 1))
    assert not torch.equal(masks.random_scores("a", weight), masks.random_scores("b", weight))


@pytest.mark.parametrize(
    ("sparsity", "weights", "zeros"), [(0.5, 5, 3), (0.8, 27, 22), (0.29, 100, 29), (0.0, 9, 0)]
)
def test_a_share_becomes_the_nearest_number(sparsity: float, weights: int, zeros: int) -> None:
    assert masks.zero_count(sparsity, weights) == zeros


def test_of_equal_scores_the_lower_index_goes_first() -> None:
    assert masks.lowest(torch.ones(2, 3), 2).tolist() == [[False, False, True], [True, True, True]]
    assert masks.lowest(double(3.0, 1.0, 2.0), 2).tolist() == [True, False, False]


def test_rows_are_compared_by_themselves_and_the_total_is_exact() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [30.0, 20.0, 10.0]])
    assert masks.lowest_by_row(scores, 2).tolist() == [[False, True, True], [True, True, False]]
    for zeros in range(22):
        kept = masks.lowest_by_row(torch.rand(7, 3), zeros)
        lost = (~kept).sum(1)
        assert int(lost.sum()) == zeros
        assert int(lost.max() - lost.min()) <= 1


def test_one_threshold_on_all_layers() -> None:
    scores = [double(0.1, 0.2, 5.0), double(0.15, 4.0)]
    assert masks.global_counts(scores, 3) == [2, 1]
    # A tie goes to the earlier layer.
    assert masks.global_counts([double(1.0, 1.0), double(1.0, 1.0)], 3) == [2, 1]


def test_erk_keeps_in_proportion_to_the_dimensions() -> None:
    # 10 x 10 and 10 x 40 keep 20 and 50 units; 140 of 500 stay, so a unit is 2.
    assert masks.erk_counts([(10, 10), (10, 40)], 360) == [60, 300]
    # 8 + 4 + 3 + 3 = 18 dimensions of a convolution against 20 of a matrix: 76 stay, 2 a unit.
    assert masks.erk_counts([(8, 4, 3, 3), (10, 10)], 388 - 76) == [288 - 36, 100 - 40]


def test_erk_leaves_a_layer_dense_rather_than_more_than_whole() -> None:
    # At 250 of 500 kept a unit would be 3.57 and the tiny layer (2 x 2, 4 units) larger than it is.
    counts = masks.erk_counts([(2, 2), (10, 10), (10, 40)], 200)
    assert counts[0] == 0
    assert sum(counts) == 200
    kept = [100 - counts[1], 400 - counts[2]]
    assert kept[0] == 86 and kept[1] == 214  # 300 in the proportion 20 : 50
    assert masks.erk_counts([(3, 3)], 0) == [0]


def test_blocks_lie_along_the_inputs_at_each_place_of_a_kernel() -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0, 1.0, 1.0, 1.0, 2.0]])
    assert masks.block_mask(scores, 2, 4).tolist() == [[True, False, True, False, False, False, True, True]]
    kernel = torch.stack([scores, -scores], dim=-1)  # (1, 8, 2): the second place ranks the other way round
    mask = masks.block_mask(kernel, 1, 4)
    assert mask[0, :, 0].nonzero().flatten().tolist() == [0, 7]
    assert mask[0, :, 1].nonzero().flatten().tolist() == [1, 6]


def test_inputs_that_fill_no_block_keep_as_many_as_a_block() -> None:
    mask = masks.block_mask(
        torch.tensor([[1.0, 2.0, 3.0, 4.0, 1.0, 3.0, 2.0], [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]), 2, 4
    )
    assert mask.int().tolist() == [[0, 0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0]]
    assert bool(masks.block_mask(torch.rand(5, 1, 3, 3), 2, 4).all())  # one input of one: nothing to remove


def test_a_dead_layer_and_scores_that_rank_nothing_are_named() -> None:
    with pytest.raises(CompressionError, match="none of the 4 weights of layer 'conv9'"):
        masks.check_mask("conv9", torch.zeros(4, dtype=torch.bool), "")
    with pytest.raises(CompressionError, match="'conv9', mask criterion 'fisher': a score is not finite"):
        masks.check_scores("conv9", "fisher", double(1.0, math.nan))


def test_one_weight_of_every_layer_stays() -> None:
    assert masks.zero_count(0.9, 3) == 2
    # All of the second layer ranks below the first.
    assert masks.global_counts([torch.tensor([5.0, 6.0, 7.0]), torch.tensor([1.0, 2.0])], 3) == [2, 1]
