"""Layers as torch deploys them: integer and fp8 products, and weights in few bits, each made of ATen operators alone.

What is exported of them is what runs, and loads wherever torch does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.deploy.integers import INT8_TOP, integers_of, put_together
from autoprune.deploy.layers import Layer
from autoprune.deploy.runtime import StoredWeight

# Rows, features and outputs that the GPU's integer product asks for: more than 16 rows, the others in eights; its fp8
# product takes them in sixteens. The processor takes any.
_ROWS, _INT8_STEP, FP8_STEP = 17, 8, 16
_FP8 = torch.float8_e4m3fn
_FP8_TOP = torch.finfo(_FP8).max
_LEAST = torch.finfo(torch.float32).tiny


class Int8Linear(nn.Module):
    """A linear layer whose products are of int8: ``y[r, o] = s[r] w[o] (sum_i q[r, i] c[o, i] - z sum_i c[o, i]) + b``.

    Weights have a scale for each output channel. Inputs are rounded over a fixed range, the same for all
    (``s``, ``z`` constant), or each row over its own largest magnitude (``z = 0``).

    Args:
        layer: The linear layer.
        stored: The grid of its weight; the nearest of 8 bits if None.
        limits: Lowest and highest input, between which 0 lies; None for the range of each row.
        dtype: What it gets and gives.
        padded: Whether the product is padded to what a GPU asks for.
    """

    def __init__(
        self,
        layer: Layer,
        stored: StoredWeight | None,
        limits: tuple[float, float] | None,
        dtype: torch.dtype,
        padded: bool,
    ) -> None:
        super().__init__()
        codes, scales = integers_of(layer, stored)
        self.outputs, self.features = codes.shape
        self.dtype, self.limits, self.rows = dtype, limits, _ROWS if padded else 0
        self.more = -self.features % _INT8_STEP if padded else 0
        self.wide = -self.outputs % _INT8_STEP if padded else 0
        bias = torch.zeros(self.outputs) if layer.bias is None else layer.bias.detach().float()
        self.step, self.offset = 1.0, 0
        if limits is not None:
            self.step = max((limits[1] - limits[0]) / 255, _LEAST)
            self.offset = round(-limits[0] / self.step) - 128
            bias = bias - self.offset * self.step * scales[:, 0] * codes.sum(dim=1, dtype=torch.float32)
        self.codes = nn.Buffer(F.pad(codes, (0, self.more, 0, self.wide)))
        self.scales = nn.Buffer(self.step * scales[:, 0])
        self.bias = nn.Buffer(bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs, ``(…, out)``, for inputs ``(…, in)``."""
        rows = _rows(inputs)
        integers, steps = self.rounded(rows)
        if self.more or self.rows:
            integers = F.pad(integers, (0, self.more, 0, self.rows))
        sums = torch._int_mm(integers, self.codes.t())
        if self.wide or self.rows:
            sums = sums[: -self.rows or None, : self.outputs]
        scales = self.scales if steps is None else self.scales * steps
        outputs = torch.addcmul(self.bias, sums.to(torch.float32), scales)
        return _like(outputs.to(self.dtype), inputs)

    def rounded(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return rows as int8, and their steps, ``(rows, 1)``, where each has its own."""
        rows = rows.to(torch.float32)
        if self.limits is not None:
            integers = torch.round(rows * (1.0 / self.step)) + self.offset
            return torch.clamp(integers, -128, 127).to(torch.int8), None
        steps = torch.clamp_min(rows.abs().amax(dim=1, keepdim=True) / INT8_TOP, _LEAST)
        return torch.round(rows / steps).to(torch.int8), steps

    def described(self, inputs: Tensor) -> Tensor:
        """Return the outputs as the definition has them, in float64 products."""
        rows = _rows(inputs)
        integers, steps = self.rounded(rows)
        codes = self.codes[: self.outputs, : self.features]
        sums = (integers.double() @ codes.double().t()) * self.scales.double()
        outputs = sums * (1.0 if steps is None else steps.double()) + self.bias.double()
        return _like(outputs.to(self.dtype), inputs)


class Fp8Linear(nn.Module):
    """A linear layer whose products are of fp8 (e4m3), with a scale for each row of inputs and each output channel.

    Args:
        layer: The linear layer; features and outputs are padded to multiples of 16.
        dtype: What it gets and gives; products are rounded to bfloat16.
    """

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        self.outputs, self.features = weight.shape
        self.dtype, self.more = dtype, -self.features % FP8_STEP
        scales = torch.clamp_min(weight.abs().amax(dim=1, keepdim=True) / _FP8_TOP, _LEAST)
        wide = -self.outputs % FP8_STEP
        self.numbers = nn.Buffer(F.pad(weight / scales, (0, self.more, 0, wide)).to(_FP8))
        self.scales = nn.Buffer(F.pad(scales.t(), (0, wide), value=1.0).contiguous())
        self.bias = None if layer.bias is None else nn.Buffer(layer.bias.detach().to(dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs, ``(…, out)``, for inputs ``(…, in)``."""
        numbers, steps = self.rounded(_rows(inputs))
        outputs = torch._scaled_mm(
            numbers, self.numbers.t(), scale_a=steps, scale_b=self.scales, out_dtype=torch.bfloat16
        )
        return self._ended(outputs, inputs)

    def rounded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows as fp8, padded, and their scales, ``(rows, 1)``."""
        rows = rows.to(torch.float32)
        steps = torch.clamp_min(rows.abs().amax(dim=1, keepdim=True) / _FP8_TOP, _LEAST)
        return F.pad(rows / steps, (0, self.more)).to(_FP8), steps

    def described(self, inputs: Tensor) -> Tensor:
        """Return the outputs as the definition has them, in float64 products."""
        numbers, steps = self.rounded(_rows(inputs))
        sums = (numbers.double() * steps.double()) @ (self.numbers.double().t() * self.scales.double())
        return self._ended(sums.to(torch.bfloat16), inputs)

    def _ended(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        outputs = outputs[:, : self.outputs].to(self.dtype)
        outputs = outputs if self.bias is None else outputs + self.bias
        return _like(outputs, inputs)


class StoredLayer(nn.Module):
    """A layer in float whose weight is stored in fewer bits, and put together once when a file is opened.

    Args:
        layer: The layer.
        stored: How its weight is stored.
        dtype: What it is computed in.
    """

    def __init__(self, layer: Layer, stored: StoredWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.operator, self.after, self.axis, self.dtype = layer.operator, layer.after, layer.axis, dtype
        self.bias = None if layer.bias is None else nn.Buffer(layer.bias.detach().to(dtype))
        scales: Tensor | None = None
        numbers = layer.weight.detach().to(torch.bfloat16 if stored.bfloat16 else torch.float16)
        if stored.codes is not None:
            numbers, scales = integers_of(layer, stored)
        self.numbers, self.scales = nn.Buffer(numbers), None if scales is None else nn.Buffer(scales)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs."""
        weight: Tensor = self.numbers
        if self.scales is not None:
            weight = put_together(weight.to(torch.float32), self.scales, self.axis)
        outputs: Tensor = self.operator(inputs, weight.to(self.dtype), self.bias, *self.after)
        return outputs


def _rows(inputs: Tensor) -> Tensor:
    """Return inputs ``(…, in)`` as ``(rows, in)``."""
    return inputs if inputs.dim() == 2 else inputs.reshape(-1, inputs.shape[-1])


def _like(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Return outputs ``(rows, out)`` as ``(…, out)``, as inputs ``(…, in)`` are."""
    return outputs if inputs.dim() == 2 else outputs.reshape([*inputs.shape[:-1], outputs.shape[-1]])


def has_pattern(weight: Tensor) -> bool:
    """Return whether every group of four weights in a row has at most two that are not zero.

    Args:
        weight: ``(out, in)``.
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool((weight.reshape(len(weight), -1, 4) != 0).sum(dim=2).max() <= 2)
