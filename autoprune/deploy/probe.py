"""What a runtime really executes on this machine, found by building a small network at each bit-width."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autoprune.deploy.registry import make_runtime
from autoprune.deploy.runtime import Formats
from autoprune.deploy.saturation import int8_bits
from autoprune.errors import AutopruneError
from autoprune.space.quantization import INTEGER_BITS
from autoprune.target import Target

# Layers of the network by their kind.
_LAYERS = {"0": "conv", "3": "linear"}


@dataclass(frozen=True)
class Probe:
    """What was found.

    Attributes:
        usable: Whether a network could be built at all.
        bits: Bit-widths at which every layer that was asked to runs so.
        note: What was executed, or why not, on one line.
    """

    usable: bool
    bits: tuple[int, ...]
    note: str


def probe(target: Target) -> Probe:
    """Build a convolution and a linear layer in float and in int8, and read back what ``target`` executes.

    In int8 those are asked for that the runtime says that it has.
    """
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    example = torch.randn(8, 3, 8, 8, generator=generator)
    eight = [name for name, kind in _LAYERS.items() if kind in target.facts.int8]
    notes, bits = [], []
    try:
        with tempfile.TemporaryDirectory() as folder:
            runtime = make_runtime(target)
            runtime.prepare(model, example[:2])
            for width, layers in ((32, []), (8, eight)):
                path = Path(folder) / f"{width}{Path(target.facts.model_file).suffix}"
                executed = runtime.build(model, path, Formats(int8=layers), [example]).executed
                told = ", ".join(f"{count} in {kind}" for kind, count in executed.ran.items())
                notes.append(f"{width} bit: {told}")
                if not executed.not_as_asked:
                    bits.append(width)
    except AutopruneError as error:
        notes.append(error.message)
    if bits and len(eight) < len(_LAYERS):
        notes.append(f"int8 in {', '.join(target.facts.int8)} layers alone")
    if INTEGER_BITS in bits and (narrow := int8_bits(target)) < INTEGER_BITS:
        notes.append(f"weights of int8 have {narrow} of 8 bits, since its kernels add in 16 bits here")
    return Probe(usable=bool(bits), bits=tuple(bits), note="; ".join(notes))
