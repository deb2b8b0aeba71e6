"""A network as a graph of ATen operations, exported on one example."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured:
    """An exported network.

    Attributes:
        nodes: All operations, in the order in which they run.
        tensors: For each placeholder that is no input the name of its parameter or buffer in the network; empty for a
            constant.
        aliases: For each of those names all names of the very tensor.
        constants: Tensors that the code made, by placeholder.
        free_batch: Whether sizes that follow the number of examples are symbols; else they are numbers like others.
        in_spec: How the inputs are nested.
        out_spec: How the outputs are nested.
    """

    nodes: tuple[fx.Node, ...]
    tensors: Mapping[str, str]
    aliases: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, Tensor]
    free_batch: bool
    in_spec: TreeSpec
    out_spec: TreeSpec


def capture(
    model: nn.Module,
    inputs: Sequence[Any],
    named: Mapping[str, Any] | None = None,
    *,
    training: bool = False,
) -> Captured:
    """Export a network, with the number of examples left free where its code allows that.

    Args:
        model: The network; its mode is changed.
        inputs: Its inputs, of at least two examples: sizes of 1 are taken for constants.
        named: Inputs that are given by name.
        training: Whether it is exported as it computes in training, not in evaluation.

    Raises:
        Exception: Whatever the network's forward or the export raise.
    """
    model.train(training)
    given = dict(named or {})
    try:
        program = _export(model, tuple(inputs), given, free_batch=True)
    except Exception as error:  # whatever the code does with the number of examples
        _log.info("export with a free batch failed, trying a fixed one: %s", error)
        program = _export(model, tuple(inputs), given, free_batch=False)
    signature = program.graph_signature
    tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    _inline_regions(program)
    nodes = tuple(program.graph.nodes)
    return Captured(
        nodes,
        {**tensors, **dict.fromkeys(lifted, "")},
        _aliases(model),
        {place: program.constants[name] for place, name in lifted.items()},
        bool(program.range_constraints),  # by free symbol
        program.call_spec.in_spec,
        program.call_spec.out_spec,
    )


def _export(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], *, free_batch: bool) -> Any:
    shapes = None
    if free_batch:
        first = {0: torch.export.Dim.AUTO}
        shapes = (
            *(first if isinstance(value, Tensor) and value.dim() else None for value in inputs),
            *(first if isinstance(value, Tensor) and value.dim() else None for value in named.values()),
        )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(model, inputs, named, strict=False, dynamic_shapes=shapes)


def _inline_regions(program: Any) -> None:
    """Put what runs with another precision or without gradients in the place of its call, in place."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not str(node.target).startswith("wrap_with_"):
            continue
        place = next(
            i for i, each in enumerate(node.args) if isinstance(each, fx.Node) and each.op == "get_attr"
        )
        inner = getattr(program.graph_module, node.args[place].target).graph
        inputs = iter(node.args[place + 1 :])
        moved: dict[fx.Node, Any] = {}
        with graph.inserting_before(node):
            for each in inner.nodes:
                if each.op == "placeholder":
                    moved[each] = next(inputs)
                elif each.op != "output":
                    moved[each] = graph.node_copy(each, moved.__getitem__)
        made = fx.node.map_arg(next(n for n in inner.nodes if n.op == "output").args[0], moved.__getitem__)
        for user in list(node.users):
            user.replace_all_uses_with(made[user.args[1]])
            graph.erase_node(user)
        region = node.args[place]
        graph.erase_node(node)
        if not region.users:
            graph.erase_node(region)


def sizes_of(node: fx.Node) -> tuple[int, ...]:
    """Return the sizes of what an operation returns on the example."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an operation by name, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(node.kwargs)
    found = {each.name: each.default_value for each in schema.arguments if each.has_default_value()}
    found.update({each.name: value for each, value in zip(schema.arguments, node.args, strict=False)})
    return {**found, **node.kwargs}


def where(node: fx.Node) -> str:
    """Return the operation and the layer that it belongs to, for people."""
    layer = layer_of(node)
    name = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
    return f"{name} in {layer!r}" if layer else name


def layer_of(node: fx.Node) -> str:
    """Return the name of the innermost module that runs an operation; a second run of one bears its name too."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).partition("@")[0] if stack else ""


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        names.setdefault(id(tensor), []).append(name)
    return {name: tuple(held) for held in names.values() for name in held}
