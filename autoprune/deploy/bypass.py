"""The dense network's graph without some of its residual blocks, so that a candidate need not be exported anew."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace

import onnx

from autoprune.deploy.executed import layer_of
from autoprune.deploy.shrink import drop_unused
from autoprune.deploy.template import Template, is_layer

_ACTIVATIONS = ("Relu", "Clip")


def without_blocks(template: Template, blocks: Collection[str]) -> Template | None:
    """Return the graph in which each block's addition gives its shortcut.

    Args:
        template: Graph of the dense network.
        blocks: Names of modules that add a branch to their input.

    Returns:
        The smaller graph; None where a block's addition is not found. Whether it computes what the network without
        the blocks does, is for the caller to compare.
    """
    proto = copy.deepcopy(template.proto)
    for block in blocks:
        if not _bypass(proto.graph, block):
            return None
    _drop_unreached(proto.graph)
    drop_unused(proto)
    used = {name for node in proto.graph.node for name in node.input}
    return replace(
        template,
        proto=proto,
        folded={weight: found for weight, found in template.folded.items() if weight in used},
        transposed={name: weight for name, weight in template.transposed.items() if name in used},
    )


def _bypass(graph: onnx.GraphProto, block: str) -> bool:
    """Let whatever reads the block's sum read the shortcut; the sum is the first of something inside and outside."""
    inside: set[str] = set()
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        layer = is_layer(node) and layer_of(node.name).startswith(f"{block}.")
        from_inside = [name for name in node.input if name in inside]
        outside = [name for name in node.input if name not in inside and name not in constants]
        if node.op_type == "Add" and from_inside and len(outside) == 1 and not layer:
            result = node.output[0]
            readers = [n for n in graph.node if result in n.input]
            if len(readers) == 1 and readers[0].op_type in _ACTIVATIONS:
                result = readers[0].output[0]
            _replace(graph, result, outside[0])
            return True
        if layer or from_inside:
            inside.update(node.output)
    return False


def _replace(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def _drop_unreached(graph: onnx.GraphProto) -> None:
    """Remove the nodes that no output needs."""
    wanted = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
