"""The reference for surgery: the dense network that ignores some units, every size as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from autoprune.compress.graph.capture import arguments_of
from autoprune.compress.graph.find import Traced
from autoprune.compress.graph.layer_rules import LAYER_RULES, averaged
from autoprune.compress.graph.network import GraphNetwork

_AVERAGES = {name for name, rule in LAYER_RULES.items() if rule is averaged}
_NORMALISING = ("aten.layer_norm.default", "aten.rms_norm.default")


@torch.no_grad()
def run_ignoring(
    network: GraphNetwork, traced: Traced, plan: Mapping[str, Sequence[int]], inputs: Sequence[Any]
) -> Any:
    """Run a network that ignores the units that ``plan`` drops.

    Whatever a dropped unit stands for is zero behind every operation. Averages and normalisations over such a
    dimension are those of what is left, as they are in a network that was cut.

    Args:
        network: The traced network, or one with the same graph and other values of its parameters.
        traced: What its dimensions are made of.
        plan: Kept units of some groups.
        inputs: What the network takes.

    Returns:
        What the network returns.
    """
    gone = np.zeros(traced.units.count, dtype=bool)
    for name, kept in plan.items():
        own = traced.units_of[name]
        gone[own] = True
        gone[own[list(kept)]] = False
    return _Ignoring(network, traced, gone).run(*inputs)


class _Ignoring(fx.Interpreter):
    def __init__(self, network: GraphNetwork, traced: Traced, gone: NDArray[np.bool_]) -> None:
        super().__init__(network, graph=network.graph)
        self.extra_traceback = False
        self.traced = traced
        self.gone = gone

    def run_node(self, node: fx.Node) -> Any:
        """Run one operation, and make zeros of what is to be ignored."""
        made = self._of_what_is_left(node)
        if made is None:
            made = super().run_node(node)
        if node.op == "get_attr" and isinstance(made, Tensor):
            made = made.clone()
        return self._masked(made, self.traced.dims.get(node.name))

    def _masked(self, made: Any, dims: Any) -> Any:
        if isinstance(made, Tensor) and isinstance(dims, list) and len(dims) == made.dim():
            # In place, so that what is a view of something else stays one.
            spread = any(step == 0 and size > 1 for step, size in zip(made.stride(), made.shape, strict=True))
            for place, dim in enumerate(dims):
                lost = self._lost(dim)
                if lost.any() and len(lost) == made.shape[place]:
                    shape = [-1 if axis == place else 1 for axis in range(made.dim())]
                    zeroed = torch.from_numpy(lost).to(made.device).reshape(shape)
                    made = made.masked_fill(zeroed, 0) if spread else made.masked_fill_(zeroed, 0)
        elif isinstance(made, tuple | list) and isinstance(dims, tuple):
            made = type(made)(self._masked(each, own) for each, own in zip(made, dims, strict=True))
        return made

    def _lost(self, dim: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which indices of a dimension need a unit that is gone."""
        needed: NDArray[np.bool_] = self.gone[self.traced.units.resolved(dim)]
        return np.asarray(needed.any(axis=1))

    # -- what runs over whole dimensions ------------------------------------------------------

    def _of_what_is_left(self, node: fx.Node) -> Any:
        """Return an average or a normalisation over a dimension that lost something; None for anything else."""
        if node.op == "call_module":
            layer = self.submodules[str(node.target)]
            if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
                return self._normalised(node, [-1], layer)
            if isinstance(layer, nn.GroupNorm):
                return self._normalised(node, [1], layer)
        elif node.op == "call_function" and str(node.target) in _AVERAGES:
            return self._averaged(node)
        elif node.op == "call_function" and str(node.target) in _NORMALISING:
            return self._normalised(node, [-1], None)
        return None

    def _left(self, node: fx.Node, places: Sequence[int]) -> dict[int, Tensor]:
        """Return the indices that are left along dimensions of a node that lost something."""
        dims = self.traced.dims.get(node.name)
        found = {}
        for place in places if isinstance(dims, list) else ():
            lost = self._lost(dims[place])  # type: ignore[index]
            if lost.any():
                found[place] = torch.from_numpy(np.flatnonzero(~lost))
        return found

    def _value(self, argument: Any) -> Any:
        return self.env[argument] if isinstance(argument, fx.Node) else argument

    def _averaged(self, node: fx.Node) -> Any:
        first = node.all_input_nodes[0]
        x: Tensor = self.env[first]
        wanted = arguments_of(node).get("dim")
        places = [wanted] if isinstance(wanted, int) else list(wanted or range(x.dim()))
        left = self._left(first, places)
        if not left:
            return None
        for place, index in left.items():
            x = x.index_select(place, index.to(x.device))
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return node.target(x, *args[1:], **kwargs)  # type: ignore[operator]

    def _normalised(self, node: fx.Node, places: Sequence[int], layer: nn.Module | None) -> Any:
        first = node.all_input_nodes[0]
        left = self._left(first, places)
        if not left:
            return None
        ((place, index),) = left.items()
        x: Tensor = self.env[first]
        index = index.to(x.device)
        given = arguments_of(node)
        weights = [
            getattr(layer, name, None) if layer is not None else self._value(given.get(name))
            for name in ("weight", "bias")
        ]
        weight, bias = (None if tensor is None else tensor[index] for tensor in weights)
        taken = x.index_select(place, index)
        if isinstance(layer, nn.GroupNorm):
            made = nn.functional.group_norm(taken, layer.num_groups, weight, bias, layer.eps)
        elif isinstance(layer, nn.RMSNorm) or "rms_norm" in str(node.target):
            eps = layer.eps if isinstance(layer, nn.RMSNorm) else given["eps"]
            made = nn.functional.rms_norm(taken, [len(index)], weight, eps)
        else:
            eps = layer.eps if isinstance(layer, nn.LayerNorm) else given["eps"]
            made = nn.functional.layer_norm(taken, [len(index)], weight, bias, eps)
        return torch.zeros_like(x).index_copy(place, index, made)
