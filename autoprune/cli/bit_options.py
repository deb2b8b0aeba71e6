"""Options of the command line for the bits of weights and how integers are made of them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from autoprune.errors import UsageError
from autoprune.naming import unknown_name

Bits = Annotated[
    int | None, typer.Option(metavar="B", help="of weights, for every group: 2|3|4|5|6|8|16|32 (8)")
]
ActivationBits = Annotated[
    int | None, typer.Option(metavar="B", help="of what layers with integer weights read: 8|32 (8)")
]
Scale = Annotated[
    str | None, typer.Option(metavar="S", help="where integers end: minmax|percentile|mse (minmax)")
]
Rounding = Annotated[str | None, typer.Option(metavar="R", help="nearest|gptq|adaptive (nearest)")]
BiasCorrection = Annotated[
    bool | None, typer.Option("--bias-correction", help="take what integers add to means off the biases")
]
Aware = Annotated[
    float | None,
    typer.Option(metavar="X", help="share of the fine-tuning that knows of integers, 0 to 1 (0)"),
]


def gathered(
    bits: int | None,
    activation_bits: int | None,
    scale: str | None,
    rounding: str | None,
    bias_correction: bool | None,
    aware: float | None,
) -> dict[str, Any]:
    """Return what was given as ``bits``, ``activation_bits`` and ``quantization``; empty where nothing was.

    Raises:
        UsageError: If a value is not allowed.
    """
    from autoprune.space.quantization import BITS, ROUNDINGS, SCALE_METHODS, Quantization

    if bits is not None and bits not in BITS:
        raise UsageError(f"bits {bits} cannot be used; allowed: {', '.join(map(str, BITS))} (32 is float)")
    if activation_bits is not None and activation_bits not in (8, 32):
        raise UsageError(f"activation bits {activation_bits} cannot be used; allowed: 8, 32 (float)")
    if scale is not None and scale not in SCALE_METHODS:
        raise unknown_name("scale", scale, SCALE_METHODS)
    if rounding is not None and rounding not in ROUNDINGS:
        raise unknown_name("rounding", rounding, ROUNDINGS)
    if aware is not None and not 0.0 <= aware <= 1.0:
        raise UsageError(
            f"--aware {aware:g} cannot be used; allowed: a share of the fine-tuning, from 0 to 1"
        )
    found: dict[str, Any] = {"bits": bits, "activation_bits": activation_bits}
    how = {"scale": scale, "rounding": rounding, "bias_correction": bias_correction or None, "aware": aware}
    given = {name: value for name, value in how.items() if value is not None}
    if given:
        found["quantization"] = Quantization.model_validate(given)
    return {name: value for name, value in found.items() if value is not None}
