"""ONNX graphs in 16 bits, for runtimes that compute in the types that a graph says."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autoprune.target import Precision

_TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Inputs that stay float32 by the standard: of Resize the region and the scales.
_FLOAT_INPUTS = {"Resize": (1, 2)}


def in_16_bits(proto: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """Return a graph that computes in float16 or bfloat16 between inputs and outputs in float32.

    Args:
        proto: A graph in float32, with quantizing nodes or without; it is not changed.
        precision: ``float16`` or ``bfloat16``.
    """
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = made.graph
    kind = TensorProto.FLOAT16 if precision == "float16" else TensorProto.BFLOAT16
    kept = {
        name
        for node in graph.node
        for place in _FLOAT_INPUTS.get(node.op_type, ())
        for name in node.input[place : place + 1]
    }
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in kept:
            tensor.CopyFrom(_half(tensor, precision))
    for node in graph.node:
        for attribute in node.attribute:
            is_tensor = attribute.type == onnx.AttributeProto.TENSOR
            if is_tensor and attribute.t.data_type == TensorProto.FLOAT and not kept & set(node.output):
                attribute.t.CopyFrom(_half(attribute.t, precision))
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = kind
    _cast_ends(graph, kind)
    del graph.value_info[:]
    return made


def _half(tensor: onnx.TensorProto, precision: Precision) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(_TYPES[precision]), tensor.name)


def _cast_ends(graph: onnx.GraphProto, kind: int) -> None:
    """Put conversions behind the inputs of a graph and before its outputs."""
    renamed = {v.name: f"{v.name}:16" for v in (*graph.input, *graph.output)}
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = renamed.get(name, name)
    first = [helper.make_node("Cast", [v.name], [renamed[v.name]], to=kind) for v in graph.input]
    last = [helper.make_node("Cast", [renamed[v.name]], [v.name], to=TensorProto.FLOAT) for v in graph.output]
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in graph.node]
    del graph.node[:]
    graph.node.extend([*first, *nodes, *last])
