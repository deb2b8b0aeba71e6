"""Rules of operations with weights, and of those that normalise, reduce or contract."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from autoprune.compress.graph.capture import sizes_of, where
from autoprune.compress.graph.dims import broadcast, tie
from autoprune.compress.graph.propagate import Dims, Propagation, Rule, unknown
from autoprune.compress.graph.units import Dim, fixed


def linear(p: Propagation, node: fx.Node) -> Dims:
    """``(..., in)`` by ``(out, in)``."""
    given = p.arguments(node)
    x, weight, bias = (p.dims(given[name]) for name in ("input", "weight", "bias"))
    tie(p.units, x[-1], weight[1], where(node))
    if bias:
        tie(p.units, weight[0], bias[0], where(node))
    p.note(node, given["weight"], reads=x[-1], makes=weight[0])
    return [*x[:-1], weight[0]]


def convolution(p: Propagation, node: fx.Node) -> Any:
    """``(n, in, ...)`` by ``(out, in / groups, ...)``, or ``(in, out / groups, ...)`` where it is transposed."""
    given = p.arguments(node)
    x, weight, bias = (p.dims(given[name]) for name in ("input", "weight", "bias"))
    if len(x) != len(weight) or len(weight) < 3:
        return unknown(p, node)
    p.fix(x[2:], where(node))
    p.fix(weight[2:], where(node))
    groups = int(given.get("groups", 1))
    transposed = bool(given.get("transposed", "transpose" in str(node.target)))
    sizes = sizes_of(node)
    makes, reads = (1, 0) if transposed else (0, 1)
    why = where(node)
    alike = 1 if groups == len(x[1]) == len(weight[makes]) else groups
    for dim in (x[1], weight[0]) if groups > 1 else ():
        _tie_blocks(p, dim, alike, why)
    if groups == 1:
        tie(p.units, x[1], weight[reads], why)
        made = weight[makes]
    elif alike == 1:  # each channel by itself
        tie(p.units, x[1], weight[0], why)
        made = weight[0]
    elif transposed:
        tie(p.units, x[1], weight[0], why)
        made = np.tile(weight[1], (groups, 1))
    else:
        tie(p.units, x[1][: len(weight[1])], weight[1], why)
        made = weight[0]
    if bias:
        tie(p.units, made, bias[0], why)
    p.note(node, given["weight"], reads=x[1], makes=made)
    return [x[0], made, *(fixed(size) for size in sizes[2:])]


def _tie_blocks(p: Propagation, dim: Dim, count: int, why: str) -> None:
    """Tie the same places of equal blocks, so that all of them stay equally large."""
    size = len(dim) // count
    for block in range(1, count):
        tie(p.units, dim[:size], dim[block * size : (block + 1) * size], why)


def matmul(p: Propagation, node: fx.Node) -> Any:
    """``(..., n, k)`` by ``(..., k, m)``; vectors have no ``n`` or ``m``."""
    first, second = (p.dims(each) for each in node.args[-2:])
    if not first or not second:
        return unknown(p, node)
    tie(p.units, first[-1], second[-2] if len(second) > 1 else second[-1], where(node))
    if node in p.layers:
        p.note(node, None, reads=first[-1], makes=second[-1])
    batch = broadcast(p.units, [first[:-2], second[:-2]], where(node))
    rows = first[-2:-1]
    columns = second[-1:] if len(second) > 1 else []
    found: Dims = [*batch, *rows, *columns]
    if len(node.args) == 3:  # addmm and baddbmm: what is added comes first
        return broadcast(p.units, [found, p.dims(node.args[0])], where(node))
    return found


def einsum(p: Propagation, node: fx.Node) -> Any:
    """Letters name dimensions; those that are alike are tied."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if "." in equation or "->" not in equation or not isinstance(operands, list | tuple):
        return unknown(p, node)
    terms, outcome = equation.split("->")
    named: dict[str, Any] = {}
    for term, operand in zip(terms.split(","), operands, strict=True):
        for letter, dim in zip(term, p.dims(operand), strict=True):
            if letter in named and len(named[letter]) == len(dim):
                tie(p.units, named[letter], dim, where(node))
            elif letter not in named or len(named[letter]) == 1:
                named[letter] = dim
    return [named[letter] for letter in outcome]


def attention(p: Propagation, node: fx.Node) -> Dims:
    """``(..., heads, places, width)`` of queries, keys and values; several heads may share keys and values."""
    given = p.arguments(node)
    query, key, value = (p.dims(given[name]) for name in ("query", "key", "value"))
    why = where(node)
    tie(p.units, query[-1], key[-1], why)
    tie(p.units, key[-2], value[-2], why)
    if given.get("enable_gqa") and len(key[-3]) < len(query[-3]):
        times = len(query[-3]) // len(key[-3])
        key = [*key[:-3], np.repeat(key[-3], times, axis=0), *key[-2:]]
        value = [*value[:-3], np.repeat(value[-3], times, axis=0), *value[-2:]]
    batch = broadcast(p.units, [query[:-2], key[:-2], value[:-2]], why)
    mask = p.dims(given.get("attn_mask"))
    if mask:
        broadcast(p.units, [[*batch, query[-2], key[-2]], mask], why)
    # The places of keys and values are what the softmax runs over.
    p.fix([key[-2]], f"{why} runs over it")
    return [*batch, query[-2], value[-1]]


def by_channel(p: Propagation, node: fx.Node) -> Dims:
    """Every tensor beside the input has one value for each channel."""
    first, *others = node.all_input_nodes
    x = p.dims(first)
    if p.arguments(node).get("training"):  # by statistics of what it gets (standardised weights)
        p.fix([*x[:1], *x[2:]], f"{where(node)} normalises over it")
    for other in others:
        own = p.dims(other)
        if own and len(own[0]) == len(x[1]):
            tie(p.units, x[1], own[0], where(node))
        else:
            p.fix(own, where(node))
    p.note(node, others[0] if others else None, makes=x[1])
    return x


def over_last(p: Propagation, node: fx.Node) -> Dims:
    """Normalises over the last dimensions, of which what is left is enough."""
    given = p.arguments(node)
    x = p.dims(given["input"])
    for name in ("weight", "bias"):
        own = p.dims(given.get(name))
        for mine, theirs in zip(x[len(x) - len(own) :], own, strict=True):
            tie(p.units, mine, theirs, where(node))
    if len(given["normalized_shape"]) == 1:
        p.note(node, given.get("weight"), makes=x[-1])
    else:
        p.fix(
            x[len(x) - len(given["normalized_shape"]) :], f"{where(node)} normalises over several dimensions"
        )
    return x


def over_groups(p: Propagation, node: fx.Node) -> Dims:
    """Normalises within equal groups of channels, whole groups or as many in each of which can go."""
    given = p.arguments(node)
    x, count = p.dims(given["input"]), int(given["num_groups"])
    _tie_blocks(p, x[1], count, where(node))
    for name in ("weight", "bias"):
        own = p.dims(given.get(name))
        if own:
            tie(p.units, x[1], own[0], where(node))
    p.note(node, given.get("weight"), makes=x[1])
    return x


def embedding(p: Propagation, node: fx.Node) -> Dims:
    """Rows of a table."""
    given = p.arguments(node)
    weight = p.dims(given["weight"])
    p.fix([weight[0]], "it is the vocabulary")
    p.note(node, given["weight"], makes=weight[1])
    return [*p.dims(given["indices"]), weight[1]]


def averaged(p: Propagation, node: fx.Node) -> Any:
    """Averages or adds up over dimensions, of which what is left is enough."""
    return _reduced(p, node, stays=True)


def reduced(p: Propagation, node: fx.Node) -> Any:
    """Takes something else of whole dimensions, which nothing may be missing of."""
    return _reduced(p, node, stays=False)


def _reduced(p: Propagation, node: fx.Node, *, stays: bool) -> Any:
    given = p.arguments(node)
    first = node.all_input_nodes[0]
    x = p.dims(first)
    wanted = given.get("dim")
    places = range(len(x)) if wanted in (None, []) else [wanted] if isinstance(wanted, int) else wanted
    places = {place % max(1, len(x)) for place in places}
    if not stays:
        p.fix([x[place] for place in places], f"{where(node)} runs over it")
    keeps = bool(given.get("keepdim", False))
    found = [
        fixed(1) if place in places else dim for place, dim in enumerate(x) if keeps or place not in places
    ]
    value = node.meta.get("val")
    return tuple(found for _ in value) if isinstance(value, list | tuple) else found


def along(p: Propagation, node: fx.Node) -> Any:
    """Runs along one dimension, as a softmax does, which nothing may be missing of."""
    given = p.arguments(node)
    x = p.dims(node.all_input_nodes[0])
    p.fix([x[int(given.get("dim", -1))]], f"{where(node)} runs along it")
    return x


LAYER_RULES: dict[str, Rule] = {
    "aten.linear.default": linear,
    **{f"aten.conv{n}d.{kind}": convolution for n in (1, 2, 3) for kind in ("default", "padding")},
    "aten.conv_transpose1d.default": convolution,
    "aten.conv_transpose2d.input": convolution,
    "aten.conv_transpose3d.input": convolution,
    "aten.convolution.default": convolution,
    **{f"aten.{name}.default": matmul for name in ("matmul", "bmm", "mm", "addmm", "baddbmm")},
    "aten.einsum.default": einsum,
    "aten.scaled_dot_product_attention.default": attention,
    "aten.batch_norm.default": by_channel,
    "aten.instance_norm.default": by_channel,
    "aten.prelu.default": by_channel,
    "aten.layer_norm.default": over_last,
    "aten.rms_norm.default": over_last,
    "aten.group_norm.default": over_groups,
    "aten.embedding.default": embedding,
    **{
        f"aten.{name}": averaged
        for name in (
            "mean.dim", "mean.default", "sum.dim_IntList", "sum.default", "var.dim", "var.correction", "std.dim",
            "std.correction", "norm.ScalarOpt_dim", "linalg_vector_norm.default", "var_mean.correction",
        )
    },
    **{
        f"aten.{name}": reduced
        for name in (
            "amax.default", "amin.default", "max.dim", "min.dim", "logsumexp.default", "prod.dim_int", "argmax.default",
            "max.default", "min.default", "any.default", "all.default", "any.dim", "all.dim",
        )
    },
    **{
        f"aten.{name}": along
        for name in (
            "softmax.int", "log_softmax.int", "_softmax.default", "_log_softmax.default", "cumsum.default",
            "sort.default", "argsort.default",
        )
    },
}  # fmt: skip
