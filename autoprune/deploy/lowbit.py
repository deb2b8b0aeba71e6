"""Weights of 2 to 8 and of 16 bits in an ONNX graph: exact grids for int8 kernels, or small storage for float ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType

from autoprune.deploy.executed import layer_of
from autoprune.deploy.grids import Found, on_grid, weights_in
from autoprune.deploy.runtime import StoredWeight
from autoprune.deploy.sessions.onnxruntime import OrtSession, session_options
from autoprune.deploy.template import is_layer
from autoprune.target import usable_cores

_TOP_16 = 65535
# Operators whose outputs are their inputs in another order or shape.
_PASSING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity"})


def narrow_grids(
    proto: onnx.ModelProto, layers: Collection[str], bits: int
) -> dict[str, list[dict[str, Any]]]:
    """Return scales of fewer bits than 8 for weights that are left to onnxruntime's quantizer, as its overrides.

    Grids end at the channels' largest magnitudes, as the quantizer's own do.

    Args:
        proto: Float graph whose layer nodes carry the layers' names.
        layers: Layers that will run in int8.
        bits: Of the weights.
    """
    top, overrides = 2 ** (bits - 1) - 1, {}
    for found in weights_in(proto, dict.fromkeys(layers, StoredWeight(bits))):
        if not _is_grouped_transposed(found):  # how the quantizer divides their channels is its own
            weight = numpy_helper.to_array(found.initializer)
            largest = np.abs(weight).max(axis=tuple(d for d in range(weight.ndim) if d != found.axis))
            overrides[found.name] = _scales(
                found.axis, (np.where(largest > 0, largest, 1.0) / top).astype(np.float32)
            )
    return overrides


def put_on_grids(
    proto: onnx.ModelProto, weights: Mapping[str, StoredWeight], int8_layers: Collection[str]
) -> dict[str, list[dict[str, Any]]]:
    """Write, in place, the exact grid values of layers that run in int8, and return their scales.

    Args:
        proto: Float graph whose layer nodes carry the layers' names.
        weights: Integers of the layers' weights, with one scale for each output channel.
        int8_layers: Layers that will run in int8.

    Returns:
        ``TensorQuantOverrides`` of onnxruntime's quantizer: by initialiser one scale for each output channel.
    """
    overrides = {}
    for found in weights_in(proto, weights):
        if found.layer not in int8_layers or found.stored.codes is None:
            continue
        codes, scale = on_grid(found)
        found.initializer.CopyFrom(numpy_helper.from_array(codes * scale, found.name))
        overrides[found.name] = _scales(found.axis, scale.reshape(-1))
    return overrides


def _scales(axis: int, steps: NDArray[np.floating[Any]]) -> list[dict[str, Any]]:
    return [
        {"axis": axis, "quant_type": QuantType.QInt8, "scale": np.float32(step), "zero_point": np.int8(0)}
        for step in steps
    ]


def _is_grouped_transposed(found: Found) -> bool:
    first = found.nodes[0]
    return first.op_type == "ConvTranspose" and any(a.name == "group" and a.i > 1 for a in first.attribute)


def store_small(
    proto: onnx.ModelProto, weights: Mapping[str, StoredWeight], elsewhere: Collection[str]
) -> None:
    """Store, in place, the weights of layers that run in float as integers or 16 bits, rebuilt when a file is loaded.

    Args:
        proto: Graph whose layer nodes carry the layers' names.
        weights: How each layer's weight is stored.
        elsewhere: Layers whose integers are in the graph already, which are left alone.
    """
    nodes: list[onnx.NodeProto] = []
    for found in list(weights_in(proto, weights)):
        if found.layer not in elsewhere:
            constants, made = _integers(found) if found.stored.codes is not None else _halves(found)
            proto.graph.initializer.remove(found.initializer)
            proto.graph.initializer.extend(constants)
            nodes += made
    nodes += proto.graph.node
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def given_ranges(
    proto: onnx.ModelProto,
    ranges: Mapping[str, tuple[float, float]],
    int8_layers: Collection[str],
    *,
    signed: bool,
) -> dict[str, list[dict[str, Any]]]:
    """Return grids of inputs that are not left to calibration, as ``TensorQuantOverrides`` by tensor.

    Behind operators that pass values on, the quantizer gives both sides one grid: that of the values before them. What
    is averaged, cut out or gathered stays with calibration, since a grid of the result would clip what it is made of.

    Args:
        proto: Float graph whose layer nodes carry the layers' names.
        ranges: Lowest and highest value of inputs by layer; 0 lies between them.
        int8_layers: Layers that will run in int8.
        signed: Whether the grids are signed and symmetric.
    """
    makers = {output: node for node in proto.graph.node for output in node.output}
    readers = Counter(name for node in proto.graph.node for name in node.input)
    overrides: dict[str, list[dict[str, Any]]] = {}
    for node in proto.graph.node:
        layer = layer_of(node.name)
        if is_layer(node) and layer in ranges and layer in int8_layers:
            tensors = [node.input[0]]
            while (maker := makers.get(tensors[-1])) is not None and (
                maker.op_type in _PASSING or (maker.op_type == "MaxPool" and readers[maker.input[0]] == 1)
            ):
                tensors.append(maker.input[0])
            low, high = (np.float32(end) for end in ranges[layer])
            if signed:
                kind, scale, zero = QuantType.QInt8, max(-low, high) / np.float32(127), np.array(0, np.int8)
            else:
                scale = (high - low) / np.float32(255)
                kind, zero = QuantType.QUInt8, np.array(np.round(-low / scale), np.uint8)
            # The quantizer takes arrays without dimensions, not numbers.
            grid = {"quant_type": kind, "scale": np.array(scale), "zero_point": zero}
            # Those operators may stay in float, so that only what follows them is rounded.
            overrides |= {tensor: [grid] for tensor in tensors}
    return overrides


def round_inputs(
    proto: onnx.ModelProto, layers: Collection[str], batches: Sequence[NDArray[np.float32]]
) -> None:
    """Round the inputs of layers to unsigned 16 bits over the range that they have in ``batches``, in place.

    Args:
        proto: Graph whose layer nodes carry the layers' names.
        layers: Names of the layers.
        batches: Inputs of the network, ``(n, C, H, W)``.
    """
    calls = [node for node in proto.graph.node if is_layer(node) and layer_of(node.name) in layers]
    names = list(dict.fromkeys(node.input[0] for node in calls))
    if not names:
        return
    made: dict[str, list[onnx.NodeProto]] = {}
    for name, (low, high) in ranges_of(proto.SerializeToString(), names, batches).items():
        scale = max((high - low) / _TOP_16, float(np.finfo(np.float32).tiny))
        grid = [f"{name}:step", f"{name}:offset"]
        proto.graph.initializer.append(numpy_helper.from_array(np.array(scale, np.float32), grid[0]))
        proto.graph.initializer.append(
            numpy_helper.from_array(np.array(round(-low / scale), np.uint16), grid[1])
        )
        made[name] = [
            helper.make_node("QuantizeLinear", [name, *grid], [f"{name}:16"]),
            helper.make_node("DequantizeLinear", [f"{name}:16", *grid], [f"{name}:rounded"]),
        ]
    nodes: list[onnx.NodeProto] = []
    written: set[str] = set()
    for node in proto.graph.node:
        if is_layer(node) and layer_of(node.name) in layers:
            name = node.input[0]
            nodes += made[name] if name not in written else []
            written.add(name)
            node.input[0] = f"{name}:rounded"
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)


def ranges_of(
    raw: bytes, names: Sequence[str], batches: Sequence[NDArray[np.float32]]
) -> dict[str, tuple[float, float]]:
    """Return the least and the largest value, and 0, of tensors of a graph over some inputs.

    Args:
        raw: The float graph.
        names: Names of float tensors.
        batches: Inputs of the network.
    """
    proto = onnx.load_model_from_string(raw)
    present = {value.name for value in proto.graph.output}
    given = {value.name for value in proto.graph.input}
    for name in names:
        if name not in present and name not in given:
            proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    wanted = [name for name in names if name not in given]
    found = dict.fromkeys(names, (0.0, 0.0))
    opened = OrtSession(proto.SerializeToString(), session_options(usable_cores()))
    for batch in batches:
        values = dict(zip(wanted, opened.session.run(wanted, {opened.input.name: batch}), strict=True))
        values |= dict.fromkeys(given & set(names), batch)
        for name, value in values.items():
            low, high = found[name]
            found[name] = (min(low, float(value.min())), max(high, float(value.max())))
    return found


_Parts = tuple[list[onnx.TensorProto], list[onnx.NodeProto]]


def _halves(found: Found) -> _Parts:
    """Return a weight in 16 bits, and what makes it float32 again."""
    name, values = found.name, numpy_helper.to_array(found.initializer)
    kind = ml_dtypes.bfloat16 if found.stored.bfloat16 else np.float16
    stored = numpy_helper.from_array(values.astype(kind), f"{name}:stored")
    return [stored], [helper.make_node("Cast", [f"{name}:stored"], [name], to=TensorProto.FLOAT)]


def _integers(found: Found) -> _Parts:
    """Return a weight's integers and scales, and what makes them float32 again."""
    name, (codes, scale) = found.name, on_grid(found)
    parts = {
        part: f"{name}:{part}" for part in ("stored", "scale", "float", "blocks", "split", "scaled", "shape")
    }
    constants = [numpy_helper.from_array(codes.astype(np.int8), parts["stored"])]
    cast = helper.make_node("Cast", [parts["stored"]], [parts["float"]], to=TensorProto.FLOAT)
    blocks = found.stored.blocks
    if blocks == 1:
        constants.append(numpy_helper.from_array(scale.astype(np.float32), parts["scale"]))
        return constants, [cast, helper.make_node("Mul", [parts["float"], parts["scale"]], [name])]
    # (out, blocks, features of a block), or the other way round where the graph has the weight transposed.
    split, steps = [len(scale), blocks, -1], scale[:, :, None]
    if found.transposed:
        split, steps = [blocks, -1, len(scale)], scale.T[:, None, :]
    constants += [
        numpy_helper.from_array(np.ascontiguousarray(steps, np.float32), parts["scale"]),
        numpy_helper.from_array(np.array(split, np.int64), parts["blocks"]),
        numpy_helper.from_array(np.array(found.shape, np.int64), parts["shape"]),
    ]
    return constants, [
        cast,
        helper.make_node("Reshape", [parts["float"], parts["blocks"]], [parts["split"]]),
        helper.make_node("Mul", [parts["split"], parts["scale"]], [parts["scaled"]]),
        helper.make_node("Reshape", [parts["scaled"], parts["shape"]], [name]),
    ]
