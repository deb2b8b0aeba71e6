"""Importance of channels: tensor maths only, one function for each criterion.

Rows are what :func:`autoprune.compress.layers.weight_rows` returns: all weights of one channel.

References:
    [Li2017] Pruning Filters for Efficient ConvNets, ICLR 2017.
    [Liu2017] Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017.
    [Molchanov2019] Importance Estimation for Neural Network Pruning, CVPR 2019.
    [Sun2024] A Simple and Effective Pruning Approach for Large Language Models (Wanda), ICLR 2024.
    [He2019] Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration, CVPR 2019.
    [LeCun1990] Optimal Brain Damage, NeurIPS 1989.
    [Theis2018] Faster Gaze Prediction with Dense Networks and Fisher Pruning, 2018.
    [Fang2023] DepGraph: Towards Any Structural Pruning, CVPR 2023.
    [Lee2021] Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from autoprune.errors import CompressionError


def l1_scores(rows: Tensor) -> Tensor:
    """Score channels by the sum of their absolute weights [Li2017]_.

    Args:
        rows: Weights of each channel, ``(channels, weights)``.

    Returns:
        One non-negative score for each channel, ``(channels,)``; larger means keep.
    """
    return rows.double().abs().sum(1)


def l2_scores(rows: Tensor) -> Tensor:
    """Score channels by the Euclidean norm of their weights [Li2017]_.

    Args:
        rows: Weights of each channel, ``(channels, weights)``.

    Returns:
        One non-negative score for each channel, ``(channels,)``; larger means keep.
    """
    return rows.double().square().sum(1).sqrt()


def fpgm_scores(rows: Tensor) -> Tensor:
    """Score channels by their distances from all others: one near the geometric median can be replaced [He2019]_.

    Args:
        rows: Weights of each channel, ``(channels, weights)``.

    Returns:
        The sum of Euclidean distances, ``(channels,)``; larger means keep.
    """
    doubled = rows.double()
    return torch.cdist(doubled, doubled).sum(1)


def bn_scale_scores(scale: Tensor) -> Tensor:
    """Score channels by the magnitude of their BatchNorm scale [Liu2017]_.

    The paper first trains with an L1 penalty on the scales, which is not done here: without it the scales of
    a trained network still tell how large each channel is made, but are less often near zero.

    Args:
        scale: BatchNorm weight, ``(channels,)``.

    Returns:
        ``|scale|``, ``(channels,)``; larger means keep.
    """
    return scale.double().abs()


def activation_scores(rows: Tensor, second_moment: Tensor) -> Tensor:
    r"""Score input channels by the energy that they put into the layer's output, as Wanda does [Sun2024]_.

    :math:`s_c = \lVert W_c \rVert^2 \, E[x_c^2]`, which is the mean square that channel ``c`` alone adds to
    the layer's outputs if its values at different taps are uncorrelated. Wanda takes the root and ranks
    single weights; for whole channels the squares add up.

    Args:
        rows: Weights that read each input channel, ``(channels, weights)``.
        second_moment: Mean square of each input channel, ``(channels,)``.

    Returns:
        One non-negative score for each channel, ``(channels,)``; larger means keep.

    Raises:
        CompressionError: If the numbers of channels differ.
    """
    if rows.shape[0] != second_moment.shape[0]:
        raise CompressionError(
            f"weights of {rows.shape[0]} channels and second moments of {second_moment.shape[0]} do not belong together"
        )
    return rows.double().square().sum(1) * second_moment.double()


def taylor_scores(products: Tensor) -> Tensor:
    r"""Score units by the squared first-order change of the loss without them [Molchanov2019]_.

    Args:
        products: :math:`\sum_w g_w w` over the weights of each unit for each batch, ``(batches, units)``.

    Returns:
        Mean over batches of the squares, ``(units,)``; larger means keep.

    Raises:
        CompressionError: If there are no batches.
    """
    if products.dim() != 2 or products.shape[0] == 0:
        raise CompressionError(
            f"taylor needs products of shape (batches, units), got {tuple(products.shape)}"
        )
    return products.double().square().mean(0)


def fisher_scores(squares: Tensor) -> Tensor:
    r"""Score units by the diagonal of the Hessian, as Optimal Brain Damage does [LeCun1990]_.

    :math:`\frac12 \sum_w E[g_w^2] w^2`, with the empirical Fisher information in place of the second derivative
    [Theis2018]_. Gradients are of batches, not of single examples, which changes the scale of all scores alike.
    Unlike ``taylor`` the weights of a unit are taken one by one: changes that cancel each other still count.

    Args:
        squares: :math:`\sum_w (g_w w)^2` over the weights of each unit for each batch, ``(batches, units)``.

    Returns:
        ``(units,)``; larger means keep.

    Raises:
        CompressionError: If there are no batches.
    """
    if squares.dim() != 2 or squares.shape[0] == 0:
        raise CompressionError(f"fisher needs squares of shape (batches, units), got {tuple(squares.shape)}")
    return 0.5 * squares.double().mean(0)


def lamp_scores(magnitudes: Tensor) -> Tensor:
    r"""Score units so that groups can be compared: each one's share of what is at least as large [Lee2021]_.

    :math:`m_u^2 / \sum_{v: m_v \ge m_u} m_v^2`. The paper scores single weights of one layer; here the units of a
    group by the magnitude of all their coupled layers. Units of equal magnitude come in the order of their index, so
    the last of the largest always scores 1 and no group is emptied first. Inside a group the order is that of the
    magnitudes.

    Args:
        magnitudes: Non-negative magnitude of each unit, ``(units,)``.

    Returns:
        Shares in ``[0, 1]``, ``(units,)``; larger means keep. All 1 for a group without any magnitude.
    """
    squares = magnitudes.double().square()
    order = torch.argsort(squares, stable=True)
    rising = squares[order]
    left = rising.flip(0).cumsum(0).flip(0)
    shares = torch.where(left > 0, rising / left, torch.ones_like(left))
    return torch.empty_like(shares).index_copy_(0, order, shares)


def random_scores(name: str, size: int) -> Tensor:
    """Return scores that are random but the same for the same group: the control for all criteria.

    Args:
        name: The group's name, which is the seed.
        size: Number of units.

    Returns:
        Uniform numbers in ``[0, 1)``, ``(size,)``.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pool_units(values: Tensor, index_map: Sequence[Sequence[int]], power: float = 1.0) -> Tensor:
    r"""Pool values of channels into values of units, :math:`(\sum_{c \in u} v_c^p)^{1/p}`.

    Args:
        values: ``(..., channels)``; signed values need ``power`` 1.
        index_map: For each unit its channels.
        power: ``p``; 2 makes the norm of a unit's channels from their norms.

    Returns:
        ``(..., units)``; 0 for a unit without channels.
    """
    units = [unit for unit, channels in enumerate(index_map) for _ in channels]
    channels = [channel for owned in index_map for channel in owned]
    raised = values.double() if power == 1.0 else values.double().pow(power)
    pooled = raised.new_zeros((*values.shape[:-1], len(index_map)))
    pooled.index_add_(-1, _index(units, values), raised.index_select(-1, _index(channels, values)))
    return pooled if power == 1.0 else pooled.pow(1.0 / power)


def normalised_sum(scores: Sequence[Tensor]) -> Tensor:
    """Add scores of coupled layers, each divided by its mean so that no layer drowns the others [Fang2023]_.

    Args:
        scores: One ``(units,)`` for each layer; at least one.

    Returns:
        ``(units,)``. A layer whose scores are all zero adds nothing.

    Raises:
        CompressionError: If there are no scores, or one is not finite.
    """
    if not scores:
        raise CompressionError("no layer of the group has scores")
    total = torch.zeros_like(scores[0])
    for each in scores:
        if not bool(torch.isfinite(each).all()):
            raise CompressionError(
                "a score is not finite", "the network's weights or activations hold NaN or infinity"
            )
        mean = each.mean()
        if float(mean) > 0:
            total = total + each / mean
    return total


def _index(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=like.device)
