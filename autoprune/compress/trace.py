"""Coupled channels of a network, found with torch-pruning and turned into plain groups.

torch-pruning (DepGraph [Fang2023]_) is used for one thing: its graph of which layer hands its channels to
which, with the index mappings of concatenation, splitting and flattening. The walk over that graph is ours:
it keeps every pair of (channel, root channel), so that channels that are tied in two ways end up in one unit,
and it stops at graphs on which the library's own walk does not end (Swin, MaxViT).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning.ops import OPTYPE

from autoprune.compress.layers import Conv, channel_count, layer_kind, parameter_dim
from autoprune.compress.outputs import flat_outputs
from autoprune.compress.unionfind import UnionFind
from autoprune.space.groups import Axis, Group, LayerKind, Member

# Pairs (channel, root channel) that one walk may visit. The largest of torchvision's CNNs need about 100,000;
# graphs with windows and reshapes grow without end.
_MOST_PAIRS = 400_000

Atom = tuple[str, Axis, int]


@dataclass
class _Walk:
    """What one walk found: ties between channels, and reasons why they cannot be cut."""

    ties: list[tuple[int, Atom]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


class _TooLargeError(Exception):
    """Raised inside a walk that does not seem to end."""


def trace_groups(model: nn.Module, example: Tensor) -> list[Group]:
    """Find the coupled channels of ``model``.

    Args:
        model: The network on the CPU; its parameters are set to require gradients.
        example: One batch of inputs.

    Returns:
        All groups in the order of the model's modules. Every convolution and linear layer is a producer in
        exactly one. Groups that cannot be cut for a reason seen in the graph are not prunable; the others
        are candidates, which surgery still has to prove.

    Raises:
        Exception: Whatever the network's forward or the library raise.
    """
    return _Tracer(model, example).groups()


class _Tracer:
    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.layers = dict(model.named_modules())
        self.position = {name: index for index, name in enumerate(self.layers)}
        self.producers = [n for n, m in self.layers.items() if isinstance(m, Conv | nn.Linear)]
        self.parameters = dict(model.named_parameters())
        self.names: dict[int, str] = {id(module): name for name, module in self.layers.items()}
        self.names.update({id(parameter): name for name, parameter in self.parameters.items()})
        self.tied_parameters = _tied_parameters(model)
        self.graph = _build_graph(model, example)
        self.nodes = _all_nodes(self.graph)
        self.units = UnionFind()
        self.reasons: dict[str, list[str]] = {}

    def groups(self) -> list[Group]:
        """Walk from every layer, join what is tied, and describe the result as groups."""
        reached: dict[str, set[int]] = {}
        unused = set(self.producers)
        for name in self.producers:
            starts = [node for node in self.nodes if node.module is self.layers[name]]
            if not starts:
                continue
            unused.discard(name)
            if len(reached.get(name, ())) == channel_count(self.layers[name], "out") and len(starts) == 1:
                continue
            for node in starts:
                self._absorb(name, self._walk(node), reached)
        self._tie_grouped_convolutions()
        for name in unused:
            self.reasons.setdefault(name, []).append(self._why_unused(name))
        return self._describe()

    # -- the walk ------------------------------------------------------------------------------

    def _walk(self, start: Any) -> _Walk:
        """Follow all channels of one layer's output to everything that has to be cut with them."""
        walk = _Walk()
        count = channel_count(start.module, "out")
        handler = self.graph.get_pruner_of_module(start.module).prune_out_channels
        index = torch_pruning._helpers._HybridIndex
        stack = [(start, handler, [index(idx=i, root_idx=i) for i in range(count)])]
        visited: dict[tuple[int, Callable[..., Any]], set[Any]] = {}
        pairs = 0
        try:
            while stack:
                node, handler, arrived = stack.pop()
                known = visited.setdefault((id(node), handler.__func__), set())
                fresh = [pair for pair in arrived if pair not in known]
                if not fresh:
                    continue
                known.update(fresh)
                pairs += len(fresh)
                if pairs > _MOST_PAIRS:
                    raise _TooLargeError
                self._note(walk, node, handler, fresh)
                stack.extend(self._onward(node, handler, fresh))
        except _TooLargeError:
            walk.reasons.append("the graph of its channels does not end (windows or reshapes)")
        return walk

    def _onward(
        self, node: Any, handler: Callable[..., Any], pairs: list[Any]
    ) -> Iterator[tuple[Any, Any, list[Any]]]:
        for dependency in node.dependencies:
            if not dependency.is_triggered_by(handler):
                continue
            mapped = pairs
            for mapping in dependency.index_mapping:
                if mapping is None:
                    continue
                if not mapping.reverse and len(mapped) * getattr(mapping, "_stride", 1) > _MOST_PAIRS:
                    raise _TooLargeError
                mapped = mapping(mapped)
            if mapped:
                yield dependency.target, dependency.handler, mapped

    def _note(self, walk: _Walk, node: Any, handler: Callable[..., Any], pairs: list[Any]) -> None:
        """Record what cutting these channels of this node means."""
        pruner = self.graph.get_pruner_of_module(node.module)
        axis: Axis = "out" if handler == pruner.prune_out_channels else "in"
        name = self.names.get(id(node.module))
        if node.type == OPTYPE.OUTPUT or (axis == "out" and not node.outputs):
            walk.reasons.append("its channels are the network's output")
        if any(pair.root_idx is None for pair in pairs):
            walk.reasons.append("its channels are shared by attention heads in a way that is not followed")
            return
        if node.type in (OPTYPE.MHA, OPTYPE.LSTM, OPTYPE.EMBED, OPTYPE.GN):
            walk.reasons.append(f"it is tied to {type(node.module).__name__} {name!r}, which cannot be cut")
            return
        if name is None:
            return
        kind = self._kind(name)
        if kind is None:
            if node.type != OPTYPE.ELEMENTWISE and not isinstance(node.module, nn.PReLU):
                walk.reasons.append(
                    f"it is tied to {type(node.module).__name__} {name!r}, which cannot be cut"
                )
            return
        problem = self._uncuttable(name, kind)
        if problem:
            walk.reasons.append(problem)
        count = self._count(name, axis)
        for pair in pairs:
            if not 0 <= pair.idx < count:
                walk.reasons.append(
                    f"on the way to {name!r} padding or a reshape changes the number of its channels"
                )
                return
            walk.ties.append((pair.root_idx, (name, axis, pair.idx)))

    def _kind(self, name: str) -> LayerKind | None:
        return "parameter" if name in self.parameters else layer_kind(self.layers[name])

    def _count(self, name: str, axis: Axis) -> int:
        if name in self.parameters:
            parameter = self.parameters[name]
            return int(parameter.shape[parameter_dim(parameter)]) if parameter.dim() else 0
        return channel_count(self.layers[name], axis)

    def _uncuttable(self, name: str, kind: LayerKind) -> str:
        """Return why surgery cannot cut this layer; empty if it can."""
        if kind == "parameter":
            shared = name in self.tied_parameters
            return f"it is tied to parameter {name!r}, which several layers share" if shared else ""
        module = self.layers[name]
        if isinstance(module, Conv):
            if kind == "conv" and module.groups == module.out_channels > 1:
                return f"{name!r} is a depthwise convolution with unequal numbers of inputs and outputs"
            if module.transposed and module.groups > 1:
                return f"{name!r} is a grouped transposed convolution"
        if isinstance(module, Conv | nn.Linear) and "weight" not in module._parameters:
            return f"the weight of {name!r} is parametrised"
        owned = (f"{name}.{own}" for own, p in module.named_parameters(recurse=False) if p is not None)
        shared_names = [own for own in owned if own in self.tied_parameters]
        return (
            f"it is tied to parameter {shared_names[0]!r}, which several layers share" if shared_names else ""
        )

    def _why_unused(self, name: str) -> str:
        for owner, module in self.layers.items():
            if isinstance(module, nn.MultiheadAttention) and name.startswith(f"{owner}."):
                return f"it is part of MultiheadAttention {owner!r}, which cannot be cut"
        return "the forward pass does not use it as a layer"

    # -- joining -------------------------------------------------------------------------------

    def _absorb(self, root: str, walk: _Walk, reached: dict[str, set[int]]) -> None:
        self.reasons.setdefault(root, []).extend(walk.reasons)
        for root_index, (name, axis, index) in walk.ties:
            self.units.union((root, "out", root_index), (name, axis, index))
            if axis == "out":
                reached.setdefault(name, set()).add(index)

    def _tie_grouped_convolutions(self) -> None:
        """Tie the same place in every convolution group, so that all groups stay equally large."""
        for name in self.producers:
            module = self.layers[name]
            if not isinstance(module, Conv) or module.groups == 1 or layer_kind(module) == "depthwise":
                continue
            sides: tuple[Axis, Axis] = ("out", "in")
            for axis in sides:
                each = channel_count(module, axis) // module.groups
                for place in range(each):
                    for group in range(1, module.groups):
                        self.units.union((name, axis, place), (name, axis, group * each + place))

    # -- description ---------------------------------------------------------------------------

    def _describe(self) -> list[Group]:
        """Turn the joined channels into groups: layers that share a unit as producers belong together."""
        together = UnionFind()
        maker: dict[Any, str] = {}
        for name in self.producers:
            together.find(name)
            for index in range(channel_count(self.layers[name], "out")):
                unit = self.units.find((name, "out", index))
                together.union(maker.setdefault(unit, name), name)
        components: dict[str, list[str]] = {}
        for name in self.producers:
            components.setdefault(together.find(name), []).append(name)
        atoms: dict[str, list[Atom]] = {}
        for atom in list(self.units._parent):
            owner = maker.get(self.units.find(atom))
            if owner is not None:
                atoms.setdefault(together.find(owner), []).append(atom)
        return [self._group(names, atoms[component]) for component, names in components.items()]

    def _group(self, producers: list[str], atoms: list[Atom]) -> Group:
        order: dict[Any, int] = {}
        for name in producers:
            for index in range(channel_count(self.layers[name], "out")):
                order.setdefault(self.units.find((name, "out", index)), len(order))
        tables: dict[tuple[str, Axis], list[list[int]]] = {}
        for name, axis, index in atoms:
            if (name, axis) not in tables:
                tables[name, axis] = [[] for _ in order]
            tables[name, axis][order[self.units.find((name, axis, index))]].append(index)
        members = [
            Member(
                layer=name,
                kind=self._kind(name) or "norm",
                axis=axis,
                index_map=tuple(tuple(sorted(owned)) for owned in table),
            )
            for (name, axis), table in sorted(tables.items(), key=lambda item: self._place(*item[0]))
        ]
        reasons = list(dict.fromkeys(reason for name in producers for reason in self.reasons.get(name, ())))
        if not reasons and len(order) == 1:
            reasons = ["all its channels are tied into one unit"]
        if not reasons and not any(m.axis == "in" for m in members):
            reasons = ["no layer is found that reads its channels"]
        return Group(
            name=producers[0],
            type="linear" if isinstance(self.layers[producers[0]], nn.Linear) else "conv",
            size=len(order),
            members=tuple(members),
            prunable=not reasons,
            reason=reasons[0] + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")
            if reasons
            else "",
        )

    def _place(self, name: str, axis: Axis) -> tuple[int, int, str]:
        """Order members: makers before readers, both in the order of the modules."""
        return (axis == "in", self.position.get(name, len(self.position)), name)


def _build_graph(model: nn.Module, example: Tensor) -> Any:
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            parameter.requires_grad_(True)  # the library reads the graph that autograd builds
    graph = torch_pruning.DependencyGraph()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph.build_dependency(
            model.eval(),
            example,
            forward_fn=lambda net, x: net(x),
            output_transform=flat_outputs,
            verbose=False,
        )
    return graph


def _all_nodes(graph: Any) -> list[Any]:
    """Return all nodes of the graph; a layer that is used twice has two, of which the library's map holds one."""
    nodes: dict[int, Any] = {}
    stack = list(graph.module2node.values())
    while stack:
        node = stack.pop()
        if id(node) not in nodes:
            nodes[id(node)] = node
            stack.extend([*node.inputs, *node.outputs])
    return list(nodes.values())


def _tied_parameters(model: nn.Module) -> set[str]:
    """Return the names of all parameters that more than one module holds."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            names.setdefault(id(parameter), []).append(f"{prefix}.{own}".lstrip("."))
    return {name for held in names.values() if len(held) > 1 for name in held}
