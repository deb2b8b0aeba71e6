r"""Grids for weights, and which of its values each weight becomes: tensor maths only.

A weight matrix ``(out, features)`` is put on one symmetric grid for each output channel, or for each block of its
features: :math:`\hat w = s q` with integers :math:`|q| \le 2^{b-1} - 1`. Sign and zero are kept exactly, and the grid
of 8 bits is that of the runtimes.

References:
    [Nagel2020] Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020.
    [Frantar2023] GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, ICLR 2023.
    [Krishnamoorthi2018] Quantizing deep convolutional networks for efficient inference: A whitepaper, 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoprune.errors import CompressionError
from autoprune.space.quantization import INTEGER_BITS, ScaleMethod

# Shares of the largest magnitude that are tried as the end of a grid.
_ENDS = tuple(0.01 * step for step in range(2, 101))
_TINY = 1e-12
# How far from whole numbers weights on a grid may be, from the rounding of float32.
_ON_GRID = 1e-3
_LEAST_FEATURES = 4
# torch sorts no more than 16 million at once for a quantile.
_QUANTILE_ELEMENTS = 8_000_000
# Rows and columns by which a matrix that lies on no grid is told at once.
_LOOKED_AT = 16
# Added to the diagonal of a Gram matrix, as a share of its mean: what calibration never showed costs something too.
_DAMPING = 0.01
# Columns that GPTQ rounds before the rest of the matrix is corrected.
_BLOCK = 128
# Course of adaptive rounding: steps, rate, and the weight and sharpness of the pull to whole numbers.
_STEPS = 500
_RATE = 0.1
_PULL = 0.5
_WARM = 0.2
_SHARPEST, _SOFTEST = 2.0, 20.0
# Less gain than that is rounding of float32.
_GAIN = 1e-6
# Ends of the stretched sigmoid of [Nagel2020].
_LOW, _HIGH = -0.1, 1.1


def largest_code(bits: int) -> int:
    """Return the largest integer of a symmetric grid.

    Raises:
        CompressionError: If a grid of so many bits is none of integers.
    """
    if not 2 <= bits <= INTEGER_BITS:
        raise CompressionError(f"a grid of {bits} bits is none of integers; allowed: 2 to {INTEGER_BITS}")
    return int(2 ** (bits - 1) - 1)


def scales(
    rows: Tensor, bits: int, method: ScaleMethod = "minmax", percentile: float = 99.9, blocks: int = 1
) -> Tensor:
    """Return the step of the grid of every output channel, or of every block of its features.

    Args:
        rows: Weights, ``(out, features)``.
        bits: 2 to 8.
        method: ``minmax``, ``percentile`` or ``mse``; see :class:`~autoprune.space.quantization.Quantization`.
        percentile: For the method of that name, in ``(50, 100]``.
        blocks: Equal parts of each channel's features, one after another, that have a step of their own.

    Returns:
        Positive steps, ``(out, blocks)``. Weights that lie on a grid of so many bits already, as after a training that
        knows of integers, keep it. By ``mse`` no block has a larger error than with the whole channel's step.

    Raises:
        CompressionError: If the features do not divide into so many blocks.
    """
    out, features = rows.shape
    if features % blocks:
        raise CompressionError(f"{features} features do not divide into {blocks} blocks")
    parts = rows.reshape(out * blocks, features // blocks)
    found = _scales(parts, bits, method, percentile)
    if method == "mse" and blocks > 1:
        whole = _scales(rows, bits, method, percentile).repeat_interleave(blocks, 0)
        found = torch.where(_error(parts, whole, bits) < _error(parts, found, bits), whole, found)
    return found.reshape(out, blocks)


def _error(rows: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return the squared error of the nearest integers, ``(out, 1)``."""
    return (nearest(rows, step, bits) * step - rows).square().sum(1, keepdim=True)


def _scales(rows: Tensor, bits: int, method: ScaleMethod, percentile: float) -> Tensor:
    top = largest_code(bits)
    if (own := grid_of(rows, bits)) is not None:
        return own
    magnitude = rows.abs()
    largest = magnitude.amax(1, keepdim=True)
    if method == "percentile":
        # Of those that are not masked; where nearly all are equal to 0, the largest.
        present = magnitude.masked_fill(magnitude == 0, torch.nan)
        rows_at_once = max(1, _QUANTILE_ELEMENTS // rows.shape[1])
        parts = present.split(rows_at_once)  # type: ignore[no-untyped-call]
        found = torch.cat([torch.nanquantile(p, percentile / 100.0, dim=1, keepdim=True) for p in parts])
        largest = torch.where(found > 0, found, largest)
    elif method == "mse":
        best = torch.full_like(largest, torch.inf)
        end = largest.clone()
        for share in _ENDS:
            step = (share * largest / top).clamp_min(_TINY)
            error = _error(rows, step, bits)
            better = error < best
            best, end = torch.where(better, error, best), torch.where(better, share * largest, end)
        largest = end
    return (largest / top).clamp_min(_TINY)


def spread_scales(scale: Tensor, features: int) -> Tensor:
    """Return steps that broadcast against weights ``(out, features)``: ``(out, 1)``, or one for each feature.

    Args:
        scale: Steps, ``(out, blocks)``.
        features: A multiple of the blocks.
    """
    blocks = scale.shape[1]
    return scale if blocks == 1 else scale.repeat_interleave(features // blocks, 1)


def grid_of(rows: Tensor, bits: int) -> Tensor | None:
    """Return the scales of the grid that all weights lie on; None where there is none.

    Args:
        rows: Weights, ``(out, features)``.
        bits: 2 to 8.

    Returns:
        Scales, ``(out, 1)``: the largest with which every weight of a channel is a whole number of them.
    """
    if rows.shape[1] < _LEAST_FEATURES:
        return None  # so few lie on some grid by chance
    few = rows[:_LOOKED_AT, :_LOOKED_AT]
    if few.shape != rows.shape and grid_of(few, bits) is None:
        return None
    largest = rows.abs().amax(1, keepdim=True).clamp_min(_TINY)
    found = torch.zeros_like(largest)
    for code in range(1, largest_code(bits) + 1):
        codes = rows * (code / largest)
        fits = (codes - codes.round()).abs().amax(1, keepdim=True) <= _ON_GRID
        found = torch.where(fits & (found == 0), largest / code, found)
    return found if bool((found > 0).all()) else None


def nearest(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the nearest integer of the grid to each weight [Krishnamoorthi2018]_.

    Args:
        rows: Weights, ``(out, features)``.
        scale: Steps, ``(out, blocks)``.
        bits: 2 to 8.

    Returns:
        Whole numbers in the type of ``rows``, of the same shape; a half goes to the even one, as runtimes round.
    """
    top = largest_code(bits)
    return (rows / spread_scales(scale, rows.shape[1])).round().clamp(-top, top)


def gptq(rows: Tensor, scale: Tensor, bits: int, gram: Tensor) -> Tensor:
    r"""Round columns one after another, and let those to come make good what each one's rounding changed.

    With the inverse Gram matrix's Cholesky factor :math:`U`, the error of column :math:`i` times
    :math:`U_{ij} / U_{ii}` is taken off every later column [Frantar2023]_. Columns go by falling diagonal of the Gram
    matrix, so that the inputs that matter most are rounded while most can still be corrected. What is zero stays zero.
    Steps are those of the weights as they were before any was corrected.

    Args:
        rows: Weights, ``(out, features)``.
        scale: Steps, ``(out, blocks)``.
        bits: 2 to 8.
        gram: :math:`E[x x^T]` of the layer's inputs, ``(features, features)``.

    Returns:
        Whole numbers, of the shape of ``rows``.

    Raises:
        CompressionError: If the matrix is not of that shape.
    """
    hessian = _damped(gram, rows)
    order = torch.argsort(hessian.diagonal(), descending=True)
    left = rows.double()[:, order].clone()
    factor = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order])), upper=True
    )
    codes = torch.empty_like(left)
    masked = rows[:, order] == 0
    steps = spread_scales(scale, rows.shape[1]).double().expand_as(left)[:, order]
    for begin in range(0, left.shape[1], _BLOCK):
        end = min(begin + _BLOCK, left.shape[1])
        errors = torch.empty(len(left), end - begin, dtype=left.dtype)
        for column in range(begin, end):
            step = steps[:, column : column + 1]
            codes[:, column] = nearest(left[:, column : column + 1], step, bits)[:, 0]
            codes[masked[:, column], column] = 0.0
            lost = (left[:, column] - codes[:, column] * step[:, 0]) / factor[column, column]
            left[:, column:end] -= lost[:, None] * factor[column, column:end]
            errors[:, column - begin] = lost
        left[:, end:] -= errors @ factor[begin:end, end:]
    found = torch.empty_like(codes)
    found[:, order] = codes
    return found.to(rows.dtype)


def adaptive(rows: Tensor, scale: Tensor, bits: int, gram: Tensor) -> Tensor:
    r"""Round every weight up or down so that the layer's outputs change least.

    Minimises :math:`\sum_i \delta_i^T H \delta_i + \lambda \sum (1 - |2 h(v) - 1|^\beta)` over the stretched sigmoids
    :math:`h(v)` of how far each weight is rounded up, with :math:`\beta` falling, so that all end at 0 or 1
    [Nagel2020]_. In the paper the outputs of batches, behind the activation, are compared; here their expected squares,
    which the Gram matrix :math:`H` holds. It starts from the nearest values. Not in the paper: at the end single
    weights are rounded the other way as long as that brings the outputs nearer, and where they still differ more than
    those of the nearest values, these are kept.

    Args:
        rows: Weights, ``(out, features)``.
        scale: Steps, ``(out, blocks)``.
        bits: 2 to 8.
        gram: :math:`E[x x^T]` of the layer's inputs, ``(features, features)``.

    Returns:
        Whole numbers, of the shape of ``rows``.

    Raises:
        CompressionError: If the matrix is not of that shape.
    """
    hessian = _damped(gram, rows)
    hessian = (hessian / hessian.diagonal().mean()).float()
    steps = spread_scales(scale, rows.shape[1])
    scaled = (rows / steps).float()
    # What a step of a block changes, in units of the channel's mean step.
    share = (steps / scale.mean(1, keepdim=True)).float()
    below = scaled.floor()
    top = largest_code(bits)
    rest = (scaled - below).clamp(0.01, 0.99)
    masked = rows == 0
    slopes = torch.logit((rest - _LOW) / (_HIGH - _LOW)).requires_grad_()
    optimizer = torch.optim.Adam([slopes], lr=_RATE)
    for step in range(_STEPS):
        up = _stretched(slopes).masked_fill(masked, 0.0)
        change = ((below + up).clamp(-top, top) - scaled) * share
        loss = ((change @ hessian) * change).sum()
        progress = (step / _STEPS - _WARM) / (1.0 - _WARM)
        if progress > 0:
            sharpness = _SHARPEST + (_SOFTEST - _SHARPEST) * (1.0 - progress)
            pull = (1.0 - (2.0 * up - 1.0).abs().pow(sharpness)) * share.square()
            loss = loss + _PULL * pull.sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found = (below + (slopes.detach() >= 0)).clamp(-top, top).masked_fill(masked, 0.0)
    other = (2.0 * below + 1.0 - found).clamp(-top, top).masked_fill(masked, 0.0)
    found = _polished(found, other, scaled, share, hessian)
    plain = nearest(rows, scale, bits).float()
    errors = [output_error((codes - scaled) * share, hessian) for codes in (found, plain)]
    return torch.where((errors[0] > errors[1])[:, None], plain, found).to(rows.dtype)


def _polished(codes: Tensor, other: Tensor, scaled: Tensor, share: Tensor, hessian: Tensor) -> Tensor:
    """Give single weights their other value as long as outputs come nearer, of each channel the best one first."""
    codes, other, share = codes.clone(), other.clone(), share.expand_as(codes)
    slope = ((codes - scaled) * share) @ hessian
    rows = torch.arange(len(codes), device=codes.device)
    for _ in range(2 * codes.shape[1]):
        change = (other - codes) * share
        gain, places = (2.0 * change * slope + change.square() * hessian.diagonal()).min(1)
        better = gain < -_GAIN
        if not bool(better.any()):
            break
        row, place = rows[better], places[better]
        slope[row] += change[row, place][:, None] * hessian[place]
        codes[row, place], other[row, place] = other[row, place], codes[row, place]
    return codes


def output_error(change: Tensor, gram: Tensor) -> Tensor:
    """Return the mean square by which each output changes, ``(out,)``, for a change of weights ``(out, features)``."""
    return ((change @ gram) * change).sum(1)


def _stretched(slopes: Tensor) -> Tensor:
    return (torch.sigmoid(slopes) * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)


def _damped(gram: Tensor, rows: Tensor) -> Tensor:
    features = rows.shape[1]
    if gram.shape != (features, features):
        raise CompressionError(
            f"the Gram matrix has shape {tuple(gram.shape)}, the weights have {features} features"
        )
    matrix = gram.double()
    damping = _DAMPING * matrix.diagonal().mean().clamp_min(_TINY)
    return matrix + damping * torch.eye(features, dtype=torch.float64, device=gram.device)
