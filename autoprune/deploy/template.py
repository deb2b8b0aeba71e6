"""The dense network's ONNX graph, exported once; candidates of the same topology only put their weights in."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from autoprune.deploy.shrink import drop_unused
from autoprune.errors import ExportError

# The first with inputs of 16 bits in its quantizing operators.
_OPSET = 21
LAYER_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators that the optimiser folds a BatchNorm into, with the axis of outputs in their weight.
_FOLDING = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0}
_ENDINGS = {".weight": "", ".in_proj_weight": ".in_proj"}
# Rounding of a fold in another order of arithmetic; a weight in the wrong place is far off.
_SAME = 1e-4
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Template:
    """An exported graph and how a network's weights go into it.

    Attributes:
        proto: The optimised graph with the weights of the network that was exported.
        folded: For each weight of a layer the BatchNorm that was folded into it, with its epsilon.
        transposed: Initialisers that hold a linear layer's weight transposed, by name, with the weight's name.
        takes_weights: Whether the exported network's own weights, put into the graph, give the graph again;
            else the optimiser did what is not known here, and the graph serves no other network.
    """

    proto: onnx.ModelProto
    folded: dict[str, tuple[str, float]]
    transposed: dict[str, str]
    takes_weights: bool


def export_fresh(model: nn.Module, example: Tensor, *, batch: int = 1) -> Template:
    """Export ``model``.

    Args:
        model: Network in eval mode on the CPU.
        example: Inputs, ``(n, C, H, W)``, n at least 2 so that the exporter leaves the batch free.
        batch: Batch of the graph where the network does not leave it free.

    Raises:
        ExportError: If the exporter refuses the network; holds its first line.
    """
    try:
        program = _export(model, example, free_batch=True)
    except Exception as error:  # the exporter raises whatever its passes meet
        _log.info("export with a free batch failed, trying a fixed one: %s", error)
        program = None
    # A forward that computes with int(x.shape[0]) makes the batch of the example a constant, without an error.
    if program is None or fixed_batch(program.model_proto) is not None:
        try:
            program = _export(model, example[:1].repeat_interleave(batch, dim=0), free_batch=False)
        except Exception as second:
            reason = (str(second).strip().splitlines() or [type(second).__name__])[0]
            raise ExportError(
                f"the network cannot be exported to ONNX: {type(second).__name__}: {reason}",
                "control flow that depends on the data and operators without an ONNX form cannot be exported",
            ) from second
    folded = _batchnorms(program.model_proto)
    program.optimize()
    proto = _stripped(program.model_proto)
    state = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    transposed = _transposed_weights(proto, state)
    used = {name for node in proto.graph.node for name in node.input}
    folded = {
        weight: found
        for weight, found in folded.items()
        if weight in used and f"{found[0]}.running_mean" not in used
    }
    _give_own_biases(proto, folded)
    drop_unused(proto)
    template = Template(_name_layers(proto, transposed), folded, transposed, takes_weights=True)
    return replace(template, takes_weights=_gives_itself(template, model))


def fixed_batch(proto: onnx.ModelProto) -> int | None:
    """Return the batch that a graph is bound to; None where it is free."""
    first = proto.graph.input[0].type.tensor_type.shape.dim[0]
    return int(first.dim_value) if first.HasField("dim_value") else None


def instantiate(template: Template, model: nn.Module, *, free_flattening: bool = False) -> onnx.ModelProto:
    """Return the graph with the weights of ``model`` in it.

    Args:
        template: Graph of a network of the same topology.
        model: Network whose layers may have fewer channels.
        free_flattening: Whether reshapes to ``(batch, features)`` follow the candidate's number of features
            instead of the dense network's.

    Raises:
        KeyError: If the graph reads a weight that the network lacks.
    """
    proto = copy.deepcopy(template.proto)
    state = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    values = {initializer.name: initializer for initializer in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            layer = modules.get(node.input[1].removesuffix(".weight"))
            for attribute in node.attribute:
                if attribute.name == "group" and isinstance(layer, nn.modules.conv._ConvNd):
                    attribute.i = layer.groups
        if node.op_type in _FOLDING and node.input[1] in template.folded:
            axis = _FOLDING[node.op_type]
            weight, bias = _fold(state, node.input[1], template.folded[node.input[1]], axis)
            values[node.input[1]].CopyFrom(numpy_helper.from_array(weight, node.input[1]))
            values[node.input[2]].CopyFrom(numpy_helper.from_array(bias, node.input[2]))
    for name, initializer in values.items():
        if name in template.transposed:
            content = np.ascontiguousarray(state[template.transposed[name]].T)
            initializer.CopyFrom(numpy_helper.from_array(content, name))
        elif name in state and name not in template.folded:
            initializer.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(state[name]), name))
    if free_flattening:
        _free_flattening(proto)
    return proto


def layer_nodes(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return the nodes of convolution and linear layers by the node's name, which is that of a call."""
    return {n.name: n for n in proto.graph.node if is_layer(n)}


def is_layer(node: onnx.NodeProto) -> bool:
    """Return whether a node is a convolution or linear layer of the network, or one call of it."""
    return bool(node.op_type in LAYER_OPERATORS and node.name and not node.name.startswith("node_"))


def foreign_nodes(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes whose weight is a constant that belongs to no layer by name, such as a parametrised one."""
    constants = {initializer.name for initializer in proto.graph.initializer}
    return [
        n
        for n in proto.graph.node
        if n.op_type in LAYER_OPERATORS and not is_layer(n) and not constants.isdisjoint(n.input[1:2])
    ]


def _gives_itself(template: Template, model: nn.Module) -> bool:
    """Return whether the exported network's weights, put into its own graph, leave the graph as it is."""
    try:
        filled = instantiate(template, model)
    except Exception as error:  # whatever is not known here must not keep the graph itself from being used
        _log.info("the network's weights cannot be put into its graph: %r", error)
        return False
    for before, after in zip(template.proto.graph.initializer, filled.graph.initializer, strict=True):
        own, put = numpy_helper.to_array(before), numpy_helper.to_array(after)
        if own.shape != put.shape:
            return False
        if own.dtype.kind == "f" and own.size:
            if not np.abs(own - put).max() <= _SAME * max(float(np.abs(own).max()), 1e-12):
                _log.info("the optimiser changed %s in a way that is not known here", before.name)
                return False
        elif not np.array_equal(own, put):
            return False
    return True


def _export(model: nn.Module, example: Tensor, *, free_batch: bool) -> Any:
    shapes = ({0: torch.export.Dim("batch")},) if free_batch else None
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                dynamic_shapes=shapes,
                optimize=False,
                verbose=False,
                opset_version=_OPSET,
                input_names=["input"],
                output_names=["output"],
                external_data=False,
            )
    finally:
        exporter_log.setLevel(level)


def _batchnorms(proto: onnx.ModelProto) -> dict[str, tuple[str, float]]:
    """Find each BatchNorm that directly follows a layer which nothing else reads."""
    makers = {output: node for node in proto.graph.node for output in node.output}
    readers: dict[str, int] = {}
    for node in proto.graph.node:
        # Parameters that a BatchNorm lacks are made from the shape and the type of the layer's outputs.
        for name in node.input[: {"Shape": 0, "CastLike": 1}.get(node.op_type)]:
            readers[name] = readers.get(name, 0) + 1
    found = {}
    for node in proto.graph.node:
        if node.op_type != "BatchNormalization":
            continue
        layer = makers.get(node.input[0])
        if layer is not None and layer.op_type in _FOLDING and readers[node.input[0]] == 1:
            epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            # Parameters may pass through Expand nodes; the running mean's name is the BatchNorm's own.
            found[layer.input[1]] = (node.input[3].removesuffix(".running_mean"), float(epsilon))
    return found


def _fold(
    state: dict[str, NDArray[Any]], weight: str, batchnorm: tuple[str, float], axis: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    name, epsilon = batchnorm
    scale = 1.0 / np.sqrt(state[f"{name}.running_var"].astype(np.float64) + epsilon)
    if f"{name}.weight" in state:
        scale = scale * state[f"{name}.weight"]
    shift = -state[f"{name}.running_mean"] * scale
    if f"{name}.bias" in state:
        shift = shift + state[f"{name}.bias"]
    bias = state.get(weight.removesuffix(".weight") + ".bias")
    if bias is not None:
        shift = shift + bias * scale
    kernel = state[weight]
    folded = kernel * scale.reshape([-1 if i == axis else 1 for i in range(kernel.ndim)])
    return folded.astype(np.float32), shift.astype(np.float32)


def _transposed_weights(proto: onnx.ModelProto, state: dict[str, NDArray[Any]]) -> dict[str, str]:
    """Match initialisers that the optimiser transposed with the linear weights that they hold."""
    found = {}
    for initializer in proto.graph.initializer:
        if initializer.name in state or len(initializer.dims) != 2:
            continue
        content = numpy_helper.to_array(initializer)
        for name, weight in state.items():
            if weight.ndim == 2 and weight.T.shape == content.shape and np.array_equal(weight.T, content):
                found[initializer.name] = name
                break
    return found


def _give_own_biases(proto: onnx.ModelProto, folded: dict[str, tuple[str, float]]) -> None:
    """Give every layer with a folded BatchNorm a bias that no other layer shares.

    The optimiser drops a bias that happens to be zero, and lets layers share equal ones.
    """
    values = {initializer.name: initializer for initializer in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in _FOLDING and node.input[1] in folded:
            name = f"{node.input[1]}:shift"
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            outputs = values[node.input[1]].dims[_FOLDING[node.op_type]]
            outputs *= groups if node.op_type == "ConvTranspose" else 1
            own = (
                numpy_helper.to_array(values[node.input[2]])
                if len(node.input) > 2
                else np.zeros(outputs, np.float32)
            )
            node.input[:] = [node.input[0], node.input[1], name]
            proto.graph.initializer.append(numpy_helper.from_array(own, name))


def _name_layers(proto: onnx.ModelProto, transposed: dict[str, str]) -> onnx.ModelProto:
    calls: Counter[str] = Counter()
    for node in proto.graph.node:
        if node.op_type not in LAYER_OPERATORS or len(node.input) < 2:
            continue
        weight = transposed.get(node.input[1], node.input[1])
        ending = next((ending for ending in _ENDINGS if weight.endswith(ending)), None)
        if ending is not None:
            layer = weight.removesuffix(ending) + _ENDINGS[ending]
            calls[layer] += 1
            node.name = layer if calls[layer] == 1 else f"{layer}#{calls[layer]}"
    return proto


def _stripped(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Remove what the exporter says about itself: a third of a small network's file."""
    for item in (*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    proto.ClearField("metadata_props")
    proto.graph.ClearField("metadata_props")
    proto.graph.ClearField("value_info")
    proto.graph.ClearField("doc_string")
    return proto


def _free_flattening(proto: onnx.ModelProto) -> None:
    patched: set[str] = set()
    constants = {initializer.name: initializer for initializer in proto.graph.initializer}
    for node in proto.graph.node:
        shape = constants.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is None or list(shape.dims) != [2]:
            continue
        rows, columns = numpy_helper.to_array(shape).tolist()
        if columns > 0 or shape.name in patched:
            patched.add(shape.name)
            kept = [0, -1] if rows in (-1, 0) else [rows, -1]
            shape.CopyFrom(numpy_helper.from_array(np.array(kept, dtype=np.int64), shape.name))
            for attribute in [a for a in node.attribute if a.name == "allowzero"]:
                node.attribute.remove(attribute)
