"""Integer weights for a network: every layer on its own grid, after all training."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from autoprune.compress import quantizers
from autoprune.compress.layers import Conv, weight_rows
from autoprune.compress.statistics import input_grams
from autoprune.errors import CompressionError
from autoprune.space.quantization import Half, Quantization

# Features of one output's inputs up to which a layer's rounding looks at them: time grows with their cube.
_LONGEST = 2304


class Integers(NamedTuple):
    """A network of integer weights.

    Attributes:
        model: The network, whose weights are integers times scales.
        codes: The integers by layer, int8 of each weight's shape.
        scales: Of layers whose features lie in several blocks, one scale for each block, ``(out, blocks)``; the scales
            of other layers, one for each output channel, follow from weight and integers.
    """

    model: nn.Module
    codes: dict[str, Tensor]
    scales: dict[str, Tensor]


@torch.no_grad()
def quantized(
    model: nn.Module, bits: Mapping[str, int], how: Quantization, batches: Sequence[Tensor]
) -> Integers:
    """Put the weights of layers on their grids.

    Grouped transposed convolutions are left out: what they become is the runtime's. Layers whose inputs are not
    matrices of patches (other grouped, transposed and three-dimensional convolutions), or whose patches have more than
    2,304 features, are rounded to the nearest, and their biases are not corrected. Blocks are those of
    :func:`blocks_of`.

    Args:
        model: The network on the CPU in evaluation mode; it is not changed.
        bits: Bit-width by layer, 2 to 8; names that the network lacks are left out.
        how: Scales, blocks, rounding, and whether biases are corrected.
        batches: Calibration inputs.

    Returns:
        A copy of the network with such weights, their integers and scales.

    Raises:
        CompressionError: If a layer cannot be rounded; names it.
    """
    copy = deepcopy(model)
    modules = {name: module for name, module in copy.named_modules() if name in bits}
    layers = {name: module for name, module in modules.items() if _has_rows(module)}
    needs_inputs = how.rounding != "nearest" or how.bias_correction
    grams = input_grams(model, layers, batches, _LONGEST) if needs_inputs else {}
    codes, scales = {}, {}
    for name, module in layers.items():
        try:
            codes[name], scale = _round_layer(module, bits[name], how, grams.get(name))
        except CompressionError as error:
            raise CompressionError(
                f"layer {name!r} cannot be quantized to {bits[name]} bits: {error.message}",
                "set the bits of its group to 32",
            ) from error
        if scale.shape[1] > 1:
            scales[name] = scale
    return Integers(copy, codes, scales)


def blocks_of(module: nn.Module, block_size: int | None) -> int:
    """Return into how many blocks of ``block_size`` the features of each output channel of a layer divide.

    One where the features are no multiple of it, for grouped and transposed convolutions, and without a size.
    """
    if block_size is None or not isinstance(module, Conv | nn.Linear):
        return 1
    if isinstance(module, Conv) and (module.transposed or module.groups > 1):
        return 1
    features = module.weight[0].numel()
    return features // block_size if features % block_size == 0 else 1


@torch.no_grad()
def in_halves(model: nn.Module, layers: Collection[str], half: Half) -> nn.Module:
    """Return a copy whose layers have the weights that 16 bits leave of theirs.

    Args:
        model: The network; it is not changed.
        layers: Names of convolution and linear layers; names that the network lacks are left out.
        half: What they are stored as.
    """
    kind = torch.bfloat16 if half == "bfloat16" else torch.float16
    copy = deepcopy(model)
    for name, module in copy.named_modules():
        if name in layers and isinstance(module, Conv | nn.Linear):
            module.weight.copy_(module.weight.to(kind).to(module.weight))
    return copy


def _has_rows(module: nn.Module) -> TypeGuard[Conv | nn.Linear]:
    """Whether a layer's weight can be seen as rows of output channels."""
    if isinstance(module, Conv):
        return not module.transposed or module.groups == 1
    return isinstance(module, nn.Linear)


def _round_layer(
    module: Conv | nn.Linear, bits: int, how: Quantization, gram: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Round one layer's weight in place and return its integers and scales."""
    rows = weight_rows(module, "out")
    scale = quantizers.scales(rows, bits, how.scale, how.percentile, blocks_of(module, how.block_size))
    if gram is None or how.rounding == "nearest":
        integers = quantizers.nearest(rows, scale, bits)
    else:
        rounding = quantizers.gptq if how.rounding == "gptq" else quantizers.adaptive
        with torch.enable_grad():
            integers = rounding(rows, scale, bits, gram[:-1, :-1])
    made = integers * quantizers.spread_scales(scale, rows.shape[1])
    if gram is not None and how.bias_correction:
        _correct_bias(module, (made - rows).double() @ gram[:-1, -1].double())
    weight = module.weight
    transposed = isinstance(module, Conv) and module.transposed
    shape = weight.transpose(0, 1).shape if transposed else weight.shape
    weight.copy_(_as_weight(made, shape, transposed))
    return _as_weight(integers, shape, transposed).to(torch.int8), scale


def _as_weight(rows: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    whole = rows.reshape(shape)
    return whole.transpose(0, 1) if transposed else whole


def _correct_bias(module: Conv | nn.Linear, added: Tensor) -> None:
    """Take what quantization adds to the mean of each output off its bias [Nagel2019]."""
    if module.bias is None:
        module.bias = nn.Parameter(torch.zeros(len(added), dtype=module.weight.dtype))
    module.bias -= added.to(module.bias)
