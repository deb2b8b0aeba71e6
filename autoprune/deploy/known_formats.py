"""What is known of the formats that runtimes execute, without building anything or taking any time. Torch-free.

What is here was read back from executed graphs; the contract of every runtime in ``tests/deploy`` holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from autoprune.target import Target

_INTEGER_BITS = 8
# By runtime the weights of linear layers that a kernel reads while it computes in float, and as how many bits it does.
_READ: dict[str, Mapping[int, int]] = {
    "onnxruntime": {2: 2, 4: 4, 8: 8},
    "openvino": {2: 2, 3: 8, 4: 4, 5: 8, 6: 8, 8: 8},
}


def runs_in(target: Target, kind: Literal["conv", "linear"], bits: int, activation_bits: int) -> str | None:
    """Return what a layer runs in, in the words of :class:`autoprune.measure.record.Executed`.

    Args:
        target: The target.
        kind: Kind of the layer.
        bits: Bit-width of its weights.
        activation_bits: Bit-width of its inputs, where the weights are integers.

    Returns:
        None where nothing is known of the target.
    """
    if target.runtime not in _READ or target.device != "cpu":
        return None
    if bits > _INTEGER_BITS:
        return target.precision
    if activation_bits <= _INTEGER_BITS:
        return "int8"
    read = _READ[target.runtime].get(bits) if kind == "linear" and activation_bits == 32 else None
    return f"{read} bit weights" if read else target.precision


def runs_sparse(target: Target) -> bool | None:
    """Return whether zeros among a layer's weights are skipped at run time; None where nothing is known."""
    return False if target.runtime in _READ and target.device == "cpu" else None
