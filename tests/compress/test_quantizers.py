"""Grids and roundings against their definitions, on matrices small enough to be checked by hand or by search."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from autoprune.compress import quantizers
from autoprune.compress.quantizers import adaptive, gptq, largest_code, nearest, output_error, scales
from autoprune.errors import CompressionError
from autoprune.space.quantization import SCALE_METHODS, ScaleMethod


def inputs(features: int, seed: int = 0) -> Tensor:
    """Correlated inputs, as behind a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(500, features, generator=generator) @ torch.randn(
        features, features, generator=generator
    )
    return mixed.relu()


def gram_of(x: Tensor) -> Tensor:
    return (x.T @ x / len(x)).double()


def weights(out: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(out, features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "top"), [(2, 1), (3, 3), (4, 7), (5, 15), (6, 31), (8, 127)])
def test_a_grid_is_symmetric(bits: int, top: int) -> None:
    assert largest_code(bits) == top
    rows = weights(3, 40)
    codes = nearest(rows, scales(rows, bits), bits)
    assert int(codes.abs().max()) == top
    assert torch.equal(codes, codes.round())
    # Largest magnitudes lie on the grid, all others within half a step.
    error = (codes * scales(rows, bits) - rows).abs()
    assert bool((error <= 0.5001 * scales(rows, bits)).all())


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_other_widths_have_no_integers(bits: int) -> None:
    with pytest.raises(CompressionError, match=f"{bits} bits is none of integers; allowed: 2 to 8"):
        largest_code(bits)


def test_scales_by_hand() -> None:
    rows = torch.tensor([[0.1, -0.2, 0.3, 4.0]])
    assert scales(rows, 4).item() == pytest.approx(4.0 / 7)
    # The quantile 2/3 of three gaps between 0.1, 0.2, 0.3 and 4 lies at 0.3.
    assert scales(rows, 4, "percentile", 200 / 3).item() == pytest.approx(0.3 / 7, rel=1e-4)
    assert scales(torch.zeros(1, 3), 4).item() > 0.0


def test_mse_finds_the_best_end_of_those_tried() -> None:
    rows = weights(4, 50)
    rows[0, 0] = 12.0
    found = scales(rows, 3, "mse")
    for row, step in zip(rows, found, strict=True):
        tried = [
            float((nearest(row[None], end, 3) * end - row).square().sum())
            for share in quantizers._ENDS
            for end in [row.abs().max().reshape(1, 1) * share / 3]
        ]
        own = float((nearest(row[None], step[None], 3) * step - row).square().sum())
        assert own == pytest.approx(min(tried), rel=1e-5)
    assert float(found[0]) < 12.0 / 3


def test_gptq_with_independent_inputs_is_rounding_to_the_nearest() -> None:
    rows = weights(5, 12)
    step = scales(rows, 4)
    assert torch.equal(gptq(rows, step, 4, torch.eye(12)), nearest(rows, step, 4))


def test_gptq_of_two_columns_by_hand() -> None:
    """Two inputs that are always equal: the second weight takes up what the first one's rounding lost."""
    rows = torch.tensor([[0.4, 0.4]])
    gram = torch.ones(2, 2, dtype=torch.float64)
    codes = gptq(rows, torch.tensor([[1.0]]), 4, gram)
    # 0.4 becomes 0; 0.4 + 0.4 becomes 1: the sum 0.8 becomes 1 and not 0.
    assert sorted(codes[0].tolist()) == [0.0, 1.0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", [gptq, adaptive])
def test_outputs_change_less_than_by_the_nearest(method: object, bits: int) -> None:
    rows, gram = weights(8, 40), gram_of(inputs(40))
    step = scales(rows, bits, "mse")
    assert callable(method)
    codes = method(rows, step, bits, gram)
    assert int(codes.abs().max()) <= largest_code(bits)
    assert torch.equal(codes, codes.round())
    plain = output_error((nearest(rows, step, bits) * step - rows).double(), gram).sum()
    assert float(output_error((codes * step - rows).double(), gram).sum()) < 0.8 * float(plain)


def test_blocks_of_columns_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, gram = weights(6, 30), gram_of(inputs(30))
    step = scales(rows, 4)
    whole = gptq(rows, step, 4, gram)
    monkeypatch.setattr(quantizers, "_BLOCK", 7)
    assert torch.equal(gptq(rows, step, 4, gram), whole)


def test_adaptive_finds_the_best_of_all_roundings_up_or_down() -> None:
    rows, gram = weights(6, 6, seed=3), gram_of(inputs(6, seed=1))
    step = scales(rows, 3)
    codes = adaptive(rows, step, 3, gram)
    hessian = quantizers._damped(gram, rows)
    below = (rows / step).floor()
    found = 0
    for row in range(len(rows)):
        every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)))
        changes = (below[row] + every).clamp(-3, 3) * step[row] - rows[row]
        errors = output_error(changes.double(), hessian).tolist()
        own = float(output_error((codes[row] * step[row] - rows[row])[None].double(), hessian))
        assert own <= 1.5 * min(errors)
        found += own <= 1.001 * min(errors)
    assert found >= 4  # of six rows, each among 64 roundings


def test_a_gram_matrix_of_another_layer_is_refused() -> None:
    rows = weights(2, 4)
    for method in (gptq, adaptive):
        with pytest.raises(CompressionError, match=r"shape \(3, 3\), the weights have 4 features"):
            method(rows, scales(rows, 4), 4, torch.eye(3))


def test_a_percentile_of_sparse_rows_is_one_of_what_is_left() -> None:
    rows = torch.zeros(1, 100)
    rows[0, :4] = torch.tensor([1.0, 2.1, 3.3, 4.7])
    assert scales(rows, 4, "percentile", 90.0).item() == pytest.approx(4.28 / 7, rel=1e-4)


def test_blocks_have_scales_of_their_own() -> None:
    rows = torch.tensor([[0.1, -0.7, 1.4, 0.2], [7.0, 0.0, 0.0, 0.0]])
    found = scales(rows, 4, blocks=2)
    torch.testing.assert_close(found, torch.tensor([[0.1, 0.2], [1.0, 1e-12]]))
    assert nearest(rows, found, 4).tolist() == [[1, -7, 7, 1], [7, 0, 0, 0]]
    with pytest.raises(CompressionError, match="4 features do not divide into 3 blocks"):
        scales(rows, 4, blocks=3)


@pytest.mark.parametrize("method", SCALE_METHODS)
def test_a_block_s_scale_is_that_of_its_weights_alone(method: ScaleMethod) -> None:
    rows = weights(5, 64)
    found = scales(rows, 3, method, 95.0, blocks=4)
    assert found.shape == (5, 4)
    own = 0
    for block, part in enumerate(rows.split(16, 1)):  # type: ignore[no-untyped-call]
        alone = scales(part, 3, method, 95.0)[:, 0]
        if method == "mse":  # the whole channel's step may be better still
            whole = scales(rows, 3, method)[:, 0]
            same = (found[:, block] - alone).abs() < 1e-7
            assert bool((same | ((found[:, block] - whole).abs() < 1e-7)).all())
            own += int(same.sum())
        else:
            torch.testing.assert_close(found[:, block], alone)
            own += len(alone)
    assert own >= 10  # of 20 blocks


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_blocks_are_never_worse_than_one_scale(bits: int, blocks: int) -> None:
    rows = weights(16, 128, seed=bits)
    rows[::2, 5] *= 20.0
    whole, own = scales(rows, bits, "mse"), scales(rows, bits, "mse", blocks=blocks)
    errors = [
        (nearest(rows, step, bits) * quantizers.spread_scales(step, 128) - rows).reshape(16, blocks, -1)
        for step in (whole, own)
    ]
    worst, best = (error.square().sum(2) for error in errors)
    assert bool((best <= worst * (1 + 1e-6)).all())
    assert float(best.sum()) < 0.9 * float(worst.sum())
    # Up to the largest magnitude no weight is off by more than half a step of its block, which is the smaller one.
    ends = scales(rows, bits, blocks=blocks)
    assert bool((ends <= scales(rows, bits) * (1 + 1e-6)).all())
    off = (nearest(rows, ends, bits) * quantizers.spread_scales(ends, 128) - rows).abs()
    assert bool((off <= 0.5001 * quantizers.spread_scales(ends, 128)).all())


def test_gptq_with_independent_inputs_is_rounding_to_the_nearest_in_blocks_too() -> None:
    rows = weights(5, 32)
    step = scales(rows, 4, blocks=2)
    assert torch.equal(gptq(rows, step, 4, torch.eye(32)), nearest(rows, step, 4))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", [gptq, adaptive])
def test_outputs_change_less_than_by_the_nearest_in_blocks_too(method: object, bits: int) -> None:
    rows, gram = weights(8, 64), gram_of(inputs(64))
    rows[:, :16] *= 5.0
    step = scales(rows, bits, "mse", blocks=4)
    assert callable(method)
    codes = method(rows, step, bits, gram)
    assert int(codes.abs().max()) <= largest_code(bits)
    assert torch.equal(codes, codes.round())
    wide = quantizers.spread_scales(step, 64)
    plain, own = (
        float(output_error((each * wide - rows).double(), gram).sum())
        for each in (nearest(rows, step, bits), codes)
    )
    assert own < 0.8 * plain


@pytest.mark.parametrize(("method", "slack"), [(adaptive, 1.5), (gptq, 4.0)])
def test_roundings_in_blocks_are_near_the_best_of_all(method: object, slack: float) -> None:
    """Against every rounding up or down of six weights in two blocks; chance would be far off."""
    rows, gram = weights(6, 6, seed=3), gram_of(inputs(6, seed=1))
    rows[:, :3] *= 4.0
    step = scales(rows, 3, blocks=2)
    wide = quantizers.spread_scales(step, 6)
    assert callable(method)
    codes = method(rows, step, 3, gram)
    hessian = quantizers._damped(gram, rows)
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)))
    for row, below in enumerate((rows / wide).floor()):
        changes = (below + every).clamp(-3, 3) * wide[row] - rows[row]
        errors = output_error(changes.double(), hessian)
        own = float(output_error((codes[row] * wide[row] - rows[row])[None].double(), hessian))
        assert own <= slack * float(errors.min())
        assert own < float(errors.median())
