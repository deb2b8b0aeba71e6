"""A network that runs a graph of its own layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

# Key of a node's meta data: the module of the original network that ran it.
LAYER = "layer"
_PASSING = ("add", "relu", "dropout", "clone", "contiguous", "alias", "to", "gelu", "silu")


class _Shared:
    """A graph that copies of a network share: nothing changes it."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph

    def __deepcopy__(self, _: dict[int, Any]) -> _Shared:
        return self


class GraphNetwork(nn.Module):
    """A network whose forward pass was written from a graph.

    Its modules are the layers, by their names in the original network; its other attributes are parameters, buffers
    and sizes that the graph reads. Unlike ``fx.GraphModule`` it keeps modules whose parameters alone are read, and
    copies of it share the code.
    """

    @property
    def graph(self) -> fx.Graph:
        """What the network runs; never to be changed in place."""
        shared: _Shared = self.__dict__["shared"]
        return shared.graph

    def run_graph(self, graph: fx.Graph) -> None:
        """Run another graph of the same layers from now on."""
        name = type(self).__name__
        compiled = fx.GraphModule(self, graph, name)
        self.__dict__["shared"] = _Shared(graph)
        for own in ("_in_spec", "_out_spec"):
            self.__dict__[own] = getattr(compiled, own)
        self.__class__ = type(name, (GraphNetwork,), {"forward": type(compiled).forward})


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Return the sizes that a network's graph reads, by name; none for a network that is no graph."""
    if not isinstance(model, GraphNetwork):
        return {}
    return {
        f"{name}.{own}".lstrip("."): value
        for name, module in model.named_modules()
        for own, value in vars(module).items()
        if own.startswith("size_") and isinstance(value, int)
    }


def make_network(
    parts: Mapping[str, nn.Module | Tensor], graph: fx.Graph, name: str = "GraphNetwork"
) -> GraphNetwork:
    """Return a network.

    Args:
        parts: Layers, parameters and buffers by their names.
        graph: What it runs.
        name: Name of its class, for people.
    """
    network: GraphNetwork = type(name, (GraphNetwork,), {})()
    # Modules before their own parts.
    for target in sorted(parts, key=lambda target: target.count(".")):
        *owners, own = target.split(".")
        holder: nn.Module = network
        for owner in owners:
            if owner not in holder._modules:
                holder.add_module(owner, nn.Module())
            holder = holder.get_submodule(owner)
        part = parts[target]
        if isinstance(part, nn.Module):
            holder.add_module(own, part)
        elif isinstance(part, nn.Parameter):
            holder.register_parameter(own, part)
        elif own not in holder._buffers:
            holder.register_buffer(own, part)
    network.run_graph(graph)
    return network.eval()


def block_ends(graph: fx.Graph, block: str) -> tuple[fx.Node, fx.Node] | None:
    """Return the value that goes through a module of the original network unchanged but for additions, and its result.

    Args:
        graph: The network's graph.
        block: Name of the module.

    Returns:
        None unless it makes one value, and one that it reads gets there by additions and activations alone.
    """
    inside = {node for node in graph.nodes if _runs_in(node, block)}
    makes = [
        node for node in graph.nodes if node in inside and any(user not in inside for user in node.users)
    ]
    if len(makes) != 1:
        return None
    reached: set[fx.Node] = set()
    waiting, seen = [makes[0]], set()
    while waiting:
        node = waiting.pop()
        if node in seen or node.op == "get_attr":
            continue
        seen.add(node)
        if node not in inside:
            reached.add(node)
        elif _passes(node):
            waiting += node.all_input_nodes
    return (reached.pop(), makes[0]) if len(reached) == 1 else None


def bypass(network: GraphNetwork, block: str) -> None:
    """Let the value that a block reads take the place of what it makes, and drop its layers, in place.

    Raises:
        ValueError: If nothing goes through the block.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(network.graph, {}))
    graph._codegen = network.graph._codegen
    ends = block_ends(graph, block)
    if ends is None:
        raise ValueError(f"nothing goes through {block!r}")
    ends[1].replace_all_uses_with(ends[0])
    # What writes into a tensor is needed though nothing reads what it returns.
    graph.eliminate_dead_code(
        lambda node: node.op in ("placeholder", "output") or (_writes(node) and not _runs_in(node, block))
    )
    _drop_unused(network, graph)
    network.run_graph(graph)


def _runs_in(node: fx.Node, block: str) -> bool:
    return f"{node.meta.get(LAYER, '')}.".startswith(f"{block}.") and node.op in (
        "call_function",
        "call_module",
    )


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _passes(node: fx.Node) -> bool:
    """Whether an operation adds values, or lets a large positive one pass."""
    return str(node.target).removeprefix("aten.").partition(".")[0].rstrip("_") in _PASSING


def _drop_unused(network: nn.Module, graph: fx.Graph) -> None:
    """Delete the modules of a network that a graph neither runs nor reads parameters of."""
    read = [str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")]
    needed = {target[:place] for target in read for place, letter in enumerate(f"{target}.") if letter == "."}
    for name, _ in list(network.named_modules()):
        owner, _, own = name.rpartition(".")
        # What lies inside a layer goes or stays with it.
        if name and name not in needed and owner not in read and (not owner or owner in needed):
            network.get_submodule(owner)._modules.pop(own)
