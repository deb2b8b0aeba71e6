"""Severity: capability lost on a scale on which training takes back about the same share of every loss. Torch-free."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from autoprune.config import Limits
from autoprune.measure.record import Measurement
from autoprune.study.front import WORST_DROP

# The capability lost of a candidate that failed: none is worse.
ALL_LOST = 1e3
# A network that kept less than this share of the dense capability has lost all.
_LEAST_KEPT = 0.01


def severity(lost: float, dense: float) -> float:
    r"""Return :math:`-d \ln(1 - l/d)` for ``l`` lost of ``d``.

    A small loss is its own severity. Capability ends at 0, so large losses lie ever closer together while the training
    that takes them back grows without end; on this scale the recoveries of a ResNet-20 left about the same share
    whether a screen had lost 0.06 or 0.77.

    Args:
        lost: Capability lost; :data:`ALL_LOST` stays what it is.
        dense: Capability of the dense network. Where that is not above 0 the loss is its own severity.
    """
    if lost >= ALL_LOST or dense <= 0.0 or lost <= 0.0:
        return lost
    return -dense * math.log(max(_LEAST_KEPT, 1.0 - lost / dense))


def volume_ends(dense: Measurement, limits: Limits) -> NDArray[np.float64]:
    """Return where the volume of the final front ends: a tenth lost and the dense costs, or the user's caps.

    Args:
        dense: What was measured of the dense network.
        limits: The user's caps.

    Returns:
        Severity of what is lost, and shares of the dense size and latency, ``(3,)``.
    """
    size = latency = 1.0
    if limits.max_size_mb is not None:
        size = min(1.0, limits.max_size_mb * 1e6 / dense.size_bytes)
    if limits.max_latency_ms is not None:
        latency = min(1.0, limits.max_latency_ms / dense.latency.latency_ms)
    return np.array([worst_severity(dense.search.value, limits.min_accuracy), size, latency])


def worst_severity(dense: float, min_accuracy: float | None) -> float:
    """Return the severity at which a network is of no use: a tenth lost, or what the user says."""
    lost = WORST_DROP * max(1.0, abs(dense))
    if min_accuracy is not None:
        lost = max(dense - min_accuracy, 1e-3)
    return severity(lost, dense)
