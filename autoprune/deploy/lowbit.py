"""Weights of 2 to 8 and of 16 bits in an ONNX graph: exact grids for int8 kernels, or small storage for float ones."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType

from autoprune.deploy.runtime import StoredWeight
from autoprune.deploy.template import is_layer, layer_of

# The fold of a BatchNorm rounds; weights of another layer are far off.
_SAME = 1e-3
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Found:
    """A layer's weight in a graph."""

    initializer: onnx.TensorProto
    # Dimension of the output channels.
    axis: int
    stored: StoredWeight
    # Whether the graph has it as ``(in, out)``.
    transposed: bool
    layer: str


def put_on_grids(
    proto: onnx.ModelProto, weights: Mapping[str, StoredWeight], int8_layers: Collection[str]
) -> dict[str, list[dict[str, Any]]]:
    """Write, in place, the exact grid values of layers that run in int8, and return their scales.

    Args:
        proto: Float graph whose layer nodes carry the layers' names.
        weights: Integers of the layers' weights.
        int8_layers: Layers that will run in int8.

    Returns:
        ``TensorQuantOverrides`` of onnxruntime's quantizer: by initialiser one scale for each output channel.
    """
    overrides = {}
    for found in _weights(proto, weights):
        if found.layer not in int8_layers or found.stored.codes is None:
            continue
        codes, scale = _on_grid(found)
        found.initializer.CopyFrom(numpy_helper.from_array(codes * scale, found.initializer.name))
        overrides[found.initializer.name] = [
            {
                "axis": found.axis,
                "quant_type": QuantType.QInt8,
                "scale": np.float32(step),
                "zero_point": np.int8(0),
            }
            for step in scale.reshape(-1)
        ]
    return overrides


def store_small(
    proto: onnx.ModelProto, weights: Mapping[str, StoredWeight], int8_layers: Collection[str]
) -> None:
    """Store, in place, the weights of layers that run in float as integers or float16, rebuilt when a file is loaded.

    Args:
        proto: Float graph whose layer nodes carry the layers' names.
        weights: How each layer's weight is stored.
        int8_layers: Layers that run in int8, which are left alone.
    """
    nodes: list[onnx.NodeProto] = []
    for found in _weights(proto, weights):
        if found.layer in int8_layers:
            continue
        name = found.initializer.name
        constants = [numpy_helper.to_array(found.initializer).astype(np.float16)]
        if found.stored.codes is not None:
            codes, scale = _on_grid(found)
            constants = [codes.astype(np.int8), scale.astype(np.float32)]
        names = [f"{name}:stored", f"{name}:scale"]
        cast = name if len(constants) == 1 else f"{name}:float"
        nodes.append(helper.make_node("Cast", names[:1], [cast], to=TensorProto.FLOAT))
        if len(constants) == 2:
            nodes.append(helper.make_node("Mul", [cast, names[1]], [name]))
        proto.graph.initializer.remove(found.initializer)
        own = (numpy_helper.from_array(c, n) for c, n in zip(constants, names, strict=False))
        proto.graph.initializer.extend(own)
    nodes += proto.graph.node
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _weights(proto: onnx.ModelProto, weights: Mapping[str, StoredWeight]) -> Iterator[_Found]:
    """Yield each asked layer's weight once, however often the layer is called."""
    values = {tensor.name: tensor for tensor in proto.graph.initializer}
    seen: set[str] = set()
    for node in proto.graph.node:
        layer = layer_of(node.name)
        name = node.input[1] if len(node.input) > 1 else ""
        if not is_layer(node) or layer not in weights or name not in values or name in seen:
            continue
        seen.add(name)
        whole = any(a.name == "transB" and a.i for a in node.attribute)
        transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not whole)
        axis = 1 if transposed or node.op_type == "ConvTranspose" else 0
        yield _Found(values[name], axis, weights[layer], transposed, layer)


def _on_grid(found: _Found) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a weight's integers as the graph has them, and the scale of each channel.

    The graph's weight is the network's times the BatchNorm that was folded into it, so that the integers of a channel
    are the same, or all of the other sign.
    """
    assert found.stored.codes is not None  # noqa: S101
    weight = numpy_helper.to_array(found.initializer).astype(np.float64)
    codes = found.stored.codes.T if found.transposed else found.stored.codes
    others = tuple(axis for axis in range(weight.ndim) if axis != found.axis)
    if codes.shape == weight.shape:
        integers = codes.astype(np.float64)
        squares = np.square(integers).sum(axis=others, keepdims=True)
        scale = (weight * integers).sum(axis=others, keepdims=True) / np.maximum(squares, 1.0)
        off = np.abs(weight - integers * scale).max(initial=0.0)
        if off <= _SAME * max(float(np.abs(weight).max(initial=0.0)), 1e-12):
            signed = np.where(scale < 0, -integers, integers)
            return signed.astype(np.float32), _positive(np.abs(scale))
    _log.warning(
        "layer %r has other weights in the exported graph; they are rounded to the nearest", found.layer
    )
    top = 2 ** (found.stored.bits - 1) - 1
    scale = _positive(np.abs(weight).max(axis=others, keepdims=True) / top)
    return np.clip(np.round(weight / scale), -top, top).astype(np.float32), scale


def _positive(scale: NDArray[Any]) -> NDArray[np.float32]:
    """Return scales without zeros, which a channel of zeros alone has."""
    return np.where(scale > 0, scale, 1.0).astype(np.float32)
