"""Layers of an exported graph: the operators that are convolutions and linear layers, made modules of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

_aten = torch.ops.aten
LINEAR = _aten.linear.default
# Operators of layers, and the axis of the outputs in their weights.
_AXES: dict[Any, int] = {
    LINEAR: 0,
    _aten.conv1d.default: 0,
    _aten.conv2d.default: 0,
    _aten.conv3d.default: 0,
    _aten.conv1d.padding: 0,
    _aten.conv2d.padding: 0,
    _aten.conv3d.padding: 0,
    _aten.conv_transpose1d.default: 1,
    _aten.conv_transpose2d.input: 1,
    _aten.conv_transpose3d.input: 1,
}
_PRODUCTS = (
    _aten.matmul.default,
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten.einsum.default,
)
_ENDINGS = {".weight": "", ".in_proj_weight": ".in_proj"}
# Names of the layers' modules begin so, and have this instead of dots, which would make modules in modules of them.
_MARK, _DOT = "layer:", "/"


class Layer(nn.Module):
    """A layer as its operator.

    Args:
        operator: The operator; it takes inputs, weight, bias and ``after``.
        weight: ``(out, in, *kernel)``, or ``(in, out / groups, *kernel)`` of transposed convolutions.
        bias: ``(out,)``, if there is one.
        after: What the operator takes after the bias.
        factors: What the weights of each output channel were multiplied by when a BatchNorm was folded in, ``(out,)``.
    """

    def __init__(
        self, operator: Any, weight: Tensor, bias: Tensor | None, after: tuple[Any, ...], factors: Tensor
    ) -> None:
        super().__init__()
        self.operator, self.after, self.factors = operator, after, factors
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer; else it is a convolution."""
        return bool(self.operator is LINEAR)

    @property
    def axis(self) -> int:
        """Axis of the output channels in the weight."""
        return _AXES[self.operator]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs."""
        outputs: Tensor = self.operator(inputs, self.weight, self.bias, *self.after)
        return outputs


def module_name(layer: str) -> str:
    """Return the name of a layer's module in the graph."""
    return _MARK + layer.replace(".", _DOT)


def call_in(stack: Mapping[str, tuple[str, Any]] | None) -> str:
    """Return the call of a layer that a node of an exported graph belongs to; empty where it is none's.

    Args:
        stack: The node's ``nn_module_stack``; its keys tell the calls of one module apart.
    """
    for key, (path, _) in reversed(list((stack or {}).items())):
        place = path.find(_MARK)
        if place >= 0:
            layer = path[place + len(_MARK) :].replace(_DOT, ".")
            number = key.rpartition("@")[2]
            return f"{layer}#{int(number) + 1}" if number.isdigit() else layer
    return ""


def constants(module: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    """Return the tensors that nodes of a graph read, by their paths."""
    return {
        path: _constant(module, path) for n in graph.nodes if n.op == "get_attr" for path in [str(n.target)]
    }


def take_layers(graph: fx.Graph, module: fx.GraphModule) -> dict[str, Layer]:
    """Put modules in the place of the operators of layers, in place; return them by name.

    A layer is named after its weight. BatchNorm that alone reads what a layer makes is folded into it.

    Args:
        graph: Graph of ``module``.
        module: An exported network in inference.
    """
    uses = Counter(str(n.target) for n in graph.nodes if n.op == "get_attr" for _ in n.users)
    layers: dict[str, Layer] = {}
    made: dict[tuple[Any, ...], str] = {}
    node: Any
    for node in list(graph.nodes):
        parts = _parts(node)
        if parts is None:
            continue
        norm = _foldable(node, module) if uses[parts.path] == 1 else None
        key = (parts, norm)
        if key not in made:
            # Layers of one weight may differ in their bias or stride.
            made[key] = parts.layer + (f"~{len(layers)}" if parts.layer in layers else "")
            layers[made[key]] = _layer(node.target, parts, norm, module)
            module.add_module(module_name(made[key]), layers[made[key]])
        with graph.inserting_before(node):
            call = graph.call_module(module_name(made[key]), (node.args[0],))
        last = norm or node
        call.meta = {"val": last.meta["val"]}
        last.replace_all_uses_with(call)
        for gone in (norm, node):
            if gone is not None:
                graph.erase_node(gone)
    return layers


def foreign_products(graph: fx.Graph) -> int:
    """Count products and convolutions that read a weight which is no layer's."""
    return sum(
        (node.target in _PRODUCTS or node.target in _AXES)
        and any(_is_constant(each) for each in node.all_input_nodes)
        for node in graph.nodes
        if node.op == "call_function"
    )


# -- one layer ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """What an operator of a layer takes.

    Attributes:
        layer: Name of the layer.
        path: Path of its weight.
        bias: Path of its bias, if it has one.
        after: What comes after the bias.
    """

    layer: str
    path: str
    bias: str | None
    after: tuple[Any, ...]


def _parts(node: Any) -> _Parts | None:
    """Return what a node takes if it is the operator of a layer."""
    if node.op != "call_function" or node.target not in _AXES:
        return None
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    values = [given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema[1:]]
    weight: Any = values[0]
    bias: Any = values[1]
    after = tuple(tuple(v) if isinstance(v, list | tuple) else v for v in values[2:])
    flat = [part for value in after for part in (value if isinstance(value, tuple) else (value,))]
    if any(isinstance(part, fx.Node) for part in flat) or not _is_constant(weight):
        return None
    path = str(weight.target)
    ending = next((e for e in _ENDINGS if path.endswith(e)), None)
    if ending is None or not (bias is None or _is_constant(bias)):
        return None
    layer = path.removesuffix(ending) + _ENDINGS[ending]
    return _Parts(layer, path, None if bias is None else str(bias.target), after)


def _is_constant(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _constant(module: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


def _foldable(node: Any, module: nn.Module) -> Any:
    """Return the BatchNorm that alone reads what a layer makes and can be folded into it; None if there is none."""
    if len(node.users) != 1:
        return None
    (norm,) = node.users
    if norm.target is not _aten.batch_norm.default or norm.args[0] is not node:
        return None
    tensors, training = list(norm.args[1:5]), norm.args[5]
    known = all(value is None or _is_constant(value) for value in tensors) and _is_constant(tensors[2])
    # The channels of a linear layer are its last dimension, BatchNorm's the second.
    flat = node.target is not LINEAR or node.meta["val"].dim() == 2
    weight = _constant(module, str(node.args[1].target))
    grouped = _AXES[node.target] == 1 and weight.shape[1] != node.meta["val"].shape[1]
    return norm if known and flat and not grouped and not training else None


def _layer(operator: Any, parts: _Parts, norm: Any, module: nn.Module) -> Layer:
    weight, axis = _constant(module, parts.path).detach(), _AXES[operator]
    bias = None if parts.bias is None else _constant(module, parts.bias).detach()
    if norm is None:
        groups = parts.after[-2] if axis == 1 else 1
        return Layer(operator, weight, bias, parts.after, torch.ones(weight.shape[axis] * groups))
    gamma, beta, mean, variance = (
        default if node is None else _constant(module, str(node.target)).detach().double()
        for node, default in zip(norm.args[1:5], (1.0, 0.0, 0.0, 1.0), strict=True)
    )
    factors = torch.rsqrt(variance + norm.args[7]) * gamma
    moved = ((0.0 if bias is None else bias.double()) - mean) * factors + beta
    shape = [-1 if dim == axis else 1 for dim in range(weight.dim())]
    scaled = (weight.double() * factors.reshape(shape)).to(weight.dtype)
    return Layer(operator, scaled, moved.to(weight.dtype), parts.after, factors.to(weight.dtype))
