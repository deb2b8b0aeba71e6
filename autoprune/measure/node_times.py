"""Time of every layer inside of whole exported models, conversions between float and int8 included."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import onnx

from autoprune.config import Target
from autoprune.deploy.onnxruntime import executed_graph, executed_layers
from autoprune.measure.latency import run_worker

# The runtime's profiler writes a line for every node of every run, so it is not let run for long.
_RUNS = 150
_RUN_S = 0.5


def layer_seconds(
    models: Sequence[Path],
    layers: Collection[str],
    target: Target,
    input_shape: Sequence[int],
    *,
    timeout_s: float = 1800.0,
) -> list[dict[str, float]]:
    """Profile model files and return what each layer takes in each of them.

    Args:
        models: Model files.
        layers: Names of the network's layers.
        target: Threads and batch.
        input_shape: Shape of one example.
        timeout_s: Seconds after which the measurement has failed.

    Returns:
        For each model the seconds by layer, beyond those of nodes that do nothing; what comes before the first layer
        has an empty name.

    Raises:
        TrialError: If the measuring process fails.
    """
    job = {
        "kind": "nodes",
        "models": [str(path) for path in models],
        "threads": target.threads,
        "batch": target.batch,
        "input_shape": list(input_shape),
        "runs": _RUNS,
        "limit_s": _RUN_S,
    }
    found = []
    for path, nodes in zip(models, run_worker(job, timeout_s)["nodes"], strict=True):
        executed = executed_graph(str(path), target.threads)
        owners = executed_layers(onnx.load(path).graph, executed, layers)
        # The profiler's own time is in every event: it is what the node takes that does next to nothing.
        shortest_s = min((node["seconds"] for node in nodes), default=0.0)
        # Nodes without a name are numbered anew in each session; both lists are in the order of execution.
        alike = [node["operator"] for node in nodes] == [node.op_type for node in executed.node]
        by_name = {node.name: owner for node, owner in zip(executed.node, owners, strict=True)}
        seconds: dict[str, float] = {}
        for place, node in enumerate(nodes):
            layer = owners[place] if alike else by_name.get(node["name"], "")
            seconds[layer] = seconds.get(layer, 0.0) + node["seconds"] - shortest_s
        found.append(seconds)
    return found
