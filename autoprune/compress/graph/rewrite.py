"""A network written anew as a graph of its own layers, whose sizes are attributes that surgery can change.

A forward pass often holds numbers of channels or heads: ``x.view(n, 12, 64)``. A network that is cut computes with
others. In the graph such a number is an attribute, a member of the group that it counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from autoprune.compress.graph.capture import Captured, arguments_of, layer_of, sizes_of
from autoprune.compress.graph.leaves import Leaves, attribute
from autoprune.compress.graph.network import LAYER, GraphNetwork, make_network
from autoprune.compress.layers import Conv, split_name

_VIEWS = ("view", "reshape", "_unsafe_view")
_DIVIDING = ("chunk", "split", "tensor_split", "split_with_sizes")


@dataclass(frozen=True)
class Rewritten:
    """A network as a graph.

    Attributes:
        network: Computes what the network does in evaluation mode, with its own parameters.
        nodes: The network's node for each operation of the exported graph.
        layers: Names of the layers that operations became.
    """

    network: GraphNetwork
    nodes: Mapping[fx.Node, fx.Node]
    layers: Mapping[fx.Node, str]


def rewrite(model: nn.Module, captured: Captured) -> Rewritten:
    """Write a network as a graph of its layers.

    Dropout works in training as it did; everything else is what the network computes in evaluation mode. Images have
    to be as large as the example, the number of examples is free where the network leaves it free.

    Args:
        model: The network; its layers and parameters are shared.
        captured: Its exported graph.
    """
    return _Writer(model, captured).written()


class _Writer:
    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self.model = model
        self.captured = captured
        self.leaves = Leaves(model, captured)
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.of: dict[fx.Node, Any] = {}
        self.layers: dict[fx.Node, str] = {}

    def written(self) -> Rewritten:
        """Return the network."""
        for node in self.captured.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self.graph.output(self._value(node.args[0]))
            else:
                raise NotImplementedError(f"{node.op} {node.target} cannot be rewritten")
        names = [f"input_{place}" for place in range(self.captured.in_spec.child(0).num_children)]
        names += list(self.captured.in_spec.child(1).context)
        self.graph._codegen = _PyTreeCodeGen(
            _PyTreeInfo(names, self.captured.in_spec, self.captured.out_spec)
        )
        owners = {name: module for name, module in self._owners() if name not in self.leaves.made}
        network = make_network({**self.root, **owners}, self.graph, type(self.model).__name__)
        nodes = {node: new for node, new in self.of.items() if isinstance(new, fx.Node)}
        return Rewritten(network, nodes, self.layers)

    def _owners(self) -> list[tuple[str, nn.Module]]:
        """Return the layers whose parameters the graph reads without running them."""
        found: dict[str, nn.Module] = {}
        for name in self.root:
            owner, own = split_name(name)
            module = self.leaves.modules.get(owner)
            if own in ("weight", "bias") and isinstance(module, Conv | nn.Linear):
                found[owner] = module
        return list(found.items())

    def _placeholder(self, node: fx.Node) -> None:
        if node.name not in self.captured.tensors:
            self.of[node] = self.graph.placeholder(node.name)

    def _value(self, argument: Any) -> Any:
        """Return an argument with the new nodes in it."""
        return fx.node.map_arg(argument, self._node)

    def _node(self, node: fx.Node) -> Any:
        if node not in self.of:
            name = self.captured.tensors[node.name]
            tensor: Tensor = self.captured.constants[node.name] if not name else attribute(self.model, name)
            target = name or f"constants.{node.name}"
            self.root[target] = tensor
            self.of[node] = self.graph.get_attr(target)
        return self.of[node]

    def _call(self, node: fx.Node) -> None:
        if not node.users and "assert" in str(node.target):
            return
        leaf = self.leaves.of(node)
        if leaf is not None:
            self.root[leaf.name] = leaf.module
            self.of[node] = self.graph.call_module(leaf.name, (self._value(leaf.input),))
            if not isinstance(leaf.module, nn.Dropout):
                self.layers[node] = leaf.name
        else:
            self.of[node] = self._function(node)
        # Numbers, such as the number of examples, belong to no block: others use them too.
        is_number = not isinstance(node.meta.get("val"), Tensor | list | tuple)
        self.of[node].meta[LAYER] = "" if is_number else layer_of(node)

    def _function(self, node: fx.Node) -> fx.Node:
        target: Any = node.target
        name = str(target).removeprefix("aten.").partition(".")[0]
        args, kwargs = list(node.args), dict(node.kwargs)
        if name in _VIEWS and isinstance(args[1], Sequence):
            # A view of the example may not be one of a network that was cut: its strides are others.
            target, args[1] = torch.ops.aten.reshape.default, _free_sizes(args[1])
        elif name == "expand":
            sizes: Any = args[1]
            args[1] = _kept_sizes(sizes, sizes_of(node.all_input_nodes[0]), sizes_of(node))
        elif name in _DIVIDING and (pieces := _pieces(node)):
            place = int(arguments_of(node).get("dim", 0))
            target, args, kwargs = torch.ops.aten.split_with_sizes.default, [args[0], pieces, place], {}
        elif name == "scaled_dot_product_attention" and kwargs.get("scale") is None:
            # By the width of the dense network's heads, whatever is cut.
            kwargs["scale"] = sizes_of(node.all_input_nodes[0])[-1] ** -0.5
        given = self._value(kwargs)
        if given.get("device") is not None:
            given = {**given, "device": self._device()}
        return self.graph.call_function(target, self._value(tuple(args)), given)

    def _device(self) -> fx.Node:
        """Return a node that holds where the first input lies, which the graph's own tensors have to follow."""
        first = next(node for node in self.graph.nodes if node.op == "placeholder")
        return self.graph.call_function(getattr, (first, "device"))


def _free_sizes(sizes: Sequence[Any]) -> list[Any]:
    """Leave the one size that follows the number of examples open, so that it may count other things too."""
    computed = [place for place, size in enumerate(sizes) if not isinstance(size, int)]
    if len(computed) != 1 or -1 in sizes:
        return list(sizes)
    return [-1 if place in computed else size for place, size in enumerate(sizes)]


def _kept_sizes(sizes: Sequence[Any], before: Sequence[int], after: Sequence[int]) -> list[Any]:
    """Leave the sizes that an expansion keeps open."""
    padded = [0] * (len(after) - len(before)) + list(before)
    return [-1 if old == new else size for size, old, new in zip(sizes, padded, after, strict=True)]


def _pieces(node: fx.Node) -> list[int]:
    """Return the sizes of the pieces that an operation divides a tensor into; nothing where they are not fixed."""
    place = int(arguments_of(node).get("dim", 0))
    sizes = [value.shape[place] for value in node.meta["val"]]
    return [] if any(isinstance(size, torch.SymInt) for size in sizes) else [int(size) for size in sizes]
