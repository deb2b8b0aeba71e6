"""A network as a graph of ATen operations, exported on one example."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn


@dataclass(frozen=True)
class Captured:
    """An exported network.

    Attributes:
        nodes: All operations, in the order in which they run.
        tensors: For each placeholder that is no input the name of its parameter or buffer in the network; empty for a
            constant.
        aliases: For each of those names all names of the very tensor.
    """

    nodes: tuple[fx.Node, ...]
    tensors: Mapping[str, str]
    aliases: Mapping[str, tuple[str, ...]]


def capture(model: nn.Module, inputs: Sequence[Any], named: Mapping[str, Any] | None = None) -> Captured:
    """Export a network.

    Args:
        model: In evaluation mode.
        inputs: Its inputs, of at least two examples: sizes of 1 are taken for constants.
        named: Inputs that are given by name.

    Raises:
        Exception: Whatever the network's forward or the export raise.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(model.eval(), tuple(inputs), dict(named or {}), strict=False)
    signature = program.graph_signature
    tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = dict.fromkeys(signature.inputs_to_lifted_tensor_constants, "")
    return Captured(tuple(program.graph.nodes), {**tensors, **constants}, _aliases(model))


def sizes_of(node: fx.Node) -> tuple[int, ...]:
    """Return the sizes of what an operation returns."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


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
