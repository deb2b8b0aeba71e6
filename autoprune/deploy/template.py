"""The dense network's ONNX graph, exported once; candidates of the same topology only put their weights in."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from autoprune.deploy.shrink import drop_unused
from autoprune.errors import ExportError
from autoprune.naming import cache_root

LAYER_OPERATORS = ("Conv", "Gemm", "MatMul")
_FORMAT = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Template:
    """An exported graph and how a network's weights go into it.

    Attributes:
        proto: The optimised graph; weights that come from a network are in it only by shape.
        folded: For each weight of a layer the BatchNorm that was folded into it, with its epsilon.
        transposed: Initialisers that hold a linear layer's weight transposed, by name, with the weight's name.
        batch: The fixed batch size; None where the batch is free.
    """

    proto: onnx.ModelProto
    folded: dict[str, tuple[str, float]]
    transposed: dict[str, str]
    batch: int | None


def export_template(model: nn.Module, example: Tensor) -> Template:
    """Export ``model``, or take the graph from the cache of earlier exports.

    Args:
        model: Network in eval mode on the CPU.
        example: Inputs, ``(n, C, H, W)``, n at least 2 so that the exporter leaves the batch free.

    Raises:
        ExportError: If the exporter refuses the network; holds its first line.
    """
    folder = cache_root() / "export" / _fingerprint(model, example)
    cached = _read_cache(folder)
    if cached is not None:
        return cached
    template = export_fresh(model, example)
    _write_cache(folder, template)
    return template


def export_fresh(model: nn.Module, example: Tensor) -> Template:
    """Export ``model`` without looking into the cache; see :func:`export_template`."""
    try:
        program, batch = _export(model, example, free_batch=True), None
    except Exception as error:  # the exporter raises whatever its passes meet
        _log.info("export with a free batch failed, trying a fixed one: %s", error)
        try:
            program, batch = _export(model, example[:1], free_batch=False), 1
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
        if weight in used and f"{found[0]}.weight" not in used
    }
    _give_own_biases(proto, folded)
    drop_unused(proto)
    return Template(_name_layers(proto, transposed), folded, transposed, batch)


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
        if node.op_type == "Conv":
            layer = modules.get(node.input[1].removesuffix(".weight"))
            for attribute in node.attribute:
                if attribute.name == "group" and isinstance(layer, nn.Conv2d | nn.Conv1d | nn.Conv3d):
                    attribute.i = layer.groups
        if node.op_type in LAYER_OPERATORS and len(node.input) > 1 and node.input[1] in template.folded:
            weight, bias = _fold(state, node.input[1], template.folded[node.input[1]])
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
    """Return the nodes of convolution and linear layers by the layer's name."""
    return {
        n.name: n
        for n in proto.graph.node
        if n.op_type in LAYER_OPERATORS and n.name and not n.name.startswith("node_")
    }


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
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    found = {}
    for node in proto.graph.node:
        if node.op_type != "BatchNormalization":
            continue
        layer = makers.get(node.input[0])
        if layer is not None and layer.op_type == "Conv" and readers[node.input[0]] == 1:
            epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            # Parameters may pass through Expand nodes; the running mean's name is the BatchNorm's own.
            found[layer.input[1]] = (node.input[3].removesuffix(".running_mean"), float(epsilon))
    return found


def _fold(
    state: dict[str, NDArray[Any]], weight: str, batchnorm: tuple[str, float]
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
    folded = kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1))
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
    for node in proto.graph.node:
        if node.op_type in LAYER_OPERATORS and len(node.input) > 1 and node.input[1] in folded:
            name = f"{node.input[1]}:shift"
            node.input[:] = [node.input[0], node.input[1], name]
            proto.graph.initializer.append(numpy_helper.from_array(np.zeros(1, dtype=np.float32), name))


def _name_layers(proto: onnx.ModelProto, transposed: dict[str, str]) -> onnx.ModelProto:
    for node in proto.graph.node:
        if node.op_type in LAYER_OPERATORS and len(node.input) > 1:
            weight = transposed.get(node.input[1], node.input[1])
            if weight.endswith(".weight"):
                node.name = weight.removesuffix(".weight")
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


def _fingerprint(model: nn.Module, example: Tensor) -> str:
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    content = [_FORMAT, torch.__version__, onnx.__version__, repr(model), shapes, list(example.shape[1:])]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _read_cache(folder: Path) -> Template | None:
    try:
        content = json.loads((folder / "template.json").read_text(encoding="utf-8"))
        raw = (folder / "template.onnx").read_bytes()
        if hashlib.sha256(raw).hexdigest() != content["sha256"]:
            return None
        folded = {weight: (name, float(epsilon)) for weight, (name, epsilon) in content["folded"].items()}
        return Template(onnx.load_model_from_string(raw), folded, content["transposed"], content["batch"])
    except (OSError, ValueError, KeyError):
        return None


def _write_cache(folder: Path, template: Template) -> None:
    raw = template.proto.SerializeToString()
    content = {
        "sha256": hashlib.sha256(raw).hexdigest(),
        "folded": template.folded,
        "transposed": template.transposed,
        "batch": template.batch,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in (("template.onnx", raw), ("template.json", json.dumps(content).encode())):
            temporary = folder / f".{name}.{os.getpid()}"
            temporary.write_bytes(data)
            temporary.replace(folder / name)
    except OSError as error:
        _log.warning("the exported graph could not be cached in %s: %s", folder, error)
