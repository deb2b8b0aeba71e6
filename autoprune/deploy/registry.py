"""Runtimes by the name of a target."""

from __future__ import annotations

from autoprune.deploy.runtime import Runtime
from autoprune.target import Target


def make_runtime(target: Target) -> Runtime:
    """Return the runtime that a target names.

    Raises:
        UsageError: If it is not installed here; with the line that installs it.
    """
    target.check_installed()
    # Each loads a library that others may lack.
    if target.runtime == "openvino":
        from autoprune.deploy.openvino import OpenVino

        return OpenVino(target)
    if target.runtime == "torch":
        from autoprune.deploy.torch import Torch

        return Torch(target)
    if target.runtime == "executorch":
        from autoprune.deploy.executorch import ExecuTorch

        return ExecuTorch(target)
    if target.runtime == "tensorrt":
        from autoprune.deploy.tensorrt import TensorRt

        return TensorRt(target)
    from autoprune.deploy.onnxruntime import OnnxRuntime

    return OnnxRuntime(target)
