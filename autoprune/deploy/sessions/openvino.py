"""OpenVINO's sessions on the CPU: one stream, threads and precision as told, never as the plug-in likes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from autoprune.deploy.session import Floats, NodeTime, Timer, wall_timer
from autoprune.target import Target

_HINTS = {"float32": "f32", "bfloat16": "bf16"}


def compile_options(target: Target, threads: int) -> dict[str, Any]:
    """Return the properties with which models are compiled.

    Left to itself the plug-in computes "float32" in bfloat16 where the processor can, rounds inputs of layers with
    compressed weights to 8 bits, and divides the cores into streams; all three are said here.

    Args:
        target: What float layers compute in.
        threads: Threads of one inference.
    """
    return {
        "INFERENCE_PRECISION_HINT": _HINTS[target.precision],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # The measuring process pins itself.
        "ENABLE_CPU_PINNING": False,
    }


def opening(target: Target) -> dict[str, Any]:
    """Return the properties of a model; see :func:`autoprune.deploy.session.opening`."""
    return compile_options(target, target.threads)


def compile_model(target: Target, model: Path | bytes, threads: int, **more: Any) -> ov.CompiledModel:
    """Compile a model file or its content."""
    core = ov.Core()
    read = core.read_model(model if isinstance(model, bytes) else str(model))
    return core.compile_model(read, "CPU", {**compile_options(target, threads), **more})


class OpenVinoSession:
    """One compiled model; see :class:`autoprune.deploy.session.Session`.

    Args:
        compiled: The model.
    """

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self.compiled = compiled
        first = compiled.input(0).get_partial_shape()[0]
        self.fixed_batch = int(first.get_length()) if first.is_static else None
        self.request = compiled.create_infer_request()

    def run(self, inputs: Floats) -> Floats:
        """Return the outputs of one inference."""
        found = self.request.infer({0: inputs}, share_inputs=True)
        return np.array(found[self.compiled.output(0)], dtype=np.float32)

    def timer(self, inputs: Floats) -> Timer:
        """Return what times one inference; inputs are in place before, as onnxruntime's are."""
        self.request.set_input_tensor(0, ov.Tensor(np.ascontiguousarray(inputs), shared_memory=False))
        return wall_timer(self.request.infer)


def open_session(target: Target, model: Path | bytes, threads: int) -> OpenVinoSession:
    """Open a model; see :func:`autoprune.deploy.session.open_session`."""
    return OpenVinoSession(compile_model(target, model, threads))


def node_times(target: Target, model: Path, inputs: Floats, runs: int, limit_s: float) -> list[NodeTime]:
    """Return what each node takes by the plug-in's counters; see :func:`autoprune.deploy.session.node_times`.

    The counters have whole microseconds, and are told one inference at a time.
    """
    opened = OpenVinoSession(compile_model(target, model, target.threads, PERF_COUNT=True))
    once = opened.timer(inputs)
    once()
    durations: dict[tuple[str, str], list[float]] = {}
    begun = time.perf_counter()
    for _ in range(runs):
        once()
        for info in opened.request.get_profiling_info():
            if info.status == ov.ProfilingInfo.Status.EXECUTED:
                durations.setdefault((info.node_name, info.node_type), []).append(
                    info.real_time.total_seconds()
                )
        if time.perf_counter() - begun > limit_s:
            break
    return [NodeTime(*node, tuple(seen)) for node, seen in durations.items()]
