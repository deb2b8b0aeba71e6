"""Options of the command line for the bits of weights and how integers are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from autoprune.errors import UsageError
from autoprune.naming import unknown_name

Bits = Annotated[
    int | None, typer.Option(metavar="B", help="of weights, for every group: 2|3|4|5|6|8|16|32 (8)")
]
ActivationBits = Annotated[
    int | None, typer.Option(metavar="B", help="of what layers with integer weights read: 8|16|32 (8)")
]
Scale = Annotated[
    str | None, typer.Option(metavar="S", help="where integers end: minmax|percentile|mse (minmax)")
]
BlockSize = Annotated[
    int | None,
    typer.Option(metavar="N", help="weights that share a scale: 16|32|64|128|256 (all of an output's)"),
]
Rounding = Annotated[str | None, typer.Option(metavar="R", help="nearest|gptq|adaptive (nearest)")]
BiasCorrection = Annotated[
    bool | None, typer.Option("--bias-correction", help="take what integers add to means off the biases")
]
Aware = Annotated[
    float | None,
    typer.Option(metavar="X", help="share of the fine-tuning that knows of integers, 0 to 1 (0)"),
]
Half = Annotated[str | None, typer.Option(metavar="H", help="what 16 bits are: float16|bfloat16 (float16)")]
Activations = Annotated[
    str | None,
    typer.Option(metavar="A", help="8 bit inputs of linear layers: static|dynamic|fp8 (static)"),
]
Equalize = Annotated[
    str | None,
    typer.Option(metavar="E", help="channels rescaled first: none|cross_layer|smooth|both (none)"),
]
SmoothAlpha = Annotated[
    float | None, typer.Option(metavar="X", help="share of inputs' ranges that smooth moves, 0 to 1 (0.5)")
]


def gathered(
    bits: int | None,
    activation_bits: int | None,
    scale: str | None,
    block_size: int | None,
    rounding: str | None,
    bias_correction: bool | None,
    aware: float | None,
    half: str | None,
    activations: str | None,
    equalize: str | None,
    smooth_alpha: float | None,
) -> dict[str, Any]:
    """Return what was given as ``bits``, ``activation_bits`` and ``quantization``; empty where nothing was.

    Raises:
        UsageError: If a value is not allowed.
    """
    from autoprune.space import quantization as known

    _check_number("bits", bits, known.BITS, "32 is float")
    _check_number("activation bits", activation_bits, known.ACTIVATION_BITS, "32 is float")
    _check_number("block size", block_size, known.BLOCK_SIZES, "left out, a scale for each output channel")
    _check_name("scale", scale, known.SCALE_METHODS)
    _check_name("rounding", rounding, known.ROUNDINGS)
    _check_name("half", half, known.HALVES)
    _check_name("activations", activations, known.ACTIVATIONS)
    _check_name("equalize", equalize, known.EQUALIZATIONS)
    _check_share("--aware", aware, "a share of the fine-tuning")
    _check_share("--smooth-alpha", smooth_alpha, "a share of the range of inputs")
    if block_size is not None and (bits or 8) <= known.INTEGER_BITS and (activation_bits or 8) == 8:
        raise UsageError(
            f"--block-size {block_size} gives blocks of weights scales of their own, and kernels for inputs of 8 bits "
            "take one scale for each channel; allowed with it: --activation-bits 16, 32",
            "add --activation-bits 32: weights are stored in few bits and computed with in float",
        )
    if half is not None and bits != 16:
        raise UsageError(f"--half {half} is for weights of 16 bits; add --bits 16")
    if smooth_alpha is not None and equalize not in known.SMOOTHING:
        raise UsageError(
            f"--smooth-alpha {smooth_alpha:g} is for --equalize smooth or both; got --equalize {equalize or 'none'}"
        )
    if activations in ("dynamic", "fp8") and ((bits or 8) > known.INTEGER_BITS or (activation_bits or 8) > 8):
        raise UsageError(
            f"--activations {activations} is for inputs of 8 bits; allowed with it: --bits 2 to 8 and "
            "--activation-bits 8"
        )
    of_integers = {
        "--activation-bits": activation_bits,
        "--scale": scale,
        "--block-size": block_size,
        "--rounding": rounding,
        "--bias-correction": bias_correction or None,
        "--aware": aware or None,
        "--equalize": equalize,
    }
    idle = [option for option, value in of_integers.items() if value is not None]
    if bits is not None and bits > known.INTEGER_BITS and idle:
        raise UsageError(
            f"{', '.join(idle)} with --bits {bits} would do nothing: there are no integers; allowed with it: "
            "--bits 2 to 8",
            "lower --bits, or leave the other options out",
        )
    found: dict[str, Any] = {"bits": bits, "activation_bits": activation_bits}
    how = {
        "scale": scale,
        "block_size": block_size,
        "rounding": rounding,
        "bias_correction": bias_correction or None,
        "aware": aware,
        "half": half,
        "activations": activations,
        "equalize": equalize,
        "smooth_alpha": smooth_alpha,
    }
    given = {name: value for name, value in how.items() if value is not None}
    if given:
        found["quantization"] = known.Quantization.model_validate(given)
    return {name: value for name, value in found.items() if value is not None}


def _check_number(name: str, value: int | None, allowed: Sequence[int], remark: str) -> None:
    if value is not None and value not in allowed:
        raise UsageError(f"{name} {value} cannot be used; allowed: {', '.join(map(str, allowed))} ({remark})")


def _check_name(name: str, value: str | None, allowed: Sequence[str]) -> None:
    if value is not None and value not in allowed:
        raise unknown_name(name, value, allowed)


def _check_share(option: str, value: float | None, what: str) -> None:
    if value is not None and not 0.0 <= value <= 1.0:
        raise UsageError(f"{option} {value:g} cannot be used; allowed: {what}, from 0 to 1")
