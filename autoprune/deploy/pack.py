"""Weights with many zeros, stored packed inside an ONNX file that every runtime of the standard still runs.

A packed tensor is a code of the places of its values, the values, and a few standard operators that rebuild the dense
tensor under its own name. All that they read is constant, so a session folds them into the dense tensor when it is
made: what is executed is the same as from the unpacked file, only the file is smaller.

There are two codes of places, and each tensor gets the shortest that can hold it. A *bitmask* has one bit for each
weight. *Gaps* have one byte for each value, its distance from the value before it; a distance beyond 255 is bridged by
zeros that are stored like values. Gaps are shorter where fewer than an eighth of the weights are left. Integers that
fit into fewer bits than they are stored in have a third code without places: *planes*, one of each bit of all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]

# With older operators the rebuilding was never tried.
_LEAST_OPSET = 18
_TYPES = ("float32", "int8", "uint8")
_LARGEST_GAP = 255
# Tag and length of an entry of the graph, for an entry of up to 2 MB.
_HEADER_BYTES = 4


class Builder:
    """Collects the constants and nodes that rebuild one tensor, under names that are new to the graph.

    Args:
        name: Gives a new name.
        shared: Constants that all tensors of the file share, by their content; added to.
    """

    def __init__(self, name: Callable[[], str], shared: dict[str, onnx.TensorProto]) -> None:
        self.constants: list[onnx.TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self._name = name
        self._shared = shared

    def constant(self, values: Array) -> str:
        """Store values of this tensor alone."""
        self.constants.append(numpy_helper.from_array(values, self._name()))
        return str(self.constants[-1].name)

    def shared(self, values: Array) -> str:
        """Store values that other tensors may need as well, once in the file."""
        key = f"{values.dtype}{values.tolist()}"
        if key not in self._shared:
            self._shared[key] = numpy_helper.from_array(values, self._name())
        return str(self._shared[key].name)

    def node(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add an operator and return the name of what it gives."""
        output = output or self._name()
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    @property
    def bytes(self) -> int:
        """Bytes in the file but for what is shared."""
        return sum(int(tensor.ByteSize()) + _HEADER_BYTES for tensor in self.constants) + sum(
            int(node.ByteSize()) + _HEADER_BYTES for node in self.nodes
        )


# Writes a flat tensor and returns the name of the rebuilt one, of the same length.
Code = Callable[[Array, Builder], str]


def bitmask(flat: Array, builder: Builder) -> str:
    """Write a flat tensor as one bit for each weight, and its values.

    With the bits as numbers, their running sum counts the values, so that the sum times the bit is the place of a
    weight's value in a list that starts with 0.
    """
    row = _bits_of_values(flat, builder)
    values = np.concatenate([np.zeros(1, flat.dtype), flat[flat != 0]])
    counted = builder.node("CumSum", row, builder.shared(np.array(0)))
    places = builder.node("Mul", counted, row)
    dense = builder.node("Gather", builder.constant(values), places)
    return _cut(dense, flat, builder) if flat.size % 8 else dense


def scattered(flat: Array, builder: Builder) -> str:
    """Write a flat tensor as one bit for each weight, and its values, which are scattered to where the bits are."""
    found = builder.node("NonZero", _bits_of_values(flat, builder))
    places = builder.node("Reshape", found, builder.shared(np.array([-1])))
    # In int32 where values are integers: those alone are scattered when a model is read.
    kind: Any = np.dtype(np.float32) if flat.dtype == np.float32 else np.dtype(np.int32)
    values = builder.constant(flat[flat != 0])
    if flat.dtype != kind:
        values = builder.node("Cast", values, to=helper.np_dtype_to_tensor_dtype(kind))
    zero = numpy_helper.from_array(np.zeros(1, kind))
    length = builder.shared(np.array([-(-flat.size // 8) * 8]))
    zeros = builder.node("ConstantOfShape", length, value=zero)
    dense = builder.node("ScatterElements", zeros, places, values)
    dense = _cut(dense, flat, builder) if flat.size % 8 else dense
    if flat.dtype != kind:
        dense = builder.node("Cast", dense, to=helper.np_dtype_to_tensor_dtype(flat.dtype))
    return dense


def gaps(flat: Array, builder: Builder) -> str:
    """Write a flat tensor as its values with their distances, one byte each."""
    places = np.flatnonzero(flat)
    distances = np.diff(places, prepend=0)
    # A distance d becomes d // 255 steps of 255 and the rest; a rest of 0 would name a place twice.
    bridges = np.maximum(distances - 1, 0) // _LARGEST_GAP
    own = np.arange(len(places)) + np.cumsum(bridges)
    steps = np.full(len(places) + int(bridges.sum()), _LARGEST_GAP, np.uint8)
    steps[own] = distances - bridges * _LARGEST_GAP
    values = np.zeros(len(steps), flat.dtype)
    values[own] = flat[places]
    numbers = builder.node("Cast", builder.constant(steps), to=TensorProto.INT32)
    found = builder.node("CumSum", numbers, builder.shared(np.array(0)))
    return builder.node("ScatterElements", nothing(flat, builder), found, builder.constant(values))


def nothing(flat: Array, builder: Builder) -> str:
    """Write a flat tensor of zeros alone."""
    zero = numpy_helper.from_array(np.zeros(1, flat.dtype))
    return builder.node("ConstantOfShape", builder.shared(np.array([flat.size])), value=zero)


def planes(flat: Array, builder: Builder) -> str:
    """Write a flat tensor of integers as the planes of its bits, the lowest first, shifted so that none is negative."""
    top = int(np.abs(flat.astype(np.int64)).max())
    count = (2 * top).bit_length()
    shifted = (flat.astype(np.int64) + top).astype(np.uint8)
    bits = np.stack([np.packbits((shifted >> k) & 1, bitorder="little") for k in range(count)])[:, :, None]
    numbers = _single_bits(builder.constant(bits), builder)
    rows = builder.node("Reshape", numbers, builder.shared(np.array([count, -1])))
    weighed = builder.node("Mul", rows, builder.shared(2 ** np.arange(count, dtype=np.int32)[:, None]))
    added = builder.node("ReduceSum", weighed, builder.shared(np.array([0])), keepdims=0)
    moved = builder.node("Sub", added, builder.shared(np.array(top, np.int32)))
    dense = builder.node("Cast", moved, to=helper.np_dtype_to_tensor_dtype(flat.dtype))
    return _cut(dense, flat, builder) if flat.size % 8 else dense


def _bits_of_values(flat: Array, builder: Builder) -> str:
    """Return for each weight, and up to seven more, whether it has a value, as int32 ``(n,)``."""
    bits = builder.constant(np.packbits(flat != 0, bitorder="little")[:, None])
    return builder.node("Reshape", _single_bits(bits, builder), builder.shared(np.array([-1])))


def _single_bits(bytes_: str, builder: Builder) -> str:
    """Return the bits of bytes ``(…, 1)`` as int32 numbers ``(…, 8)``, the lowest first.

    By division, which every runtime folds; OpenVINO does not fold operators on bits.
    """
    numbers = builder.node("Cast", bytes_, to=TensorProto.INT32)
    moved = builder.node("Div", numbers, builder.shared(2 ** np.arange(8, dtype=np.int32)))
    return builder.node("Mod", moved, builder.shared(np.array(2, np.int32)))


def _cut(dense: str, flat: Array, builder: Builder) -> str:
    """Return as many of the first values as the tensor has."""
    ends = builder.shared(np.array([0])), builder.shared(np.array([flat.size]))
    return builder.node("Slice", dense, *ends)


CODES: tuple[Code, ...] = (bitmask, gaps)
# OpenVINO folds places but no running sums, onnxruntime the other way round.
FOR_OPENVINO: tuple[Code, ...] = (scattered,)


def pack(proto: onnx.ModelProto, codes: Sequence[Code] = CODES) -> onnx.ModelProto:
    """Store, in place, every tensor packed that gets smaller so.

    The rebuilt tensors are equal to those before; only a zero with a sign becomes a plain one.

    Args:
        proto: A finished graph, whose internal names are short already. One whose operators are older than version 18
            stays as it is.
        codes: Codes of tensors with zeros.

    Returns:
        The same graph.
    """
    if not any(o.domain in ("", "ai.onnx") and o.version >= _LEAST_OPSET for o in proto.opset_import):
        return proto
    graph = proto.graph
    used = {name for node in graph.node for name in (*node.input, *node.output)}
    used |= {value.name for value in (*graph.initializer, *graph.input, *graph.output)}
    free = (name for number in itertools.count() if (name := f"p{number}") not in used)
    shared: dict[str, onnx.TensorProto] = {}
    nodes: list[onnx.NodeProto] = []
    for tensor in list(graph.initializer):
        best = _shortest(tensor, lambda: next(free), shared, codes)
        if best is not None:
            graph.initializer.remove(tensor)
            graph.initializer.extend(best.constants)
            nodes += best.nodes
    read = {name for node in nodes for name in node.input}
    graph.initializer.extend(tensor for tensor in shared.values() if tensor.name in read)
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
    return proto


def _shortest(
    tensor: onnx.TensorProto,
    name: Callable[[], str],
    shared: dict[str, onnx.TensorProto],
    sparse: Sequence[Code],
) -> Builder | None:
    """Return what rebuilds a tensor in the fewest bytes; None where the tensor itself has fewer."""
    values = numpy_helper.to_array(tensor)
    if str(values.dtype) not in _TYPES or not values.size:
        return None
    zeros = values == 0
    codes = [nothing] if zeros.all() else list(sparse) if zeros.any() else []
    # Below 64 seven bits or fewer hold a value and its sign.
    if values.dtype == np.int8 and 0 < np.abs(values.astype(np.int64)).max() < 64:
        codes.append(planes)
    written = []
    for code in codes:
        builder = Builder(name, shared)
        flat = code(values.reshape(-1), builder)
        shape = builder.shared(np.array(values.shape, np.int64))
        builder.node("Reshape", flat, shape, output=tensor.name)
        written.append(builder)
    best = min(written, key=lambda builder: builder.bytes, default=None)
    return best if best is not None and best.bytes < tensor.ByteSize() + _HEADER_BYTES else None
