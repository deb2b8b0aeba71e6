"""Integer weights of a network found again in its ONNX graph."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from autoprune.deploy.executed import layer_of
from autoprune.deploy.runtime import StoredWeight
from autoprune.deploy.template import is_layer

# The fold of a BatchNorm rounds; weights of another layer are far off.
_SAME = 1e-3
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A layer's weight in a graph.

    Attributes:
        layer: Name of the layer.
        nodes: Its calls.
        initializer: The weight.
        axis: Dimension of the output channels.
        transposed: Whether the graph has it as ``(in, out)``.
        stored: How it is stored.
    """

    layer: str
    nodes: tuple[onnx.NodeProto, ...]
    initializer: onnx.TensorProto
    axis: int
    transposed: bool
    stored: StoredWeight

    @property
    def name(self) -> str:
        """Name of the weight in the graph."""
        return str(self.initializer.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight in the graph."""
        return tuple(self.initializer.dims)


def weights_in(proto: onnx.ModelProto, weights: Mapping[str, StoredWeight]) -> Iterator[Found]:
    """Yield each asked layer's weight once, however often the layer is called.

    Args:
        proto: Graph whose layer nodes carry the layers' names.
        weights: How each layer's weight is stored.
    """
    values = {tensor.name: tensor for tensor in proto.graph.initializer}
    calls: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        name = node.input[1] if len(node.input) > 1 else ""
        if is_layer(node) and layer_of(node.name) in weights and name in values:
            calls.setdefault(name, []).append(node)
    for name, nodes in calls.items():
        first, layer = nodes[0], layer_of(nodes[0].name)
        whole = any(a.name == "transB" and a.i for a in first.attribute)
        transposed = first.op_type == "MatMul" or (first.op_type == "Gemm" and not whole)
        axis = 1 if transposed or first.op_type == "ConvTranspose" else 0
        yield Found(layer, tuple(nodes), values[name], axis, transposed, weights[layer])


def on_grid(found: Found) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a weight's integers as the graph has them, and their scales.

    The graph's weight is the network's times the BatchNorm that was folded into it, so that the integers of a channel
    are the same, or all of the other sign.

    Returns:
        Integers of the weight's shape; and scales that broadcast against it, one for each output channel, or
        ``(out, blocks)`` where there are blocks.
    """
    assert found.stored.codes is not None  # noqa: S101
    weight = numpy_helper.to_array(found.initializer).astype(np.float64)
    codes = found.stored.codes.T if found.transposed else found.stored.codes
    blocks = found.stored.blocks
    if codes.shape == weight.shape:
        rows, integers = (_as_blocks(values, found.axis, blocks) for values in (weight, codes.astype(float)))
        squares = np.square(integers).sum(axis=2)
        scale = (rows * integers).sum(axis=2) / np.maximum(squares, 1.0)
        off = np.abs(rows - integers * scale[:, :, None]).max(initial=0.0)
        if off <= _SAME * max(float(np.abs(weight).max(initial=0.0)), 1e-12):
            signed = np.where(scale[:, :, None] < 0, -integers, integers)
            return _like(signed, weight, found.axis), _scales(np.abs(scale), weight, found.axis, blocks)
    _log.warning(
        "layer %r has other weights in the exported graph; they are rounded to the nearest", found.layer
    )
    top = 2 ** (found.stored.bits - 1) - 1
    rows = _as_blocks(weight, found.axis, blocks)
    scale = _positive(np.abs(rows).max(axis=2) / top)
    nearest = np.clip(np.round(rows / scale[:, :, None]), -top, top)
    return _like(nearest, weight, found.axis), _scales(scale, weight, found.axis, blocks)


def _as_blocks(values: NDArray[Any], axis: int, blocks: int) -> NDArray[Any]:
    """Return values as ``(out, blocks, features of a block)``."""
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    return rows.reshape(len(rows), blocks, -1)


def _like(rows: NDArray[Any], weight: NDArray[Any], axis: int) -> NDArray[np.float32]:
    """Return rows of output channels in the shape of a weight."""
    moved = np.moveaxis(weight, axis, 0).shape
    return np.ascontiguousarray(np.moveaxis(rows.reshape(moved), 0, axis), np.float32)


def _scales(scale: NDArray[Any], weight: NDArray[Any], axis: int, blocks: int) -> NDArray[np.float32]:
    positive = _positive(scale)
    if blocks > 1:
        return positive
    return positive.reshape([-1 if each == axis else 1 for each in range(weight.ndim)])


def _positive(scale: NDArray[Any]) -> NDArray[np.float32]:
    """Return scales without zeros, which a channel of zeros alone has."""
    return np.where(scale > 0, scale, 1.0).astype(np.float32)
