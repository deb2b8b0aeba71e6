"""TensorRT's sessions on a GPU, with torch's tensors as buffers.

Written from the documentation of TensorRT 11; it has not been run on a GPU.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt
import torch
from torch import Tensor, cuda

from autoprune.deploy.session import Floats, NodeTime, Timer
from autoprune.errors import UsageError
from autoprune.target import Target

_WARM_RUNS = 3


def opening(target: Target) -> dict[str, Any]:
    """Return the settings of a session; see :func:`autoprune.deploy.session.opening`."""
    return {"batch": target.batch, "device": target.device}


class TensorRtSession:
    """One engine; see :class:`autoprune.deploy.session.Session`.

    Args:
        engine: A ``tensorrt.ICudaEngine`` with one input and one output.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.context = engine.create_execution_context()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.input, self.output = (
            next(name for name in names if engine.get_tensor_mode(name) == mode)
            for mode in (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
        )
        # An engine is built for one number of examples, by its graph or by its one profile.
        own, profile = engine.get_tensor_shape(self.input)[0], engine.get_tensor_profile_shape(self.input, 0)
        self.fixed_batch: int | None = int(own if own > 0 else profile[1][0])
        self.stream: Any = cuda.Stream()  # type: ignore[no-untyped-call]

    def bind(self, inputs: Floats) -> tuple[Tensor, Tensor]:
        """Put inputs on the GPU and tell the engine where they and its outputs are; return both."""
        given = _on_gpu(torch.from_numpy(np.ascontiguousarray(inputs)))
        self.context.set_input_shape(self.input, tuple(given.shape))
        shape = tuple(self.context.get_tensor_shape(self.output))
        made = _on_gpu(torch.empty(shape, dtype=torch.float32))
        for name, tensor in ((self.input, given), (self.output, made)):
            self.context.set_tensor_address(name, tensor.data_ptr())
        cuda.synchronize()
        return given, made

    def execute(self) -> None:
        """Start one inference of what is bound."""
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise RuntimeError("TensorRT could not start an inference")

    def run(self, inputs: Floats) -> Floats:
        """Return the outputs of one inference."""
        _given, made = self.bind(inputs)
        self.execute()
        self.stream.synchronize()
        outputs: Floats = made.cpu().numpy()
        return outputs

    def timer(self, inputs: Floats) -> Timer:
        """Return what times one inference between two events; inputs lie on the GPU before, outputs stay there."""
        bound = self.bind(inputs)
        begun, ended = (cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

        def once() -> float:
            _keep = bound  # the engine knows addresses alone
            cuda.synchronize()
            begun.record(self.stream)
            self.execute()
            ended.record(self.stream)
            ended.synchronize()
            return float(begun.elapsed_time(ended)) / 1e3

        return once


def _on_gpu(tensor: Tensor) -> Tensor:
    return tensor.cuda()


def open_engine(model: Path | bytes) -> Any:
    """Return the engine of a file, or of its content.

    An engine is machine code for one kind of GPU and one version of TensorRT.

    Raises:
        UsageError: If it cannot be opened here.
    """
    content = model if isinstance(model, bytes) else model.read_bytes()
    engine = _runtime().deserialize_cuda_engine(content)
    if engine is None:
        name = "the engine" if isinstance(model, bytes) else repr(str(model))
        raise UsageError(
            f"{name} cannot be opened by TensorRT {trt.__version__} on this GPU",
            "engines belong to the version and the kind of GPU that they were built with: build it again here",
        )
    return engine


@cache
def _runtime() -> Any:
    """Return the one runtime of this process, which has to outlive its engines."""
    return trt.Runtime(trt.Logger(trt.Logger.ERROR))


def open_session(target: Target, model: Path | bytes, threads: int) -> TensorRtSession:
    """Open a model; see :func:`autoprune.deploy.session.open_session`."""
    return TensorRtSession(open_engine(model))


def node_times(target: Target, model: Path, inputs: Floats, runs: int, limit_s: float) -> list[NodeTime]:
    """Return what each layer of the engine takes by TensorRT's own profiler.

    See :func:`autoprune.deploy.session.node_times`.
    """
    opened = TensorRtSession(open_engine(model))
    bound = opened.bind(inputs)
    for _ in range(_WARM_RUNS):
        opened.execute()
    opened.stream.synchronize()
    seen: dict[str, list[float]] = {}

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            seen.setdefault(layer_name, []).append(ms / 1e3)

    opened.context.profiler = Profiler()
    begun = time.perf_counter()
    for _ in range(runs):
        opened.execute()
        opened.stream.synchronize()
        if time.perf_counter() - begun > limit_s:
            break
    del bound
    return [NodeTime(name, "", tuple(durations)) for name, durations in seen.items()]
