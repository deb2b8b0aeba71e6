"""8 bits simulated in float: what rounding does to a network, before any runtime computes in integers.

References:
    [Jacob2018] Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from autoprune.compress.layers import Conv
from autoprune.compress.quantizers import largest_code
from autoprune.space.quantization import INTEGER_BITS

INPUT_TOP = 255


def rounded(
    model: nn.Module,
    layers: Collection[str],
    bits: Mapping[str, int] | None = None,
    int8_bits: int = INTEGER_BITS,
) -> nn.Module:
    """Return a copy of ``model`` whose ``layers`` compute as if in 8 bits, or with weights of fewer.

    Weights are signed with one scale for each output channel, inputs unsigned with one for the tensor, as the
    deployment's are [Jacob2018]_; its input ranges come from calibration, here from each batch. The input projections
    of ``nn.MultiheadAttention``, which are no layers of their own, stay in float here.

    Args:
        model: A network; it is not changed.
        layers: Names of convolution and linear layers; names that the network lacks are left out.
        bits: Bit-width of layers' weights, 2 to 8, 16, or 32 for weights that stay. Layers that are named here alone
            have their weights rounded and their inputs not.
        int8_bits: That of ``layers`` which ``bits`` does not name.
    """
    widths = {**dict.fromkeys(layers, int8_bits), **(bits or {})}
    copy = deepcopy(model)
    for name, module in copy.named_modules():
        if name in widths and isinstance(module, Conv | nn.Linear):
            axis = 1 if isinstance(module, Conv) and module.transposed else 0
            weight = module.weight.detach()
            if widths[name] <= INTEGER_BITS:
                module.weight = nn.Parameter(round_weight(weight, axis, widths[name]))
            elif widths[name] < 32:
                module.weight = nn.Parameter(weight.half().to(weight))
            if name in layers:
                module.register_forward_pre_hook(_round_inputs)
    return copy


def round_weight(weight: Tensor, axis: int, bits: int = 8) -> Tensor:
    """Round a weight to signed integers with one symmetric scale for each output channel [Jacob2018]_.

    Args:
        weight: ``(out, in, *kernel)``, or transposed.
        axis: Dimension of the output channels.
        bits: 2 to 8.

    Returns:
        The values that the integers stand for, of the same shape.
    """
    others = [dim for dim in range(weight.dim()) if dim != axis]
    top = largest_code(bits)
    scale = weight.abs().amax(dim=others, keepdim=True).clamp_min(1e-12) / top
    return (weight / scale).round().clamp(-top, top) * scale


def input_grid(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of unsigned 8 bits over the range of some inputs, and of 0."""
    return grid_between(inputs.amin().clamp_max(0.0), inputs.amax().clamp_min(0.0))


def grid_between(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of unsigned 8 bits from ``low``, at most 0, to ``high``, at least 0."""
    scale = ((high - low) / INPUT_TOP).clamp_min(torch.finfo(low.dtype).tiny)
    return scale, (-low / scale).round()  # an integer, so that 0 stays 0


def on_input_grid(inputs: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return what inputs are once they were unsigned 8 bits: as ONNX's QuantizeLinear rounds, half to even."""
    return (((inputs / scale).round() + zero).clamp(0, INPUT_TOP) - zero) * scale


def _round_inputs(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Round a layer's inputs to unsigned 8 bits over the range of the batch."""
    inputs = arguments[0]
    return on_input_grid(inputs, *input_grid(inputs)), *arguments[1:]
