"""Time of every layer inside of whole exported models, conversions between float and int8 included."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from autoprune.deploy.owners import layers_of_nodes
from autoprune.deploy.session import NodeTime
from autoprune.measure.process import run_worker
from autoprune.target import Target

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
        has an empty name. Nothing for a runtime that does not tell the times of its nodes.

    Raises:
        TrialError: If the measuring process fails.
    """
    job = {
        "kind": "nodes",
        "models": [str(path) for path in models],
        "target": target.model_dump(mode="json"),
        "input_shape": list(input_shape),
        "runs": _RUNS,
        "limit_s": _RUN_S,
    }
    found: list[dict[str, float]] = []
    for path, told in zip(models, run_worker(job, timeout_s)["nodes"], strict=True):
        if told is None:
            found.append({})
            continue
        nodes = [NodeTime(each["name"], each["operator"], (each["seconds"],)) for each in told]
        owners = layers_of_nodes(path, nodes, layers, target)
        # The profiler's own time is in every event: it is what the node takes that does next to nothing.
        shortest_s = min((node.durations_s[0] for node in nodes), default=0.0)
        seconds: dict[str, float] = {}
        for layer, node in zip(owners, nodes, strict=True):
            seconds[layer] = seconds.get(layer, 0.0) + node.durations_s[0] - shortest_s
        found.append(seconds)
    return found
