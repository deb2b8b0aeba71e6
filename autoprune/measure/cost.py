"""Costs that need no clock: bytes on disk, parameters, multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def size_bytes(path: Path) -> int:
    """Return the bytes of a model file on disk, with the data file beside it if it has one."""
    external = path.with_name(path.name + ".data")
    return path.stat().st_size + (external.stat().st_size if external.is_file() else 0)


def count_params(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the multiply-accumulates of convolutions and matrix products for one example.

    Args:
        model: Network in eval mode.
        input_shape: Shape of one example, without the batch.
    """
    counter = FlopCounterMode(display=False)
    fused = torch.backends.mha.get_fastpath_enabled()
    # The counter does not see inside the fused kernels of attention.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # Nor does every torch count the fused products of queries, keys and values.
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(torch.zeros(1, *input_shape))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops()) // 2
