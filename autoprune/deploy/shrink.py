"""Bytes of an ONNX file that nothing needs: long internal names, unused initialisers, metadata."""

from __future__ import annotations

import string

import onnx

_DIGITS = string.digits + string.ascii_letters


def shrink(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Shorten internal names in place and drop what is unused.

    Inputs and outputs of the model and the names of layer nodes stay, so that what a runtime executes can be
    traced back to the network.
    """
    graph = proto.graph
    if _has_subgraphs(proto):
        return proto
    drop_unused(proto)
    graph.ClearField("value_info")
    graph.ClearField("doc_string")
    kept = {value.name for value in (*graph.input, *graph.output)}
    short: dict[str, str] = {"": ""}

    def rename(name: str) -> str:
        if name in kept:
            return name
        if name not in short:
            short[name] = _numeral(len(short))
        return short[name]

    for node in graph.node:
        node.input[:] = [rename(name) for name in node.input]
        node.output[:] = [rename(name) for name in node.output]
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.name.startswith("node_"):
            node.ClearField("name")
    for initializer in graph.initializer:
        initializer.name = rename(initializer.name)
        initializer.ClearField("doc_string")
        initializer.ClearField("metadata_props")
    return proto


def drop_unused(proto: onnx.ModelProto) -> None:
    """Remove, in place, the initialisers that no node reads."""
    graph = proto.graph
    if _has_subgraphs(proto):
        return
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for initializer in [i for i in graph.initializer if i.name not in used]:
        graph.initializer.remove(initializer)


def _has_subgraphs(proto: onnx.ModelProto) -> bool:
    """Return whether a node holds a graph of its own, which reads names of this one."""
    kinds = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    return any(attribute.type in kinds for node in proto.graph.node for attribute in node.attribute)


def _numeral(number: int) -> str:
    digits = ""
    while number:
        number, rest = divmod(number, len(_DIGITS))
        digits = _DIGITS[rest] + digits
    # A leading letter keeps these apart from names that are numbers.
    return "_" + digits
