"""Outputs of networks, however nested."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def flat_outputs(outputs: Any) -> list[Tensor]:
    """Return all floating-point tensors in a network's output, however nested."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    values: Iterable[Any] = ()
    if isinstance(outputs, dict):
        values = outputs.values()
    elif isinstance(outputs, list | tuple):
        values = outputs
    elif hasattr(outputs, "__dict__"):
        values = vars(outputs).values()
    return [tensor for value in values for tensor in flat_outputs(value)]
