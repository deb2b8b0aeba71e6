"""The contract of every runtime, what it is asked for, and the artifact that it makes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.deploy.session import Session, run_all
from autoprune.measure.record import Executed
from autoprune.target import Target


@dataclass(frozen=True)
class Artifact:
    """A model file that was checked.

    Attributes:
        path: The file.
        executed: What the runtime executes of it.
        parity_error: Largest difference from the network's outputs, relative to their largest magnitude; for int8
            this is the error of quantization.
    """

    path: Path
    executed: Executed
    parity_error: float


@dataclass(frozen=True)
class StoredWeight:
    """How a layer's weight is stored.

    Attributes:
        bits: 2 to 8 for integers, 16 for float16 or bfloat16.
        codes: The integers, int8 of the weight's shape. None for 16 bits.
        scales: The network's weight is the codes times these, ``(out, blocks)``, the features of each output channel in
            equal blocks one after another; None where there is one scale for each output channel, which then follows
            from weight and codes.
        bfloat16: Whether 16 bits are bfloat16, else float16.
    """

    bits: int
    codes: NDArray[np.int8] | None = None
    scales: NDArray[np.float32] | None = None
    bfloat16: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of each output channel's features that have scales of their own."""
        return 1 if self.scales is None else int(self.scales.shape[1])


@dataclass(frozen=True)
class Formats:
    """The number formats that a candidate's layers are asked to run in; layers that are not named run in float.

    Attributes:
        int8: Layers whose weights are integers and whose inputs become 8 bits over ranges from calibration.
        dynamic: Linear layers whose inputs become 8 bits over the range of each inference instead.
        fp8: Linear layers whose weights and inputs become fp8 numbers (e4m3), inputs row by row over their own range.
        int16: Layers whose weights are integers and whose inputs become 16 bits over ranges from calibration.
        weights: How weights are stored that are not left to the runtime's quantizer.
        packed: Whether weights with many zeros are stored packed, where the runtime executes the same then; and run by
            kernels for two of four values, where they are so and the runtime has such kernels.
        ranges: Ranges of inputs by layer that are taken instead of calibration's, lowest and highest value.
    """

    int8: Collection[str] = ()
    dynamic: Collection[str] = ()
    fp8: Collection[str] = ()
    int16: Collection[str] = ()
    weights: Mapping[str, StoredWeight] = field(default_factory=dict)
    packed: bool = False
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def predicted(session: Session, batches: Iterable[Tensor]) -> Tensor:
    """Return what a session makes of batches of any size, ``(n, classes)``, in their order."""
    return torch.from_numpy(np.concatenate([run_all(session, batch.numpy()) for batch in batches]))


def some(names: Collection[str]) -> str:
    """Return the first names of layers, for messages."""
    shown = sorted(names)
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def with_projections(asked: set[str], layers: Collection[str]) -> set[str]:
    """Add the input projections of attention, whose weight is no module's: they go with the output projection.

    Args:
        asked: Layers that are to run in a format.
        layers: Layers of the graph that are none of the network's modules.
    """
    pairs = ((layer, f"{layer.removesuffix('in_proj')}out_proj") for layer in layers)
    return asked | {layer for layer, partner in pairs if layer.endswith(".in_proj") and partner in asked}


class Runtime(Protocol):
    """A deployment runtime."""

    target: Target

    def prepare(self, dense: nn.Module, example: Tensor) -> None:
        """Learn the dense network's graph once, so that candidates need only their weights put in.

        Args:
            dense: The dense network in eval mode.
            example: Inputs, ``(n, C, H, W)``, n at least 2.

        Raises:
            ExportError: If the network cannot be exported.
        """
        ...

    def build(
        self, model: nn.Module, path: Path, formats: Formats, calibration: Sequence[Tensor]
    ) -> Artifact:
        """Write the model file of a candidate and check it against the network.

        Args:
            model: The candidate: the dense network with fewer channels, in eval mode.
            path: File to write.
            formats: What its layers are to run in.
            calibration: Batches of inputs from which ranges of inputs are taken.

        Raises:
            ExportError: If the file's outputs differ from the network's, or the runtime has no such format.
        """
        ...

    def predict(self, path: Path, batches: Iterable[Tensor]) -> Tensor:
        """Return the outputs of a model file, ``(n, classes)``, in the order of the inputs."""
        ...
