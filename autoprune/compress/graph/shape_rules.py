"""Rules of operations that only arrange what there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, fx

from autoprune.compress.graph.capture import sizes_of, where
from autoprune.compress.graph.dims import broadcast, divided, reshaped, tie
from autoprune.compress.graph.propagate import Dims, Propagation, Rule, unknown
from autoprune.compress.graph.units import Dim, fixed, flat, merged


def same(p: Propagation, node: fx.Node) -> Any:
    """Keeps all dimensions of its first argument."""
    return p.of[node.all_input_nodes[0]]


def view(p: Propagation, node: fx.Node) -> Dims:
    """The same values in the same order with another shape."""
    return reshaped(p.units, p.dims(node.args[0]), sizes_of(node), where(node))


def permute(p: Propagation, node: fx.Node) -> Dims:
    """Dimensions in another order."""
    x = p.dims(node.args[0])
    return [x[int(place)] for place in p.arguments(node)["dims"]]


def transpose(p: Propagation, node: fx.Node) -> Dims:
    """Two dimensions change places."""
    given = p.arguments(node)
    x = list(p.dims(node.args[0]))
    named = [int(given[name]) for name in ("dim0", "dim1", "axis0", "axis1") if name in given]
    one, two = named or (0, len(x) - 1)
    x[one], x[two] = x[two], x[one]
    return x


def expand(p: Propagation, node: fx.Node) -> Dims:
    """Dimensions of size 1 are repeated."""
    x, sizes = p.dims(node.args[0]), sizes_of(node)
    padded = [fixed(1)] * (len(sizes) - len(x)) + x
    return [dim if len(dim) == size else fixed(size) for dim, size in zip(padded, sizes, strict=True)]


def repeat(p: Propagation, node: fx.Node) -> Dims:
    """Whole dimensions follow themselves."""
    x, sizes = p.dims(node.args[0]), sizes_of(node)
    padded = [fixed(1)] * (len(sizes) - len(x)) + x
    return [np.tile(dim, (size // len(dim), 1)) for dim, size in zip(padded, sizes, strict=True)]


def repeat_interleave(p: Propagation, node: fx.Node) -> Any:
    """Each index follows itself."""
    given, x, sizes = p.arguments(node), list(p.dims(node.args[0])), sizes_of(node)
    if given.get("dim") is None or not isinstance(given.get("repeats"), int):
        return unknown(p, node)
    place = int(given["dim"]) % len(x)
    x[place] = np.repeat(x[place], sizes[place] // len(x[place]), axis=0)
    return x


def concatenate(p: Propagation, node: fx.Node) -> Dims:
    """One dimension after the other."""
    given = p.arguments(node)
    tensors = [p.dims(each) for each in given["tensors"] if np.prod(sizes_of(each)) > 0]
    place = int(given.get("dim", 0)) % len(tensors[0])
    found = []
    for axis in range(len(tensors[0])):
        here = [dims[axis] for dims in tensors]
        if axis == place:
            found.append(_after_each_other(here))
            continue
        for other in here[1:]:
            tie(p.units, here[0], other, where(node))
        found.append(here[0])
    return found


def stack(p: Propagation, node: fx.Node) -> Dims:
    """Tensors along a new dimension."""
    given = p.arguments(node)
    tensors = [p.dims(each) for each in given["tensors"]]
    found = list(broadcast(p.units, tensors, where(node)))
    place = int(given.get("dim", 0)) % (len(found) + 1)
    return [*found[:place], fixed(len(tensors)), *found[place:]]


def parts(p: Propagation, node: fx.Node) -> tuple[Dims, ...]:
    """One dimension is divided into pieces that follow each other."""
    x, begin = p.dims(node.args[0]), 0
    place = int(p.arguments(node).get("dim", 0)) % len(x)
    found = []
    for value in node.meta["val"]:
        size = int(value.shape[place])
        found.append([*x[:place], x[place][begin : begin + size], *x[place + 1 :]])
        begin += size
    return tuple(found)


def unbind(p: Propagation, node: fx.Node) -> tuple[Dims, ...]:
    """One dimension is taken apart, so that it has to stay."""
    x = p.dims(node.args[0])
    place = int(p.arguments(node).get("dim", 0)) % len(x)
    p.fix([x[place]], f"{where(node)} counts on it")
    return tuple([*x[:place], *x[place + 1 :]] for _ in node.meta["val"])


def item(p: Propagation, node: fx.Node) -> Any:
    """One of several results."""
    several: Any = node.args[0]
    whole, place = p.of[several], node.args[1]
    return whole[place] if isinstance(whole, tuple) and isinstance(place, int) else None


def select(p: Propagation, node: fx.Node) -> Dims:
    """One index of a dimension, which has to stay."""
    given = p.arguments(node)
    x = p.dims(node.args[0])
    place = int(given["dim"]) % len(x)
    index = given["index"]
    taken = x[place][[index]] if isinstance(index, int) else x[place]
    p.fix([taken], f"{where(node)} takes it")
    return [*x[:place], *x[place + 1 :]]


def window(p: Propagation, node: fx.Node) -> Any:
    """Every n-th index of a range."""
    given = p.arguments(node)
    x = list(p.dims(node.args[0]))
    place = int(given.get("dim", 0)) % len(x)
    if "length" in given:
        start, stop, step = given["start"], None, 1
        if isinstance(start, int):
            stop = start + int(given["length"])
    else:
        start, stop, step = given.get("start"), given.get("end"), given.get("step") or 1
    if not all(bound is None or isinstance(bound, int) for bound in (start, stop, step)):
        return unknown(p, node)
    x[place] = x[place][start:stop:step]
    return x


def index(p: Propagation, node: fx.Node) -> Any:
    """Rows that other tensors choose, of dimensions that have to stay."""
    x = p.dims(node.args[0])
    chosen = [place for place, each in enumerate(node.args[1]) if each is not None]  # type: ignore[arg-type]
    p.fix([x[place] for place in chosen], f"{where(node)} chooses from it")
    rest = [dim for place, dim in enumerate(x) if place not in chosen]
    more = len(sizes_of(node)) - len(rest)
    together = chosen == list(range(chosen[0], chosen[-1] + 1))
    begin = chosen[0] if together else 0
    sizes = sizes_of(node)[begin : begin + more]
    return [*rest[:begin], *(fixed(size) for size in sizes), *rest[begin:]]


def index_select(p: Propagation, node: fx.Node) -> Dims:
    """Indices of one dimension that another tensor chooses."""
    x = list(p.dims(node.args[0]))
    place = int(p.arguments(node)["dim"]) % len(x)
    p.fix([x[place]], f"{where(node)} chooses from it")
    x[place] = fixed(sizes_of(node)[place])
    return x


def flip(p: Propagation, node: fx.Node) -> Dims:
    """Dimensions in reverse order."""
    x = list(p.dims(node.args[0]))
    for place in p.arguments(node)["dims"]:
        x[place] = x[place][::-1]
    return x


def roll(p: Propagation, node: fx.Node) -> Any:
    """Dimensions that begin elsewhere."""
    given = p.arguments(node)
    x = list(p.dims(node.args[0]))
    if not given.get("dims"):
        return unknown(p, node)
    for shift, place in zip(given["shifts"], given["dims"], strict=True):
        x[place] = np.roll(x[place], int(shift), axis=0)
    return x


def pad(p: Propagation, node: fx.Node) -> Dims:
    """Zeros before and after, of which as many stay as what they are added to has."""
    given = p.arguments(node)
    x, amounts = list(p.dims(node.args[0])), list(given["pad"])
    zeros = given.get("mode", "constant") == "constant"
    for place in range(len(amounts) // 2):
        before, after = int(amounts[2 * place]), int(amounts[2 * place + 1])
        own = x[len(x) - 1 - place]
        if not (before or after):
            continue
        if own.shape[1] and zeros and before >= 0 and after >= 0:
            ends = [flat(p.units.new(before)), own, flat(p.units.new(after))]
            own = _after_each_other([end for end in ends if len(end)])
        else:
            p.fix([own], where(node))
            own = fixed(sizes_of(node)[len(x) - 1 - place])
        x[len(x) - 1 - place] = own
    return x


def spatial(p: Propagation, node: fx.Node) -> Any:
    """Keeps examples and channels; the places are others."""
    first = node.all_input_nodes[0]
    x = p.dims(first)
    p.fix(x[2:], where(node))
    value = node.meta["val"]
    if isinstance(value, list | tuple):
        return tuple([*x[:2], *(fixed(int(size)) for size in v.shape[2:])] for v in value)
    return [*x[:2], *(fixed(size) for size in sizes_of(node)[2:])]


def pixel_shuffle(p: Propagation, node: fx.Node) -> Dims:
    """Channels become places."""
    x, sizes = p.dims(node.args[0]), sizes_of(node)
    each = len(x[1]) // sizes[1]
    for place in range(1, each):
        tie(p.units, x[1][::each], x[1][place::each], where(node))
    return [x[0], x[1][::each], *(fixed(size) for size in sizes[2:])]


def pixel_unshuffle(p: Propagation, node: fx.Node) -> Dims:
    """Places become channels."""
    x, sizes = p.dims(node.args[0]), sizes_of(node)
    return [x[0], merged([x[1], fixed(sizes[1] // len(x[1]))]), *(fixed(size) for size in sizes[2:])]


def channel_shuffle(p: Propagation, node: fx.Node) -> Dims:
    """Channels of several groups take turns."""
    x, groups = list(p.dims(node.args[0])), int(p.arguments(node)["groups"])
    outer, inner = divided(p.units, x[1], (groups, len(x[1]) // groups), where(node))
    x[1] = merged([inner, outer])
    return x


def gated(p: Propagation, node: fx.Node) -> Dims:
    """One half gates the other."""
    x = list(p.dims(node.args[0]))
    place = int(p.arguments(node).get("dim", -1)) % len(x)
    half = len(x[place]) // 2
    first, second = x[place][:half], x[place][half:]
    tie(p.units, first, second, where(node))
    x[place] = first
    return x


def made(p: Propagation, node: fx.Node) -> Dims:
    """A constant of one value, which can be made smaller."""
    return [flat(p.units.new(size)) if size > 1 else fixed(size) for size in sizes_of(node)]


def constant(p: Propagation, node: fx.Node) -> Any:
    """A constant whose values differ from place to place."""
    return [fixed(size) for size in sizes_of(node)] if isinstance(node.meta.get("val"), Tensor) else None


def copied(p: Propagation, node: fx.Node) -> Dims:
    """A tensor is written into another one."""
    x = p.dims(node.args[0])
    broadcast(p.units, [x, p.dims(node.args[1])], where(node))
    return x


def _after_each_other(dims: list[Dim]) -> Dim:
    width = max(dim.shape[1] for dim in dims)
    return np.concatenate([np.pad(dim, ((0, 0), (0, width - dim.shape[1]))) for dim in dims])


def _all(rule: Callable[[Propagation, fx.Node], Any], names: str) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}


SHAPE_RULES: dict[str, Rule] = {
    **_all(
        same,
        "alias.default clone.default contiguous.default detach.default detach_.default dropout.default "
        "dropout_.default feature_dropout.default alpha_dropout.default to.dtype to.device to.dtype_layout "
        "_to_copy.default lift_fresh_copy.default type_as.default zeros_like.default ones_like.default "
        "full_like.default fill_.Scalar zero_.default tril.default triu.default rand_like.default "
        "bernoulli_.float div_.Scalar hardswish.default hardsigmoid.default hardtanh.default relu6.default "
        "silu.default "
        "mish.default leaky_relu.default elu.default selu.default celu.default softplus.default softsign.default "
        "logsigmoid.default hardshrink.default softshrink.default threshold.default rrelu.default",
    ),
    **_all(
        view,
        "view.default reshape.default _unsafe_view.default flatten.using_ints unflatten.int squeeze.default "
        "squeeze.dim squeeze.dims squeeze_.dim unsqueeze.default unsqueeze_.default view_as.default "
        "reshape_as.default",
    ),
    **_all(permute, "permute.default"),
    **_all(transpose, "transpose.int t.default numpy_T.default swapaxes.default"),
    **_all(expand, "expand.default expand_as.default broadcast_to.default"),
    **_all(repeat, "repeat.default tile.default"),
    **_all(repeat_interleave, "repeat_interleave.self_int"),
    **_all(concatenate, "cat.default concat.default"),
    **_all(stack, "stack.default"),
    **_all(parts, "split.Tensor split.sizes split_with_sizes.default chunk.default tensor_split.sections"),
    **_all(unbind, "unbind.int"),
    **_all(select, "select.int"),
    **_all(window, "slice.Tensor narrow.default"),
    **_all(index, "index.Tensor"),
    **_all(index_select, "index_select.default"),
    **_all(flip, "flip.default"),
    **_all(roll, "roll.default"),
    **_all(pad, "pad.default constant_pad_nd.default"),
    **_all(
        spatial,
        "max_pool1d.default max_pool2d.default max_pool3d.default max_pool2d_with_indices.default "
        "avg_pool1d.default avg_pool2d.default avg_pool3d.default adaptive_avg_pool1d.default "
        "adaptive_avg_pool2d.default adaptive_avg_pool3d.default adaptive_max_pool2d.default "
        "upsample_nearest2d.vec upsample_nearest2d.default upsample_bilinear2d.vec upsample_bilinear2d.default "
        "upsample_bicubic2d.vec upsample_nearest1d.vec upsample_linear1d.vec upsample_trilinear3d.vec "
        "_upsample_nearest_exact2d.vec",
    ),
    **_all(pixel_shuffle, "pixel_shuffle.default"),
    **_all(pixel_unshuffle, "pixel_unshuffle.default"),
    **_all(channel_shuffle, "channel_shuffle.default"),
    **_all(gated, "glu.default"),
    **_all(made, "zeros.default ones.default full.default new_zeros.default new_ones.default new_full.default "
                 "empty.memory_format new_empty.default"),
    **_all(constant, "arange.default arange.start arange.start_step linspace.default eye.default "
                     "scalar_tensor.default sym_size.int _assert_tensor_metadata.default"),
    **_all(copied, "copy_.default"),
    "<built-in function getitem>": item,
}  # fmt: skip
