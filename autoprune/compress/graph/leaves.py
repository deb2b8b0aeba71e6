"""Layers behind the operations of an exported graph: plain modules that hold the network's own parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from autoprune.compress.graph.capture import Captured, arguments_of, layer_of
from autoprune.compress.layers import split_name

_CONVS: dict[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
_BATCHNORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class _NoLayerError(Exception):
    """An operation whose weights are computed, or that no module stands for."""


@dataclass(frozen=True)
class Leaf:
    """A layer that stands for one operation.

    Attributes:
        name: Its name in the network.
        module: The layer; the network's own where it computes nothing else.
        input: The operation's argument that is no parameter.
    """

    name: str
    module: nn.Module
    input: Any


@dataclass(frozen=True)
class _Wanted:
    """What the layer of an operation has to be."""

    kind: type[nn.Module]
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor | None]
    input: Any


class Leaves:
    """Finds or makes the layers of a network, each once.

    Args:
        model: The network.
        captured: Its graph.
    """

    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self.model = model
        self.captured = captured
        self.modules = dict(model.named_modules())
        self.made: dict[str, nn.Module] = {}
        self._turned: dict[str, nn.Parameter] = {}

    def of(self, node: fx.Node) -> Leaf | None:
        """Return the layer of an operation; None where no module can stand for it."""
        build = _BUILDERS.get(str(node.target).removeprefix("aten."))
        if build is None:
            return None
        try:
            wanted = build(self, arguments_of(node), node)
        except _NoLayerError:
            return None
        if wanted.kind is nn.Dropout:
            return self._dropout(node, wanted)
        weight = wanted.tensors.get("weight")
        if weight is None:
            return None
        for name in self._names(node):
            own = self.modules.get(name)
            known = self.made.get(name)
            if known is not None and _holds(known, wanted):
                return Leaf(name, known, wanted.input)
            if known is None and own is not None and _is_plain(own, wanted.kind) and _holds(own, wanted):
                self.made[name] = own
                return Leaf(name, own, wanted.input)
        free = [name for name in self._names(node) if name not in self.made]
        if not free:
            return None
        self.made[free[0]] = self._new(free[0], wanted)
        return Leaf(free[0], self.made[free[0]], wanted.input)

    # -- parameters --------------------------------------------------------------------------

    def tensor(self, value: Any) -> Tensor | None:
        """Return the parameter or buffer that an argument is.

        Raises:
            _NoLayerError: If it is computed.
        """
        if value is None:
            return None
        name = self.captured.tensors.get(value.name) if isinstance(value, fx.Node) else None
        if not name:
            raise _NoLayerError
        return attribute(self.model, name)

    def turned(self, value: Any) -> Tensor:
        """Return a weight ``(in, out)`` as ``(out, in)``; the same one for the same weight.

        Raises:
            _NoLayerError: If it is computed, or something else reads it as it is.
        """
        weight = self.tensor(value)
        if weight is None or weight.dim() != 2 or any(not _multiplies(user, value) for user in value.users):
            raise _NoLayerError
        name = self.captured.tensors[value.name]
        if name not in self._turned:
            self._turned[name] = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
        return self._turned[name]

    # -- modules -----------------------------------------------------------------------------

    def _names(self, node: fx.Node) -> list[str]:
        """Return names for the layer of an operation: its module's, its weight's owner's, or one after its weight."""
        found = []
        around = layer_of(node)
        for argument in node.all_input_nodes:
            name = self.captured.tensors.get(argument.name)
            for alias in self.captured.aliases.get(name, (name,)) if name else ():
                owner, own = split_name(alias)
                if own == "weight":
                    found.append(owner)
                elif own.endswith("weight"):
                    found.append(f"{owner}.{own.removesuffix('weight').rstrip('_') or 'layer'}".lstrip("."))
                elif not own.endswith("bias") and not own.startswith(("running", "num_batches")):
                    found.append(f"{alias}_layer")
        found = [name for name in found if name]
        # Of several layers that share a weight the one that runs here.
        return sorted(dict.fromkeys(found), key=lambda name: name != around)

    def _dropout(self, node: fx.Node, wanted: _Wanted) -> Leaf:
        around = layer_of(node)
        own = self.modules.get(around)
        if isinstance(own, nn.Dropout) and _is_plain(own, nn.Dropout):
            self.made[around] = own
            return Leaf(around, own, wanted.input)
        number = 0
        while (name := f"{around}.dropout_{number}".lstrip(".")) in self.made or name in self.modules:
            number += 1
        self.made[name] = nn.Dropout(**wanted.settings)
        return Leaf(name, self.made[name], wanted.input)

    def _new(self, name: str, wanted: _Wanted) -> nn.Module:
        made = wanted.kind(**wanted.settings, device="meta")
        for own, tensor in wanted.tensors.items():
            if isinstance(tensor, nn.Parameter) or tensor is None:
                setattr(made, own, tensor)
            else:
                made.register_buffer(own, tensor)
        if isinstance(made, nn.modules.batchnorm._BatchNorm):
            counted = getattr(self.modules.get(name), "num_batches_tracked", None)
            made.num_batches_tracked = torch.tensor(0) if counted is None else counted
        return made.eval()


def attribute(model: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer called ``name``."""
    owner, own = split_name(name)
    found = getattr(model.get_submodule(owner), own)
    assert isinstance(found, Tensor)  # noqa: S101
    return found


def _multiplies(user: fx.Node, weight: fx.Node) -> bool:
    """Whether an operation multiplies something by a weight on its right, and is a linear layer by that."""
    name = str(user.target).removeprefix("aten.")
    return name in ("addmm.default", "mm.default", "matmul.default") and (
        user.args[-1] is weight and weight not in user.args[:-1]
    )


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what its kind does and nothing else."""
    return (
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and getattr(module, "padding_mode", "zeros") == "zeros"
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _holds(module: nn.Module, wanted: _Wanted) -> bool:
    return isinstance(module, wanted.kind) and all(
        getattr(module, name, None) is tensor for name, tensor in wanted.tensors.items()
    )


# -- operations ------------------------------------------------------------------------------


def _linear(leaves: Leaves, given: dict[str, Any], _: fx.Node) -> _Wanted:
    weight, bias = leaves.tensor(given["weight"]), leaves.tensor(given["bias"])
    return _linear_of(weight, bias, given["input"])


def _linear_of(weight: Tensor | None, bias: Tensor | None, inputs: Any) -> _Wanted:
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or (bias is not None and bias.dim() != 1):
        raise _NoLayerError
    settings = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": bias is not None,
    }
    return _Wanted(nn.Linear, settings, {"weight": weight, "bias": bias}, inputs)


def _added_product(leaves: Leaves, given: dict[str, Any], _: fx.Node) -> _Wanted:
    if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
        raise _NoLayerError
    return _linear_of(leaves.turned(given["mat2"]), leaves.tensor(given["self"]), given["mat1"])


def _product(leaves: Leaves, _: dict[str, Any], node: fx.Node) -> _Wanted:
    return _linear_of(leaves.turned(node.args[1]), None, node.args[0])


def _convolution(leaves: Leaves, given: dict[str, Any], node: fx.Node) -> _Wanted:
    weight, bias = leaves.tensor(given["weight"]), leaves.tensor(given["bias"])
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    kind = _CONVS[name]
    if not isinstance(weight, nn.Parameter):
        raise _NoLayerError
    groups = int(given.get("groups", 1))
    sides = [weight.shape[0], weight.shape[1] * groups]
    settings = {
        "in_channels": sides["transpose" not in name],
        "out_channels": sides["transpose" in name],
        "kernel_size": tuple(weight.shape[2:]),
        "bias": bias is not None,
        "groups": groups,
    }
    for own in ("stride", "padding", "dilation", "output_padding"):
        if own in given:
            value = given[own]
            rank = weight.dim() - 2
            settings[own] = value if isinstance(value, str) else tuple(value) * (rank // len(value))
    return _Wanted(kind, settings, {"weight": weight, "bias": bias}, given["input"])


def _batchnorm(leaves: Leaves, given: dict[str, Any], node: fx.Node) -> _Wanted:
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = {name: leaves.tensor(given[name]) for name in names}
    weight = tensors["weight"]
    if given["training"] or any(tensor is None for tensor in tensors.values()) or weight is None:
        raise _NoLayerError
    rank = given["input"].meta["val"].dim()
    settings = {"num_features": len(weight), "eps": given["eps"], "momentum": given["momentum"]}
    return _Wanted(_BATCHNORMS[rank], settings, tensors, given["input"])


def _layernorm(leaves: Leaves, given: dict[str, Any], _: fx.Node) -> _Wanted:
    tensors = {"weight": leaves.tensor(given["weight"]), "bias": leaves.tensor(given["bias"])}
    settings = {
        "normalized_shape": list(given["normalized_shape"]),
        "eps": given["eps"],
        "bias": tensors["bias"] is not None,
    }
    return _Wanted(nn.LayerNorm, settings, tensors, given["input"])


def _rmsnorm(leaves: Leaves, given: dict[str, Any], _: fx.Node) -> _Wanted:
    settings = {"normalized_shape": list(given["normalized_shape"]), "eps": given["eps"]}
    return _Wanted(nn.RMSNorm, settings, {"weight": leaves.tensor(given["weight"])}, given["input"])


def _groupnorm(leaves: Leaves, given: dict[str, Any], _: fx.Node) -> _Wanted:
    tensors = {"weight": leaves.tensor(given["weight"]), "bias": leaves.tensor(given["bias"])}
    weight = tensors["weight"]
    if weight is None or tensors["bias"] is None:
        raise _NoLayerError
    settings = {"num_groups": given["num_groups"], "num_channels": len(weight), "eps": given["eps"]}
    return _Wanted(nn.GroupNorm, settings, tensors, given["input"])


def _embedding(leaves: Leaves, given: dict[str, Any], _: fx.Node) -> _Wanted:
    weight = leaves.tensor(given["weight"])
    if weight is None or given["scale_grad_by_freq"] or given["sparse"]:
        raise _NoLayerError
    padding = given["padding_idx"]
    settings = {
        "num_embeddings": weight.shape[0],
        "embedding_dim": weight.shape[1],
        "padding_idx": padding if padding >= 0 else None,
    }
    return _Wanted(nn.Embedding, settings, {"weight": weight}, given["indices"])


def _prelu(leaves: Leaves, given: dict[str, Any], _: fx.Node) -> _Wanted:
    weight = leaves.tensor(given["weight"])
    if weight is None:
        raise _NoLayerError
    return _Wanted(nn.PReLU, {"num_parameters": weight.numel()}, {"weight": weight}, given["self"])


def _dropout(_: Leaves, given: dict[str, Any], node: fx.Node) -> _Wanted:
    return _Wanted(nn.Dropout, {"p": given["p"]}, {}, node.args[0])


_BUILDERS: dict[str, Callable[[Leaves, dict[str, Any], fx.Node], _Wanted]] = {
    "linear.default": _linear,
    "addmm.default": _added_product,
    "mm.default": _product,
    "matmul.default": _product,
    **{f"{name}.{kind}": _convolution for name in _CONVS for kind in ("default", "padding", "input")},
    "batch_norm.default": _batchnorm,
    "layer_norm.default": _layernorm,
    "rms_norm.default": _rmsnorm,
    "group_norm.default": _groupnorm,
    "embedding.default": _embedding,
    "prelu.default": _prelu,
    "dropout.default": _dropout,
    "dropout_.default": _dropout,
}
