"""onnxruntime's sessions on the CPU."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from autoprune.deploy.session import Floats, NodeTime, Timer, run_all, wall_timer
from autoprune.target import Target, usable_cores

# Left on, this optimiser turns a float layer between two int8 layers into int8, against what the recipe says.
SESSION_ENTRIES = {"optimization.disable_specified_optimizers": "WeightBiasQuantization"}
_PROVIDERS = ["CPUExecutionProvider"]
_KERNEL = "_kernel_time"


def session_options(threads: int) -> ort.SessionOptions:
    """Return the options of a session.

    Args:
        threads: Threads of one inference.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that wait by spinning take the cores from the model that is timed next: with two threads a ratio of
    # 0.28 was measured as 0.07.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in SESSION_ENTRIES.items():
        options.add_session_config_entry(key, value)
    return options


def opening(target: Target) -> dict[str, str]:
    """Return the entries of a session; see :func:`autoprune.deploy.session.opening`."""
    return SESSION_ENTRIES


class OrtSession:
    """One session; see :class:`autoprune.deploy.session.Session`.

    Args:
        model: The file or its content.
        options: Of the session.
    """

    def __init__(self, model: Path | bytes, options: ort.SessionOptions) -> None:
        source = model if isinstance(model, bytes) else str(model)
        self.session = ort.InferenceSession(source, options, providers=_PROVIDERS)
        self.input = self.session.get_inputs()[0]
        first = self.input.shape[0]
        self.fixed_batch = first if isinstance(first, int) else None

    def run(self, inputs: Floats) -> Floats:
        """Return the outputs of one inference."""
        return np.asarray(self.session.run(None, {self.input.name: inputs})[0])

    def timer(self, inputs: Floats) -> Timer:
        """Return what times one inference."""
        feed = {self.input.name: inputs}
        return wall_timer(lambda: self.session.run(None, feed))


def run_onnx(raw: bytes, inputs: Floats, *, optimized: bool = True) -> Floats:
    """Return what a file gives on all cores.

    Args:
        raw: Content of the file.
        inputs: Any number of examples.
        optimized: Whether the runtime's own graph is run; else every operator as the standard describes it.
    """
    options = session_options(usable_cores())
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return run_all(OrtSession(raw, options), inputs)


def open_session(target: Target, model: Path | bytes, threads: int) -> OrtSession:
    """Open a model; see :func:`autoprune.deploy.session.open_session`."""
    return OrtSession(model, session_options(threads))


def node_times(target: Target, model: Path, inputs: Floats, runs: int, limit_s: float) -> list[NodeTime]:
    """Return what each node takes by the runtime's own profiler; see :func:`autoprune.deploy.session.node_times`."""
    with tempfile.TemporaryDirectory(prefix="autoprune-nodes-") as folder:
        options = session_options(target.threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "run")
        opened = OrtSession(model, options)
        once = opened.timer(inputs)
        begun = time.perf_counter()
        for _ in range(runs):
            once()
            if time.perf_counter() - begun > limit_s:
                break
        events = json.loads(Path(opened.session.end_profiling()).read_text(encoding="utf-8"))
    durations: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            node = (event["name"].removesuffix(_KERNEL), event["args"]["op_name"])
            durations.setdefault(node, []).append(event["dur"] / 1e6)
    # The first run is cold.
    return [NodeTime(*node, tuple(seen[1:] or seen)) for node, seen in durations.items()]
