"""Probes: small networks of one operator each, and the formats in which a truth table tries them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.deploy.runtime import Formats, StoredWeight
from autoprune.measure.truth_table import Kind, Variant
from autoprune.space.quantization import INTEGER_BITS

# Layers of a probe: what it costs to enter and to leave a format is shared by them, as in a network.
_LAYERS = 3
_TOKENS = 64
_SIDE = 16


@dataclass(frozen=True)
class Operator:
    """One operator in the setting that it is timed in.

    Attributes:
        name: For people.
        kind: The kind of groups whose layers it stands for.
        channels: Channels of every layer.
        make: Makes the network of a number of channels.
        shape: Shape of one example, for a number of channels.
        widths: Numbers of channels at which its time is looked at; none to leave that out.
        sparsities: Whether it is tried with zeros.
    """

    name: str
    kind: Kind
    channels: int
    make: Callable[[int], nn.Module]
    shape: Callable[[int], tuple[int, ...]]
    widths: tuple[int, ...] = ()
    sparsities: bool = False


@dataclass(frozen=True)
class Asked:
    """One format that is tried.

    Attributes:
        name: For people.
        bits: Bit-width of the weights.
        activation_bits: Bit-width of the inputs.
        variant: See :class:`~autoprune.measure.truth_table.TruthEntry`.
        sparsity: Share of single weights that become zero.
        pattern: How: anywhere, or two of each four consecutive inputs.
        is_seldom_real: Whether convolutions are asked for it only when there is time: no runtime was seen to do more
            than store it.
    """

    name: str
    bits: int = 32
    activation_bits: int = 32
    variant: Variant = ""
    sparsity: float = 0.0
    pattern: str = "unstructured"
    is_seldom_real: bool = False


INT8 = Asked("int8", 8, 8)
FORMATS = (
    INT8,
    Asked("int8, 4 bit weights", 4, 8),
    Asked("int8, 2 bit weights", 2, 8),
    Asked("8 bit weights", 8, is_seldom_real=True),
    Asked("4 bit weights", 4),
    Asked("2 bit weights", 2, is_seldom_real=True),
    Asked("float16 weights", 16),
    Asked("bfloat16 weights", 16, variant="bfloat16", is_seldom_real=True),
)
DYNAMIC = Asked("dynamic int8", 8, 8, "dynamic")
SPARSE = (
    Asked("sparse 0.5", sparsity=0.5),
    Asked("sparse 0.9", sparsity=0.9),
    Asked("sparse 2:4", sparsity=0.5, pattern="2:4"),
)


def formats_for(operator: Operator, *, everything: bool) -> list[Asked]:
    """Return the formats that an operator is tried in.

    Args:
        operator: The operator.
        everything: Whether convolutions are asked for what is seldom more than storage too.
    """
    plain = [each for each in FORMATS if everything or operator.kind == "linear" or not each.is_seldom_real]
    more = [DYNAMIC] if operator.kind == "linear" else []
    return [*plain, *more, *(SPARSE if operator.sparsities else ())]


class Attention(nn.Module):
    """Queries, keys and values, their products with four heads, and the projection behind them.

    Args:
        channels: A multiple of four.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.projection = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens, ``(n, tokens, channels)``, mixed with each other."""
        count, tokens, channels = x.shape
        queries, keys, values = self.qkv(x).reshape(count, tokens, 3, 4, channels // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        made: Tensor = self.projection(mixed.transpose(1, 2).reshape(count, tokens, channels))
        return made


class ChannelMean(nn.Module):
    """The mean over all channels, so that networks of all widths make outputs of one shape.

    Args:
        dim: The channels' dimension.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean."""
        return x.mean(self.dim)


def _convolutions(kernel: int, groups: Callable[[int], int]) -> Callable[[int], nn.Module]:
    def make(channels: int) -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(_LAYERS):
            layers += [
                nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups(channels)),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers)

    return make


def _linear(channels: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(_LAYERS):
        layers += [nn.Linear(channels, channels), nn.ReLU()]
    return nn.Sequential(*layers)


def _image(channels: int) -> tuple[int, ...]:
    return (channels, _SIDE, _SIDE)


# Around a multiple of 16, of 8, of 4 and of 2.
_AROUND_64 = (48, 56, 60, 63, 64, 68, 72, 80)
_AROUND_128 = (96, 104, 112, 120, 124, 127, 128, 136, 144)
OPERATORS = (
    Operator("conv 3x3", "conv", 64, _convolutions(3, lambda c: 1), _image, _AROUND_64, sparsities=True),
    Operator("conv 1x1", "conv", 64, _convolutions(1, lambda c: 1), _image, _AROUND_64),
    Operator("conv depthwise", "conv", 128, _convolutions(3, lambda c: c), _image),
    Operator("conv grouped", "conv", 128, _convolutions(3, lambda c: 8), _image),
    Operator("linear, 1 token", "linear", 512, _linear, lambda c: (c,)),
    Operator(
        "linear, 64 tokens", "linear", 512, _linear, lambda c: (_TOKENS, c), _AROUND_128, sparsities=True
    ),
    Operator("attention, 64 tokens", "linear", 256, Attention, lambda c: (_TOKENS, c)),
)


def network_of(operator: Operator, channels: int) -> nn.Module:
    """Return an operator's network in evaluation mode, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return operator.make(channels).eval()


def narrowed(operator: Operator, channels: int) -> nn.Module:
    """Return a network whose layers have so many channels behind a first one that reads as many as the widest does.

    So networks of all widths read the same inputs, and make outputs of one shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = list(operator.make(channels).children())
        first = deepcopy(layers[0])
        most = max(operator.widths)
        if isinstance(first, nn.Conv2d):
            first = nn.Conv2d(most, channels, first.kernel_size, padding=first.padding)  # type: ignore[arg-type]
        else:
            first = nn.Linear(most, channels)
        end = ChannelMean(1 if operator.kind == "conv" else -1)
        return nn.Sequential(first, *layers[1:], end).eval()


def layers_of(model: nn.Module) -> list[str]:
    """Return the names of the layers with weights."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def in_format(model: nn.Module, asked: Asked, int8_bits: int = INTEGER_BITS) -> tuple[nn.Module, Formats]:
    """Return a network as a format needs it, and how a runtime is asked for that format.

    Args:
        model: The network; it is not changed.
        asked: The format.
        int8_bits: Most bits of the weights that the runtime's int8 kernels add up rightly.
    """
    layers = layers_of(model)
    if asked.sparsity:
        model = deepcopy(model)
        for name in layers:
            _thin(model.get_submodule(name).weight, asked)  # type: ignore[arg-type]
        return model, Formats(packed=True)
    if asked.bits == 32:
        return model, Formats()
    if asked.bits == 16:
        stored = StoredWeight(16, bfloat16=asked.variant == "bfloat16")
        return model, Formats(weights=dict.fromkeys(layers, stored))
    if asked == INT8:  # runtimes make these integers themselves
        return model, Formats(int8=layers)
    model = deepcopy(model)
    bits = min(asked.bits, int8_bits) if asked.activation_bits == INTEGER_BITS else asked.bits
    weights = {name: _rounded(model.get_submodule(name), bits) for name in layers}
    if asked.variant == "dynamic":
        return model, Formats(dynamic=layers, weights=weights)
    return model, Formats(int8=layers if asked.activation_bits == 8 else [], weights=weights)


def _rounded(layer: nn.Module, bits: int) -> StoredWeight:
    """Put a layer's weight on the symmetric grids of its output channels, in place, and return its integers."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    top = 2 ** (bits - 1) - 1
    with torch.no_grad():
        scale = weight.flatten(1).abs().amax(1).reshape(-1, *(1 for _ in weight.shape[1:])) / top
        codes = (weight / scale).round().clamp(-top, top)
        weight.copy_(codes * scale)
    return StoredWeight(bits, codes.numpy().astype(np.int8))


def _thin(weight: Tensor, asked: Asked) -> None:
    """Set the smallest weights to zero, in place: anywhere in each output channel, or of four consecutive inputs."""
    with torch.no_grad():
        last = weight.movedim(1, -1)  # inputs last
        runs = last.abs().reshape(-1, 4) if asked.pattern == "2:4" else last.abs().flatten(1)
        gone = runs.argsort(1)[:, : round(asked.sparsity * runs.shape[1])]
        keep = torch.ones_like(runs).scatter_(1, gone, 0.0)
        weight.mul_(keep.reshape(last.shape).movedim(-1, 1))


def examples(shape: Sequence[int], count: int = 8) -> Tensor:
    """Return inputs that networks are exported and calibrated with, ``(n, …)``."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
