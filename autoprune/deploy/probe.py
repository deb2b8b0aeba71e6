"""What a runtime really executes on this machine, found by building a small network at each bit-width."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autoprune.deploy.registry import make_runtime
from autoprune.deploy.runtime import Formats
from autoprune.errors import AutopruneError
from autoprune.target import Target


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
    """Build a convolution and a linear layer in float and in int8, and read back what ``target`` executes."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    example = torch.randn(8, 3, 8, 8, generator=generator)
    notes, bits = [], []
    try:
        with tempfile.TemporaryDirectory() as folder:
            runtime = make_runtime(target)
            runtime.prepare(model, example[:2])
            for width, layers in ((32, []), (8, ["0", "3"])):
                path = Path(folder) / f"{width}.onnx"
                executed = runtime.build(model, path, Formats(int8=layers), [example]).executed
                notes.append(f"{width} bit: {executed.int8_layers} of {executed.layers} layers in int8")
                if executed.int8_layers == len(layers):
                    bits.append(width)
    except AutopruneError as error:
        notes.append(error.message)
    return Probe(usable=bool(bits), bits=tuple(bits), note="; ".join(notes))
