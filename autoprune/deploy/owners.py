"""Which layer of the network each node of a runtime works for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from autoprune.deploy.session import NodeTime
from autoprune.target import Target


def layers_of_nodes(
    model: Path, nodes: Sequence[NodeTime], layers: Collection[str], target: Target
) -> list[str]:
    """Return the layer that each timed node of a model file works for.

    A node that is no layer, such as a conversion between float and int8 or an addition, works for the layer whose
    outputs it gets, the last one of several.

    Args:
        model: The model file.
        nodes: From :func:`autoprune.deploy.session.node_times`, in the order of execution.
        layers: Names of the network's layers.
        target: How it is run.

    Returns:
        For each node the layer; empty before the first one.
    """
    module: Any = import_module(f"autoprune.deploy.{target.runtime}")
    found: list[str] = module.layers_of_nodes(model, nodes, layers, target)
    return found
