"""What torch's functions do to the units of values, each a rule of the recorder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map

from autoprune.compress.flow.units import FIXED, ZERO, Call, Rule, compact, fixed

# f(s x) = s f(x) for every s > 0, element by element.
_HOMOGENEOUS = (
    "relu", "leaky_relu", "rrelu", "prelu", "abs", "neg", "dropout", "feature_dropout", "alpha_dropout",
    "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous", "clone", "detach", "alias", "to",
    "float", "double", "type_as", "lift_fresh",
)  # fmt: skip
# The same values in another shape, in the same order.
_RESHAPING = (
    "view",
    "reshape",
    "unsafe_view",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "view_as",
    "reshape_as",
)
# Values in other places, some of them left out or repeated.
_MOVING = (
    "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "__getitem__", "select", "slice",
    "narrow", "chunk", "split", "tensor_split", "split_with_sizes", "unbind", "expand", "expand_as", "repeat", "flip",
    "roll", "cat", "concat", "concatenate", "stack", "index_select",
)  # fmt: skip
# Weighted means and maxima over places of each channel, by the number of the last dimensions that are places.
_POOLING = tuple(
    f"{kind}_pool{places}d{ending}"
    for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp")
    for places in (1, 2, 3)
    for ending in ("", "_with_indices")
)
_RESIZING = (
    "interpolate", "upsample", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
)  # fmt: skip
_REDUCING = ("mean", "sum", "amax", "amin")
_ADDING = ("add", "__add__", "__iadd__", "__radd__", "sub", "__sub__", "__isub__", "__rsub__")
_MULTIPLYING = (
    "mul",
    "multiply",
    "__mul__",
    "__imul__",
    "__rmul__",
    "div",
    "divide",
    "__truediv__",
    "__itruediv__",
)
_DIVIDING = ("div", "divide", "__truediv__", "__itruediv__")


def _same(call: Call) -> bool:
    """Units of the first argument; other tensors, such as slopes of a PReLU, stay as they are."""
    for value in (*call.args[1:], *call.kwargs.values()):
        if isinstance(value, Tensor):
            call.tape.note_elsewhere(value)
    call.tape.put(call.output, call.before)
    return True


def _reshaped(call: Call) -> bool:
    units = call.before
    call.tape.put(call.output, None if units is None else units.reshape(call.output.shape))
    return True


def _moved(call: Call) -> bool:
    """Do with the units what was done with the values."""
    values = [value for value in tree_iter((call.args, call.kwargs)) if isinstance(value, Tensor)]
    if call.output is call.args[0] or all(call.tape.units(value) is None for value in values):
        return False

    def units_for(value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        units = call.tape.units(value)
        call.tape.note_elsewhere(value)
        return fixed(value.shape) if units is None else units

    moved = call.function(*tree_map(units_for, call.args), **tree_map(units_for, call.kwargs))
    single = isinstance(call.output, Tensor)
    pairs = [(call.output, moved)] if single else list(zip(call.output, moved, strict=True))
    for tensor, units in pairs:
        call.tape.put(tensor, units if bool((units != FIXED).any()) else None)
    return True


def _padded(call: Call) -> bool:
    units, mode = call.before, call.argument(2, "mode", "constant")
    if units is None:
        return False
    constant = call.name == "constant_pad_nd" or mode == "constant"
    value = mode if call.name == "constant_pad_nd" else call.argument(3, "value")
    pad = call.argument(1, "pad")
    if not constant:
        made = torch.nn.functional.pad(units.double(), pad, mode).long()
    else:
        made = torch.nn.functional.pad(units, pad, value=FIXED if value else ZERO)
    call.tape.put(call.output, made)
    return True


def _pooled(call: Call) -> bool:
    """Pool over places, of which every channel has one unit."""
    output = call.output if isinstance(call.output, Tensor) else call.output[0]
    places = next((int(n) for n in "123" if f"{n}d" in call.name), output.dim() - 2)
    if call.before is None:
        return False
    dims = list(range(output.dim() - places, output.dim()))
    units = _alike(call.before, dims)
    if units is None:
        return False
    call.tape.put(output, units.expand(output.shape))
    for other in () if isinstance(call.output, Tensor) else call.output[1:]:
        call.tape.put(other, None)
    return True


def _reduced(call: Call) -> bool:
    dims = call.argument(1, "dim", call.kwargs.get("axis"))
    if call.before is None or dims is None or not isinstance(call.output, Tensor):
        return False
    units = _alike(call.before, [dims] if isinstance(dims, int) else list(dims))
    if units is None:
        return False
    call.tape.put(call.output, units.reshape(call.output.shape))
    return True


def _added(call: Call) -> bool:
    one, other = call.args[0], call.argument(1, "other")
    if isinstance(other, int | float) and other == 0:  # as the sum of a list begins
        return _same(call)
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    found = [call.before, call.tape.units(other)]
    if found[0] is None and found[1] is None:
        return False
    first, second = compact(*(_spread(units, call.output.shape) for units in found))
    call.tape.join(first, second)
    call.tape.note_elsewhere(one)
    call.tape.note_elsewhere(other)
    made = torch.where(first == ZERO, second, first)
    call.tape.put(call.output, made.expand(call.output.shape))
    return True


def _multiplied(call: Call) -> bool:
    """A value times what no factor changes; a weight for each channel is a maker, as in a normalisation by hand."""
    one, other = call.args[0], call.argument(1, "other")
    tape = call.tape
    if not isinstance(other, Tensor):
        return _same(call)
    if not isinstance(one, Tensor):
        return False
    units = [tape.live(call.before), tape.live(tape.units(other))]
    if (units[0] is None) == (units[1] is None):
        gains = [value for value in (one, other) if id(value) in tape.names]
        if units[0] is not None or len(gains) != 1 or call.name in _DIVIDING:
            return False
        return _gained(call, gains[0])
    if units[0] is None and call.name in _DIVIDING:
        return False
    known = units[0] if units[0] is not None else units[1]
    tape.note_elsewhere(one)
    tape.note_elsewhere(other)
    tape.put(call.output, _spread(known, call.output.shape))
    return True


def _gained(call: Call, gain: Tensor) -> bool:
    """Make units of a parameter ``(channels,)`` that multiplies the last dimension of a fixed value."""
    output = call.output
    if gain.dim() != 1 or output.dim() < 2 or gain.shape[0] != output.shape[-1] or gain.shape[0] < 2:
        return False
    units = call.tape.make(call.tape.names[id(gain)], "", "layernorm", len(gain))
    call.tape.put(output, units.expand(output.shape))
    return True


def _linear(call: Call) -> bool:
    return _layer(call, "linear", call.args[0].dim() - 1, out_axis=0)


def _convolution(call: Call) -> bool:
    weight, transposed = call.argument(1, "weight"), "transpose" in call.name
    module = call.tape.convolutions.get(call.tape.names.get(id(weight), ""))
    if module is None or module.transposed != transposed or (transposed and module.groups > 1):
        return False
    places = weight.dim() - 2
    return _layer(call, "conv", call.args[0].dim() - 1 - places, out_axis=1 if transposed else 0)


def _layer(call: Call, kind: Any, dim: int, out_axis: int) -> bool:
    """A layer that reads units along ``dim`` of its input, and makes others there."""
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    names = [call.tape.names.get(id(each), "") for each in (weight, bias)]
    if not names[0] or (bias is not None and not names[1]):
        return False
    _read(call, names[0], kind, dim)
    _make(call, names, "layer", int(weight.shape[out_axis]), dim)
    return True


def _batch_norm(call: Call) -> bool:
    tape = call.tape
    weight, bias = call.argument(3, "weight"), call.argument(4, "bias")
    names = [tape.names.get(id(each), "") for each in (weight, bias)]
    if not names[0] or (bias is not None and not names[1]):
        return False
    layer = ""
    if call.before is not None and (units := _channel_units(call.before, 1)) is not None:
        own = (m.weight for m in tape.makers.values() if m.kind == "layer" and torch.equal(m.units, units))
        layer = next(own, "")
    tape.fix(call.args[0])
    _make(call, names, "batchnorm", len(weight), 1, layer)
    return True


def _layer_norm(call: Call) -> bool:
    """LayerNorm and RMSNorm over the last dimension."""
    rms = call.name == "rms_norm"
    weight, bias = call.argument(2, "weight"), None if rms else call.argument(3, "bias")
    names = [call.tape.names.get(id(each), "") for each in (weight, bias)]
    if not names[0] or weight.dim() != 1 or (bias is not None and not names[1]):
        return False
    call.tape.fix(call.args[0])
    _make(call, names, "layernorm", len(weight), call.output.dim() - 1)
    return True


def _attention(call: Call) -> bool:
    """``nn.MultiheadAttention`` of one value with itself: its input projection reads, its output projection makes."""
    tape = call.tape
    query, key, value = call.args[:3]
    names = ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias")
    given = dict(zip(names, (*call.args[5:7], *call.args[11:13]), strict=True))
    known = {name: tape.names.get(id(each), "") for name, each in given.items()}
    if query is not key or query is not value or not known["in_proj_weight"]:
        return False
    _read(call, known["in_proj_weight"], "linear", query.dim() - 1)
    output, *rest = call.output
    for other in rest:
        if isinstance(other, Tensor):
            tape.put(other, None)
    own = [known["out_proj_weight"], known["out_proj_bias"]]
    if not own[0]:
        tape.put(output, None)
        return True
    made = tape.make(own[0], own[1], "layer", int(given["out_proj_weight"].shape[0]))
    tape.put(output, made.expand(output.shape))
    return True


def _read(call: Call, weight: str, kind: Any, dim: int) -> None:
    """Note what units a layer reads along a dimension of its input; several in one channel are fixed."""
    units = None if call.before is None else _channel_units(call.before, dim)
    if units is None:
        call.tape.fix(call.args[0])
        units = fixed(call.args[0].shape[dim : dim + 1])
    call.tape.read(weight, kind, units)


def _make(call: Call, names: list[str], kind: Any, count: int, dim: int, layer: str = "") -> None:
    units = call.tape.make(names[0], names[1], kind, count, layer)
    shape = [1] * call.output.dim()
    shape[dim] = count
    call.tape.put(call.output, units.reshape(shape).expand(call.output.shape))


def _channel_units(units: Tensor, dim: int) -> Tensor | None:
    """Return the unit of each channel along a dimension; None where a channel has several."""
    alike = _alike(units, [other for other in range(units.dim()) if other != dim])
    return None if alike is None else alike.flatten()


def _alike(units: Tensor, dims: Iterable[int]) -> Tensor | None:
    """Return units without some dimensions, which are kept as 1, if they are alike along these; zeros do not count."""
    dims = list(dims)
    found = units.amax(dims, keepdim=True) if dims else units
    return found if bool(((units == found) | (units == ZERO)).all()) else None


def _spread(units: Tensor | None, shape: torch.Size) -> Tensor:
    return fixed(shape) if units is None else units.expand(shape)


RULES: dict[str, Rule] = {
    **dict.fromkeys(_HOMOGENEOUS, _same),
    **dict.fromkeys(_RESHAPING, _reshaped),
    **dict.fromkeys(_MOVING, _moved),
    **dict.fromkeys(("pad", "constant_pad_nd"), _padded),
    **dict.fromkeys((*_POOLING, *_RESIZING), _pooled),
    **dict.fromkeys(_REDUCING, _reduced),
    **dict.fromkeys(_ADDING, _added),
    **dict.fromkeys(_MULTIPLYING, _multiplied),
    "linear": _linear,
    **dict.fromkeys((f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)), _convolution),
    "batch_norm": _batch_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "multi_head_attention_forward": _attention,
}
