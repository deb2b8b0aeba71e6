"""Layers as torch deploys them, against their definitions: on the processor, whose kernels run them all but 2:4."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.deploy.integers import integers_of, put_together
from autoprune.deploy.layers import LINEAR, Layer
from autoprune.deploy.runtime import StoredWeight
from autoprune.deploy.torch_layers import Fp8Linear, Int8Linear, StoredLayer, has_pattern

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(features: int, outputs: int, bias: bool = True) -> Layer:
    torch.manual_seed(0)
    made = nn.Linear(features, outputs, bias)
    own = None if made.bias is None else made.bias.detach()
    return Layer(LINEAR, made.weight.detach(), own, (), torch.ones(outputs))


def rows(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=generator) + 0.5).to(dtype)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limits", [None, (-3.0, 4.0), (0.0, 4.0)])
@pytest.mark.parametrize("padded", [False, True])
def test_an_int8_layer_is_its_definition(
    dtype: torch.dtype, limits: tuple[float, float] | None, padded: bool
) -> None:
    layer, inputs = linear(37, 11), rows((3, 5, 37), dtype)
    made = Int8Linear(layer, None, limits, dtype, padded)
    outputs = made(inputs)
    assert outputs.shape == (3, 5, 11)
    assert outputs.dtype == dtype
    assert relative(outputs, made.described(inputs)) < (1e-5 if dtype == torch.float32 else 1e-2)
    kept = inputs.float() if limits is None else inputs.float().clamp(*limits)
    assert 0 < relative(outputs, F.linear(kept, layer.weight, layer.bias)) < 0.03


def test_an_int8_layer_by_hand() -> None:
    layer = Layer(LINEAR, torch.tensor([[1.27, -0.635]]), torch.tensor([0.5]), (), torch.ones(1))
    inputs = torch.tensor([[2.54, 0.3], [-0.012, 0.02]])
    # Each row by its own largest value: 127, 15 in steps of 0.02; -76, 127 in steps of 0.02 / 127.
    rowwise = Int8Linear(layer, None, None, torch.float32, False)(inputs)
    first = 0.02 * (127 * 1.27 + 15 * -0.64) + 0.5
    second = 0.02 / 127 * (-76 * 1.27 + 127 * -0.64) + 0.5
    assert torch.allclose(rowwise, torch.tensor([[first], [second]]), atol=1e-6)
    # Both over one range, in steps of 0.01 from -0.2 on; what lies beyond is cut off.
    fixed = Int8Linear(layer, None, (-0.2, 2.35), torch.float32, False)(inputs)
    first = 0.01 * (235 * 1.27 + 30 * -0.64) + 0.5
    second = 0.01 * (-1 * 1.27 + 2 * -0.64) + 0.5
    assert torch.allclose(fixed, torch.tensor([[first], [second]]), atol=1e-6)


def test_padding_is_what_the_gpu_asks_for() -> None:
    """More than 16 rows, features and outputs in eights; or the kernel refuses them there."""
    seen: list[tuple[torch.Size, torch.Size]] = []

    class Watched(Int8Linear):
        def rounded(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
            return super().rounded(rows)

    made = Watched(linear(37, 11), None, None, torch.float32, True)
    whole = torch._int_mm

    def product(one: Tensor, other: Tensor) -> Tensor:
        seen.append((one.shape, other.shape))
        return whole(one, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_int_mm", product)
        made(rows((1, 37)))
    [(one, other)] = seen
    assert one[0] > 16
    assert one[1] == other[0] == 40
    assert other[1] == 16


def test_given_integers_are_kept() -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(-7, 8, (6, 20)).astype(np.int8)
    codes[2] = 0  # a channel of zeros has no scale of its own
    scales = generator.uniform(0.01, 0.1, (6, 1)).astype(np.float32)
    weight = torch.from_numpy(codes * scales)
    # A BatchNorm with a negative factor was folded into two channels.
    folded = weight * torch.tensor([1.0, -2.0, 1.0, 0.5, 1.0, -1.0])[:, None]
    layer = Layer(LINEAR, folded, None, (), torch.ones(6))
    found, steps = integers_of(layer, StoredWeight(4, codes))
    signs = np.array([1, -1, 1, 1, 1, -1])[:, None]
    assert np.array_equal(found.numpy(), codes * signs)
    assert bool((steps > 0).all())
    assert torch.allclose(put_together(found, steps, 0), folded, atol=1e-7)
    made = Int8Linear(layer, StoredWeight(4, codes), None, torch.float32, False)
    assert torch.equal(made.codes, found)


def test_blocks_have_scales_of_their_own() -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(-7, 8, (6, 20)).astype(np.int8)
    scales = generator.uniform(0.01, 0.1, (6, 4)).astype(np.float32)
    weight = torch.from_numpy((codes.reshape(6, 4, 5) * scales[:, :, None]).reshape(6, 20))
    layer = Layer(LINEAR, weight, None, (), torch.ones(6))
    found, steps = integers_of(layer, StoredWeight(4, codes, scales))
    assert np.array_equal(found.numpy(), codes)
    assert np.allclose(steps.numpy(), scales)
    inputs = rows((2, 20))
    made = StoredLayer(layer, StoredWeight(4, codes, scales), torch.float32)
    assert torch.allclose(made(inputs), F.linear(inputs, weight))


def test_integers_of_another_weight_are_refused() -> None:
    layer = linear(8, 4)
    with pytest.raises(ValueError, match="off its grid of 4 bits"):
        integers_of(layer, StoredWeight(4, np.ones((4, 8), np.int8)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stored_convolution_is_the_convolution(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    operator = torch.ops.aten.conv2d.default
    codes = torch.randint(-3, 4, (6, 4, 3, 3), dtype=torch.int8)
    scales = torch.rand(6, 1, 1, 1) + 0.1
    weight = codes * scales
    layer = Layer(operator, weight, torch.randn(6), ((1, 1), (1, 1), (1, 1), 1), torch.ones(6))
    made = StoredLayer(layer, StoredWeight(3, codes.numpy()), dtype)
    inputs = rows((2, 4, 5, 5), dtype)
    wanted = F.conv2d(inputs, weight.to(dtype), layer.bias.detach().to(dtype), padding=1)  # type: ignore[union-attr]
    assert relative(made(inputs), wanted) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert made.numbers.dtype == torch.int8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_an_fp8_layer_is_its_definition(dtype: torch.dtype, bias: bool) -> None:
    layer, inputs = linear(37, 11, bias), rows((3, 5, 37), dtype)
    made = Fp8Linear(layer, dtype)
    outputs = made(inputs)
    assert outputs.shape == (3, 5, 11)
    assert outputs.dtype == dtype
    assert made.numbers.dtype == torch.float8_e4m3fn
    assert made.numbers.shape == (16, 48)
    assert relative(outputs, made.described(inputs)) < 1e-2
    assert 0 < relative(outputs, F.linear(inputs.float(), layer.weight, layer.bias)) < 0.08


def test_rows_of_zeros_have_a_range_too() -> None:
    inputs = torch.zeros(2, 37)
    layer = linear(37, 11)
    for made in (Int8Linear(layer, None, None, torch.float32, False), Fp8Linear(layer, torch.float32)):
        assert torch.allclose(made(inputs), layer.bias.expand(2, -1), atol=1e-2)  # type: ignore[union-attr]


def test_the_pattern_of_two_in_four() -> None:
    weight = torch.ones(4, 8)
    assert not has_pattern(weight)
    weight[:, ::2] = 0
    assert has_pattern(weight)
    weight[3, :4] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert not has_pattern(weight)
    assert not has_pattern(torch.zeros(4, 6))
    assert not has_pattern(torch.zeros(4, 4, 1, 1))


def test_a_weight_put_together_lies_in_memory_as_its_integers_do() -> None:
    """Or a convolution would run otherwise than the dense network's."""
    codes = torch.randint(-3, 4, (6, 4, 3, 3), dtype=torch.int8).to(memory_format=torch.channels_last)
    weight = put_together(codes, torch.rand(6, 1), 0)
    assert weight.is_contiguous(memory_format=torch.channels_last)
