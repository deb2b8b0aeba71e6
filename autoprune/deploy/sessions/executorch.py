"""ExecuTorch's sessions on the CPU: the runtime that phones run, with XNNPACK's kernels."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.extension.pybindings.portable_lib import (
    _threadpool_get_thread_count,
    _unsafe_reset_threadpool,
)
from executorch.runtime import Runtime, Verification

from autoprune.deploy.session import Floats, Timer, wall_timer
from autoprune.errors import ExportError, UsageError
from autoprune.target import Target

# Methods hold on to the process's one pool of threads, so that it must not be made anew under them.
_open: weakref.WeakSet[ExecuTorchSession] = weakref.WeakSet()


def opening(target: Target) -> dict[str, Any]:
    """Return the settings of a session; see :func:`autoprune.deploy.session.opening`."""
    return {"threads": target.threads, "backend": "XnnpackBackend"}


class ExecuTorchSession:
    """One loaded method; see :class:`autoprune.deploy.session.Session`.

    Args:
        model: The file or its content.
        threads: Threads of one inference; those of the sessions that are open already, where there are any.
    """

    def __init__(self, model: Path | bytes, threads: int) -> None:
        if not len(_open) and _threadpool_get_thread_count() != threads:
            _unsafe_reset_threadpool(threads)
        program = Runtime.get().load_program(model, verification=Verification.Minimal)
        self.method: Any = program.load_method("forward")
        self.fixed_batch: int | None = int(self.method.metadata.input_tensor_meta(0).sizes()[0])
        _open.add(self)

    def run(self, inputs: Floats) -> Floats:
        """Return the outputs of one inference."""
        try:
            [outputs] = self.method.execute([torch.from_numpy(np.ascontiguousarray(inputs))])
        except RuntimeError as error:
            raise ExportError(
                f"ExecuTorch cannot run the file here: {str(error).splitlines()[0]}",
                "an operator of this network has no kernel there; use another target",
            ) from error
        return np.array(outputs.numpy(), np.float32)

    def timer(self, inputs: Floats) -> Timer:
        """Return what times one inference."""
        given = [torch.from_numpy(np.ascontiguousarray(inputs))]
        return wall_timer(lambda: self.method.execute(given))


def open_session(target: Target, model: Path | bytes, threads: int) -> ExecuTorchSession:
    """Open a model; see :func:`autoprune.deploy.session.open_session`.

    Raises:
        UsageError: If the file is none of ExecuTorch's.
    """
    try:
        return ExecuTorchSession(model, threads)
    except RuntimeError as error:
        name = "the file" if isinstance(model, bytes) else repr(str(model))
        raise UsageError(
            f"{name} cannot be read as a .pte file: {str(error).splitlines()[0]}",
            "export it again with this version of ExecuTorch",
        ) from error
