"""Integer layers as explicit steps in a graph: quantize, dequantize, and the float operator between them.

Runtimes that know these steps run what lies between them in integers; torch runs them as they are written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers the steps, as ExecuTorch itself has it do)

from autoprune.deploy.integers import INT8_TOP, integers_of
from autoprune.deploy.layered import Layered
from autoprune.deploy.layers import Layer, module_name
from autoprune.deploy.runtime import StoredWeight

_steps = torch.ops.quantized_decomposed
_aten = torch.ops.aten
_LOW, _HIGH = -128, 127
_LEAST = 1e-6
# Activations that kernels join to the layer before them.
_JOINED = (_aten.relu.default, _aten.relu_.default, _aten.relu6.default, _aten.relu6_.default,
           _aten.hardtanh.default, _aten.hardtanh_.default)  # fmt: skip
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor)
Range = tuple[float, float]


class IntegerWeight(nn.Module):
    """A layer whose weight is dequantized from integers, one scale for each output channel.

    Args:
        layer: The layer.
        stored: The grid of its weight; the nearest of 8 bits if None.
        dynamic: Whether its inputs are rounded over the range of each inference; else it gets them rounded.
    """

    def __init__(self, layer: Layer, stored: StoredWeight | None, dynamic: bool) -> None:
        super().__init__()
        codes, scales = integers_of(layer, stored)
        self.operator, self.after, self.axis, self.dynamic = layer.operator, layer.after, layer.axis, dynamic
        self.codes, self.scales = nn.Buffer(codes), nn.Buffer(scales[:, 0].contiguous())
        self.zeros = nn.Buffer(torch.zeros(len(scales), dtype=torch.int64))
        self.bias = layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs."""
        if self.dynamic:
            step, zero = _steps.choose_qparams.tensor(inputs, _LOW, _HIGH, _LEAST, torch.int8)
            grid = (step, zero, _LOW, _HIGH, torch.int8)
            inputs = _steps.dequantize_per_tensor.tensor(
                _steps.quantize_per_tensor.tensor(inputs, *grid), *grid
            )
        weight = _steps.dequantize_per_channel.default(
            self.codes, self.scales, self.zeros, self.axis, -INT8_TOP, INT8_TOP, torch.int8
        )
        outputs: Tensor = self.operator(inputs, weight, self.bias, *self.after)
        return outputs


def with_steps(
    network: Layered,
    int8: Collection[str],
    dynamic: Collection[str],
    weights: Mapping[str, StoredWeight],
    batches: Sequence[Tensor],
    given: Mapping[str, Range],
) -> fx.GraphModule:
    """Return a network whose layers are between quantizing steps; its graph is changed.

    What a layer in static int8 makes is rounded too, behind an activation that follows it: integer kernels give
    integers. So is a sum of two such values.

    Args:
        network: The network in float.
        int8: Layers that get inputs rounded over ranges from ``batches``.
        dynamic: Layers that get inputs rounded over the range of each inference.
        weights: Grids of weights.
        batches: Inputs of the network, ``(n, C, H, W)``.
        given: Ranges of inputs by layer that are taken instead.
    """
    graph = network.graph.graph
    calls = {n: name for name in int8 for n in graph.nodes if n.target == module_name(name)}
    sums = [n for n in graph.nodes if n.target in _SUMS and all(isinstance(a, fx.Node) for a in n.args)]
    ends = {node: _end(node) for node in (*calls, *sums)}
    ranges = _ranges(network, {*ends.values(), *(node.args[0] for node in calls)}, batches)
    ranges |= {node.args[0]: given[name] for node, name in calls.items() if name in given}
    grids: dict[Any, _Rounded] = {}
    for node in [n for n in graph.nodes if n in ends]:
        if node in calls and node.args[0] not in grids:
            grids[node.args[0]] = _Rounded(graph, node.args[0], ranges[node.args[0]])
        # A sum is of integers where both of its parts are.
        if node in calls or all(part in grids for part in node.args):
            for part in dict.fromkeys(node.all_input_nodes):
                node.replace_input_with(part, grids[part].value())
            grids[ends[node]] = _Rounded(graph, ends[node], ranges[ends[node]])
    for rounded in grids.values():
        rounded.reach_others()
    made = {n: IntegerWeight(network.layers[n], weights.get(n), n in dynamic) for n in (*int8, *dynamic)}
    return network.with_layers(made)


class _Rounded:
    """A value of a graph that is rounded to integers behind what makes it.

    Args:
        graph: The graph.
        node: What makes it.
        limits: Its lowest and highest value, between which 0 lies.
    """

    def __init__(self, graph: fx.Graph, node: Any, limits: Range) -> None:
        step = max((limits[1] - limits[0]) / (_HIGH - _LOW), _LEAST)
        zero = min(max(round(_LOW - limits[0] / step), _LOW), _HIGH)
        self.graph, self.node, self.grid = graph, node, (step, zero, _LOW, _HIGH, torch.int8)
        self.others = list(node.users)
        with graph.inserting_after(node):
            self.integers = graph.call_function(_steps.quantize_per_tensor.default, (node, *self.grid))

    def value(self) -> fx.Node:
        """Return a node that gives the rounded value: each reader's own, by which runtimes join it to the reader."""
        with self.graph.inserting_after(self.integers):
            return self.graph.call_function(_steps.dequantize_per_tensor.default, (self.integers, *self.grid))

    def reach_others(self) -> None:
        """Let whoever else reads the value read the rounded one."""
        for user in [user for user in self.others if user in self.node.users]:
            user.replace_input_with(self.node, self.value())


def _end(node: Any) -> Any:
    """Return the activation that alone reads what a node makes, else the node."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in _JOINED else node


def _ranges(network: Layered, nodes: Collection[Any], batches: Sequence[Tensor]) -> dict[Any, Range]:
    """Return the least and the largest value, and 0, of nodes over some inputs."""
    found: dict[Any, Range] = dict.fromkeys(nodes, (0.0, 0.0))

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            made = super().run_node(n)
            if n in found:
                low, high = found[n]
                found[n] = (min(low, float(made.min())), max(high, float(made.max())))
            return made

    with torch.no_grad():
        for batch in batches if nodes else ():
            Watching(network.graph).run(batch)
    return found
