"""Masks of single weights: tensor maths only. Scores, how many zeros each layer gets, and which weights they are.

A mask is boolean and of its weight's shape; True stays. Of equal scores the weight with the lower index (of the
flattened weight; of several layers, of the earlier one) becomes zero first, so that the number of zeros is exact.

References:
    [Han2015] Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015.
    [Mocanu2018] Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity, Nature
        Communications 2018.
    [Evci2020] Rigging the Lottery: Making All Tickets Winners, ICML 2020.
    [Lee2021] Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021.
    [Sun2024] A Simple and Effective Pruning Approach for Large Language Models (Wanda), ICLR 2024.
    [Molchanov2017] Pruning Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017.
    [LeCun1990] Optimal Brain Damage, NeurIPS 1989.
    [Mishra2021] Accelerating Sparse Deep Neural Networks, 2021.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from autoprune.errors import CompressionError


def magnitude_scores(weight: Tensor) -> Tensor:
    """Score weights by their absolute values [Han2015]_; of the weight's shape, larger means keep."""
    return weight.detach().double().abs()


def activation_scores(weight: Tensor, second_moment: Tensor) -> Tensor:
    r"""Score weights by :math:`|w| \sqrt{E[x^2]}` of the input that each reads [Sun2024]_.

    The paper has the norm of the input over the calibration data, which is this times a constant. For a convolution
    the input's second moment is that of its channel, the same at every place of the kernel.

    Args:
        weight: ``(out, in, *kernel)``.
        second_moment: Mean square of each input, of a shape that broadcasts to the weight's.

    Returns:
        Of the weight's shape; larger means keep. To be compared within one output: see :func:`lowest_by_row`.
    """
    return magnitude_scores(weight) * second_moment.double().sqrt()


def taylor_scores(products: Tensor, batches: int) -> Tensor:
    r"""Score weights by the first-order change of the loss without them, :math:`|E[g] w|` [Molchanov2017]_.

    Args:
        products: :math:`\sum g w` over batches, of the weight's shape.
        batches: Number of batches.
    """
    return products.double().abs() / batches


def fisher_scores(squares: Tensor, batches: int) -> Tensor:
    r"""Score weights by the diagonal of the Hessian, :math:`\frac12 E[g^2] w^2` [LeCun1990]_.

    As for channels, the empirical Fisher information of batches is in place of the second derivative.

    Args:
        squares: :math:`\sum (g w)^2` over batches, of the weight's shape.
        batches: Number of batches.
    """
    return 0.5 * squares.double() / batches


def random_scores(name: str, weight: Tensor) -> Tensor:
    """Return scores that are random but the same for the same layer and shape: the control for all criteria.

    Args:
        name: The layer's name, which is the seed.
        weight: Its weight.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lamp_scores(weight: Tensor) -> Tensor:
    r"""Score weights by :math:`w_u^2 / \sum_{v \ge u} w_v^2`, the sum over those not smaller [Lee2021]_.

    Args:
        weight: Of any shape.

    Returns:
        Of the weight's shape, in ``(0, 1]`` (0 for weights of 0); the largest weight of a layer has 1.
    """
    squares = weight.detach().double().square().flatten()
    order = torch.argsort(squares, stable=True)
    rising = squares[order]
    not_smaller = rising.flip(0).cumsum(0).flip(0)
    scores = torch.zeros_like(squares)
    scores[order] = torch.where(not_smaller > 0, rising / not_smaller, 0.0)
    return scores.reshape(weight.shape)


def zero_count(sparsity: float, weights: int) -> int:
    """Return how many of so many weights the share ``sparsity`` is: the nearest number, the larger at a tie.

    One weight stays in any case.
    """
    return min(math.floor(sparsity * weights + 0.5), weights - 1)


def global_counts(scores: Sequence[Tensor], zeros: int) -> list[int]:
    """Spread zeros over layers by one threshold on all their scores.

    Args:
        scores: Of each layer, of any shapes; larger means keep.
        zeros: How many weights of all layers become zero.

    Returns:
        Zeros of each layer; they add up to ``zeros``. The highest score of each layer stays.
    """
    owner = torch.cat([torch.full((each.numel(),), index) for index, each in enumerate(scores)])
    flat = [each.detach().flatten().double().cpu().clone() for each in scores]
    for each in flat:
        each[each.argmax()] = math.inf
    order = torch.argsort(torch.cat(flat), stable=True)
    counts: list[int] = torch.bincount(owner[order[:zeros]], minlength=len(scores)).tolist()
    return counts


def erk_counts(shapes: Sequence[Sequence[int]], zeros: int) -> list[int]:
    r"""Spread zeros over layers by their shapes, Erdos-Renyi-Kernel [Mocanu2018]_ [Evci2020]_.

    The share that stays of a layer is proportional to its dimensions' sum over their product,
    :math:`(n_{out} + n_{in} + k_h + k_w) / (n_{out} n_{in} k_h k_w)`, and at most 1: layers of which more than all
    would stay are left dense and the others get their zeros. Shares become whole numbers by the largest remainders.

    Args:
        shapes: Of the layers' weights, ``(out, in, *kernel)``.
        zeros: How many weights of all layers become zero.

    Returns:
        Zeros of each layer; they add up to ``zeros``.
    """
    if zeros == 0:
        return [0] * len(shapes)
    sizes = [math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        free = [index for index in range(len(shapes)) if index not in dense]
        kept = sum(sizes) - zeros - sum(sizes[index] for index in dense)
        # The number of weights that stay of a layer is proportional to the sum of its dimensions.
        unit = kept / sum(sum(shapes[index]) for index in free)
        full = {index for index in free if unit * sum(shapes[index]) > sizes[index]}
        if not full:
            break
        dense |= full
    wanted = {index: sizes[index] - unit * sum(shapes[index]) for index in free}
    counts = [math.floor(wanted[index]) if index in wanted else 0 for index in range(len(shapes))]
    by_rest = sorted(free, key=lambda index: (counts[index] - wanted[index], index))
    for index in by_rest[: zeros - sum(counts)]:
        counts[index] += 1
    return counts


def lowest(scores: Tensor, zeros: int) -> Tensor:
    """Return the mask without the ``zeros`` weights of the lowest scores, of the scores' shape."""
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[torch.argsort(scores.flatten().cpu(), stable=True)[:zeros]] = False
    return mask.reshape(scores.shape)


def lowest_by_row(scores: Tensor, zeros: int) -> Tensor:
    """Return the mask without the lowest scores of every output, as Wanda compares them [Sun2024]_.

    Outputs lose the same number; where ``zeros`` is no multiple of their number, some lose one more, evenly spread.

    Args:
        scores: ``(out, ...)``.
        zeros: Of the whole layer.
    """
    rows = scores.flatten(1).cpu()
    bounds = torch.arange(len(rows) + 1) * zeros // len(rows)
    ranks = torch.argsort(torch.argsort(rows, dim=1, stable=True), dim=1)
    return (ranks >= bounds.diff()[:, None]).reshape(scores.shape)


def block_mask(scores: Tensor, keep: int, block: int) -> Tensor:
    """Return the mask that keeps the ``keep`` highest scores of every ``block`` consecutive inputs [Mishra2021]_.

    Blocks lie along the inputs at each place of a kernel. Of inputs at the end that fill no block, ``keep`` stay too.

    Args:
        scores: ``(out, in, *kernel)``.
        keep: N of a pattern ``N:M``.
        block: M.
    """
    along = scores.cpu().movedim(1, -1)
    inputs = along.shape[-1]
    # What fills up the last block ranks below everything and is cut off again.
    filled = torch.nn.functional.pad(along, (0, -inputs % block), value=-math.inf)
    blocks = filled.reshape(*filled.shape[:-1], -1, block)
    ranks = torch.argsort(torch.argsort(blocks, dim=-1, stable=True), dim=-1)
    mask = (ranks >= block - keep).flatten(-2)[..., :inputs]
    return mask.movedim(-1, 1)


def check_mask(layer: str, mask: Tensor, hint: str) -> None:
    """Refuse a mask that leaves nothing of a layer.

    Raises:
        CompressionError: If no weight stays; names the layer.
    """
    if not bool(mask.any()):
        raise CompressionError(
            f"the mask leaves none of the {mask.numel()} weights of layer {layer!r}; allowed: at least 1",
            hint,
        )


def check_scores(layer: str, criterion: str, scores: Tensor) -> None:
    """Refuse scores by which nothing can be ranked.

    Raises:
        CompressionError: If one is not finite; names the layer.
    """
    if not bool(torch.isfinite(scores).all()):
        raise CompressionError(
            f"layer {layer!r}, mask criterion {criterion!r}: a score is not finite",
            "the network's weights or activations hold NaN or infinity",
        )
