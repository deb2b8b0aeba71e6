"""Integer weights for a network: every layer on its own grid, after all training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TypeGuard

import torch
from torch import Tensor, nn

from autoprune.compress import quantizers
from autoprune.compress.layers import Conv, weight_rows
from autoprune.compress.statistics import input_grams
from autoprune.errors import CompressionError
from autoprune.space.quantization import Quantization

# Features of one output's inputs up to which a layer's rounding looks at them: time grows with their cube.
_LONGEST = 2304


@torch.no_grad()
def quantized(
    model: nn.Module, bits: Mapping[str, int], how: Quantization, batches: Sequence[Tensor]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Put the weights of layers on their grids.

    Grouped transposed convolutions are left out: what they become is the runtime's. Layers whose inputs are not
    matrices of patches (other grouped, transposed and three-dimensional convolutions), or whose patches have more than
    2,304 features, are rounded to the nearest, and their biases are not corrected.

    Args:
        model: The network on the CPU in evaluation mode; it is not changed.
        bits: Bit-width by layer, 2 to 8; names that the network lacks are left out.
        how: Scales, rounding, and whether biases are corrected.
        batches: Calibration inputs.

    Returns:
        A copy whose weights are integers times scales, and the integers, int8 of each weight's shape.

    Raises:
        CompressionError: If a layer cannot be rounded; names it.
    """
    copy = deepcopy(model)
    modules = {name: module for name, module in copy.named_modules() if name in bits}
    layers = {name: module for name, module in modules.items() if _has_rows(module)}
    needs_inputs = how.rounding != "nearest" or how.bias_correction
    grams = input_grams(model, layers, batches, _LONGEST) if needs_inputs else {}
    codes = {}
    for name, module in layers.items():
        try:
            codes[name] = _round_layer(module, bits[name], how, grams.get(name))
        except CompressionError as error:
            raise CompressionError(
                f"layer {name!r} cannot be quantized to {bits[name]} bits: {error.message}",
                "set the bits of its group to 32",
            ) from error
    return copy, codes


def _has_rows(module: nn.Module) -> TypeGuard[Conv | nn.Linear]:
    """Whether a layer's weight can be seen as rows of output channels."""
    if isinstance(module, Conv):
        return not module.transposed or module.groups == 1
    return isinstance(module, nn.Linear)


def _round_layer(module: Conv | nn.Linear, bits: int, how: Quantization, gram: Tensor | None) -> Tensor:
    """Round one layer's weight in place and return its integers."""
    rows = weight_rows(module, "out")
    scale = quantizers.scales(rows, bits, how.scale, how.percentile)
    if gram is None or how.rounding == "nearest":
        integers = quantizers.nearest(rows, scale, bits)
    else:
        rounding = quantizers.gptq if how.rounding == "gptq" else quantizers.adaptive
        with torch.enable_grad():
            integers = rounding(rows, scale, bits, gram[:-1, :-1])
    if gram is not None and how.bias_correction:
        _correct_bias(module, (integers * scale - rows).double() @ gram[:-1, -1].double())
    weight = module.weight
    transposed = isinstance(module, Conv) and module.transposed
    shape = weight.transpose(0, 1).shape if transposed else weight.shape
    weight.copy_(_as_weight(integers * scale, shape, transposed))
    return _as_weight(integers, shape, transposed).to(torch.int8)


def _as_weight(rows: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    whole = rows.reshape(shape)
    return whole.transpose(0, 1) if transposed else whole


def _correct_bias(module: Conv | nn.Linear, added: Tensor) -> None:
    """Take what quantization adds to the mean of each output off its bias [Nagel2019]."""
    if module.bias is None:
        module.bias = nn.Parameter(torch.zeros(len(added), dtype=module.weight.dtype))
    module.bias -= added.to(module.bias)
