"""Coupled channels of a network, found in its exported graph."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from autoprune.compress.graph.capture import capture
from autoprune.compress.graph.describe import describe_groups
from autoprune.compress.graph.layer_rules import LAYER_RULES
from autoprune.compress.graph.network import GraphNetwork
from autoprune.compress.graph.propagate import Dims, Propagation
from autoprune.compress.graph.rewrite import rewrite
from autoprune.compress.graph.shape_rules import SHAPE_RULES
from autoprune.compress.graph.sizes import find_sizes, write_sizes
from autoprune.compress.graph.units import Ids, Units
from autoprune.compress.layers import Conv
from autoprune.space.groups import Group

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traced:
    """What is known of a network.

    Attributes:
        network: The network as a graph, whose sizes are attributes.
        groups: All groups in the order of the model's modules. Every convolution and linear layer is a producer in
            exactly one. Groups that cannot be cut for a reason seen in the graph are not prunable; the others are
            candidates, which surgery still has to prove.
        free_batch: Whether the graph takes any number of examples.
        units: All units.
        units_of: Those of each group that can be cut, by its name.
        dims: What each node of the graph makes, by the node's name.
    """

    network: GraphNetwork
    groups: tuple[Group, ...]
    free_batch: bool
    units: Units
    units_of: Mapping[str, Ids]
    dims: Mapping[str, Dims]


def _has_more_in_training(model: nn.Module, found: Propagation) -> bool:
    """Whether some layers are not run in evaluation; attention's output projection is run by its owner."""
    run = {layer for layer, _ in found.sides}
    return any(
        name not in run and isinstance(module, Conv | nn.Linear) for name, module in model.named_modules()
    )


def _follow_training(model: nn.Module, inputs: Tensor, found: Propagation) -> None:
    try:
        training = capture(model, (inputs,), training=True)
    except Exception as error:  # whatever the code does in training; its layers are left alone by name then
        _log.info("what the network computes in training cannot be exported: %s", error)
        return
    found.also(training)


def trace(model: nn.Module, example: Tensor) -> Traced:
    """Find the coupled channels of ``model``, and write it as a graph.

    Args:
        model: The network on the CPU; it is not changed, and the graph shares its parameters.
        example: One batch of inputs, of at least two examples.

    Raises:
        Exception: Whatever the network's forward or its export raise.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        inputs = example if len(example) > 1 else example.repeat(2, *[1] * (example.dim() - 1))
        captured = capture(model, (inputs,))
        rewritten = rewrite(model, captured)
        found = Propagation(captured, {**LAYER_RULES, **SHAPE_RULES}, rewritten.layers)
        if _has_more_in_training(model, found):
            # Auxiliary classifiers: what they read is cut in them too.
            _follow_training(model, inputs, found)
        sizes = find_sizes(found)
        described = describe_groups(model, rewritten.network, found, sizes)
    finally:
        for module, training in modes:
            module.training = training
    nodes = rewritten.nodes
    counted = {m.layer for g in described.groups if g.prunable for m in g.members if m.kind == "size"}
    write_sizes(rewritten.network, nodes, [size for size in sizes if size.name in counted])
    dims = {nodes[node].name: dims for node, dims in found.of.items() if node in nodes}
    return Traced(
        rewritten.network, described.groups, captured.free_batch, found.units, described.units, dims
    )
