"""How near two sets of outputs are, and how near they have to be."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Rounding of float32 through a deep network stays well below; a wrong weight or shape is far above.
FLOAT_PARITY = 1e-3
# With weights of 16 bits, which are rounded once more than the network's.
HALF_PARITY = 1e-2
# With weights or arithmetic of bfloat16, whose rounding is eight times as coarse as float16's.
BFLOAT16_PARITY = 1e-1
# The kernels may round a product differently from the arithmetic that the file describes, by a few steps of int8.
INT8_KERNEL_PARITY = 0.1


def relative_error(outputs: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return the largest absolute difference as a share of the largest magnitude of ``wanted``.

    Infinite where the shapes differ or a value is not finite.
    """
    if outputs.shape != wanted.shape or not np.isfinite(outputs).all() or not np.isfinite(wanted).all():
        return float("inf")
    largest = float(np.abs(wanted).max()) or 1.0
    return float(np.abs(outputs - wanted).max()) / largest
