"""The contract of every runtime, and the artifact that it makes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.measure.record import Executed


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
        bits: 2 to 8 for integers, 16 for float16.
        codes: The integers, int8 of the weight's shape; the network's weight is these times one scale for each output
            channel. None for float16.
    """

    bits: int
    codes: NDArray[np.int8] | None = None


class Runtime(Protocol):
    """A deployment runtime."""

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
        self,
        model: nn.Module,
        path: Path,
        *,
        int8_layers: Collection[str],
        calibration: Sequence[Tensor],
        packed: bool = False,
        weights: Mapping[str, StoredWeight] | None = None,
    ) -> Artifact:
        """Write the model file of a candidate and check it against the network.

        Args:
            model: The candidate: the dense network with fewer channels, in eval mode.
            path: File to write.
            int8_layers: Layers whose weights and inputs become int8.
            calibration: Batches of inputs from which int8 ranges are taken.
            packed: Whether weights with many zeros are stored packed, where the runtime executes the same then.
            weights: Layers whose weights are stored in fewer bits than they are computed with; packed, too.

        Raises:
            ExportError: If the file's outputs differ from the network's.
        """
        ...

    def predict(self, path: Path, batches: Iterable[Tensor]) -> Tensor:
        """Return the outputs of a model file, ``(n, classes)``, in the order of the inputs."""
        ...
