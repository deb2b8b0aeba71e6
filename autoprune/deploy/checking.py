"""The comparison of a written file with its network, the same for every runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from autoprune.deploy.parity import (
    BFLOAT16_PARITY,
    FLOAT_PARITY,
    HALF_PARITY,
    INT8_KERNEL_PARITY,
    relative_error,
)
from autoprune.deploy.session import Floats
from autoprune.errors import ExportError
from autoprune.target import Target


class Checked(Protocol):
    """What a file is compared with."""

    @property
    def wanted(self) -> Floats:
        """The network's outputs for the inputs that the file is checked on."""
        ...

    @property
    def asked(self) -> Mapping[str, str]:
        """What each layer is to run in, where that is not plain float."""
        ...

    @property
    def stored(self) -> Mapping[str, int]:
        """Count of layers by the bits of their stored weights."""
        ...

    @property
    def bfloat16(self) -> bool:
        """Whether weights are stored in bfloat16."""
        ...


def check_outputs(
    written: Checked, outputs: Floats, target: Target, described: Callable[[], Floats]
) -> float:
    """Compare a runtime's outputs with the arithmetic that the file describes, and with the network.

    Args:
        written: The file.
        outputs: What the runtime makes of the written inputs.
        target: Where it runs.
        described: Returns what the file's arithmetic gives for them, for files whose layers do not all run in float.

    Returns:
        The largest difference from the network, relative to its largest output.

    Raises:
        ExportError: If the outputs differ by more than the bounds.
    """
    error = relative_error(outputs, written.wanted)
    if written.asked:
        kernels = relative_error(outputs, described())
        if not kernels <= INT8_KERNEL_PARITY:
            raise ExportError(
                f"{target.runtime}'s integer kernels differ from the arithmetic of the file by {kernels:.3g} of the "
                f"largest output (allowed: {INT8_KERNEL_PARITY:g})",
                "keep these groups in float (bits: 32) on this machine",
            )
        # Integers of inputs change what the network computes; integers of weights that it has already do not.
        if not all(word.endswith("bit weights") for word in written.asked.values()):
            return error
    allowed = HALF_PARITY if "16" in written.stored or target.precision == "float16" else FLOAT_PARITY
    if written.bfloat16 or target.precision == "bfloat16":
        allowed = BFLOAT16_PARITY
    if not error <= allowed:
        raise ExportError(
            f"the file's outputs in {target.runtime} differ from the network's by {error:.3g} of the largest output "
            f"(allowed: {allowed:g})",
            "an operator of this network does something else there; please report the model",
        )
    return error
