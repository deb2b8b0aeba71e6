"""Coupled channels of a network, found in its exported graph."""

from __future__ import annotations

from torch import Tensor, nn

from autoprune.compress.graph.capture import capture
from autoprune.compress.graph.describe import describe_groups
from autoprune.compress.graph.layer_rules import LAYER_RULES
from autoprune.compress.graph.propagate import Propagation
from autoprune.compress.graph.shape_rules import SHAPE_RULES
from autoprune.space.groups import Group


def trace_groups(model: nn.Module, example: Tensor) -> list[Group]:
    """Find the coupled channels of ``model``.

    Args:
        model: The network on the CPU.
        example: One batch of inputs, of at least two examples.

    Returns:
        All groups in the order of the model's modules. Every convolution and linear layer is a producer in exactly
        one. Groups that cannot be cut for a reason seen in the graph are not prunable; the others are candidates,
        which surgery still has to prove.

    Raises:
        Exception: Whatever the network's forward or its export raise.
    """
    inputs = example if len(example) > 1 else example.repeat(2, *[1] * (example.dim() - 1))
    found = Propagation(capture(model, (inputs,)), {**LAYER_RULES, **SHAPE_RULES})
    return describe_groups(model, found)
