"""Quantization: how weights and inputs of fewer than 32 bits are made. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Bits = Literal[2, 3, 4, 5, 6, 8, 16, 32]
ScaleMethod = Literal["minmax", "percentile", "mse"]
Rounding = Literal["nearest", "gptq", "adaptive"]
BITS: tuple[Bits, ...] = get_args(Bits)
SCALE_METHODS: tuple[ScaleMethod, ...] = get_args(ScaleMethod)
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
# Up to these the weights of a layer are integers on a grid; above they are floating-point numbers.
INTEGER_BITS = 8


def computed_in(bits: int) -> int:
    """Return the bit-width of the arithmetic of a layer whose inputs may be integers: 8, or 32 for float."""
    return 8 if bits <= INTEGER_BITS else 32


class Quantization(BaseModel):
    """How the weights of groups with 2 to 8 bits are put on their grids, after all training or in its course.

    Every output channel has a symmetric grid of its own, ``-(2^(b-1) - 1) ... 2^(b-1) - 1`` times a scale. Weights of
    16 bits are stored as such and computed with in float.

    Attributes:
        scale: Where the grid ends. ``minmax``: at the largest magnitude; ``percentile``: at a quantile of magnitudes,
            beyond which weights are clipped; ``mse``: where the squared error of the weights is least.
        percentile: The quantile, in percent.
        rounding: Which of its two neighbours on the grid each weight becomes. ``nearest``; ``gptq``: weights one after
            another, each error made good by the weights to come [Frantar2023]_; ``adaptive``: all together, so that
            the layer's outputs change least [Nagel2020]_.
        bias_correction: Whether what quantization adds to the mean of every output is taken off its bias [Nagel2019]_.
        aware: Share of the fine-tuning steps, the last ones, that are taken with rounded weights and inputs and learned
            scales [Esser2020]_; 0: the network is quantized after training, 1: quantized, then fine-tuned. Under a
            schedule, of the steps after the last cut; nothing in the order ``tune-prune-quantize``.

    References:
        [Esser2020] Learned Step Size Quantization, ICLR 2020.
        [Nagel2019] Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019.
        [Nagel2020] Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020.
        [Frantar2023] GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, ICLR 2023.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: ScaleMethod = "minmax"
    percentile: Annotated[float, Field(gt=50.0, le=100.0)] = 99.9
    rounding: Rounding = "nearest"
    bias_correction: bool = False
    aware: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
