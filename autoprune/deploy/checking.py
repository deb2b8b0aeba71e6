"""The comparison of a written file with its network, the same for every runtime that takes ONNX."""

from __future__ import annotations

from autoprune.deploy.onnx_file import Written
from autoprune.deploy.parity import (
    BFLOAT16_PARITY,
    FLOAT_PARITY,
    HALF_PARITY,
    INT8_KERNEL_PARITY,
    relative_error,
)
from autoprune.deploy.session import Floats
from autoprune.deploy.sessions.onnxruntime import run_onnx
from autoprune.errors import ExportError
from autoprune.target import Target


def check_outputs(written: Written, raw: bytes, outputs: Floats, target: Target) -> float:
    """Compare a runtime's outputs with the arithmetic that the file describes, and with the network.

    Args:
        written: The file.
        raw: Its content as it is deployed.
        outputs: What the runtime makes of the written inputs.
        target: Where it runs.

    Returns:
        The largest difference from the network, relative to its largest output.

    Raises:
        ExportError: If the outputs differ by more than the bounds.
    """
    error = relative_error(outputs, written.wanted)
    if written.asked:
        kernels = relative_error(outputs, run_onnx(raw, written.inputs, optimized=False))
        if not kernels <= INT8_KERNEL_PARITY:
            raise ExportError(
                f"{target.runtime}'s integer kernels differ from the arithmetic of the file by {kernels:.3g} of the "
                f"largest output (allowed: {INT8_KERNEL_PARITY:g})",
                "keep these groups in float (bits: 32) on this machine",
            )
        return error
    allowed = HALF_PARITY if written.stored or target.precision == "float16" else FLOAT_PARITY
    if written.bfloat16 or target.precision == "bfloat16":
        allowed = BFLOAT16_PARITY
    if not error <= allowed:
        raise ExportError(
            f"the file's outputs in {target.runtime} differ from the network's by {error:.3g} of the largest output "
            f"(allowed: {allowed:g})",
            "an operator of this network does something else there; please report the model",
        )
    return error
