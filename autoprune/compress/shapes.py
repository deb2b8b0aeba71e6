"""Shapes of a network's layers in terms of its groups: what a kept unit costs, before anything is cut."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoprune.compress.layers import Conv, channel_count, submodule
from autoprune.space.groups import Axis, Groups
from autoprune.space.shapes import AxisUse, LayerShape


def layer_shapes(model: nn.Module, groups: Groups, inputs: Tensor) -> tuple[LayerShape, ...]:
    """Return the shapes of all layers that are producers of a group, in the order of the groups.

    Args:
        model: The dense network.
        groups: Its groups.
        inputs: A few examples, ``(n, ...)``, run once to see how large the layers' inputs are.
    """
    read, made = _elements(model, [layer for g in groups.groups for layer in g.producers], inputs)
    uses = _uses(model, groups)
    owners = _block_owners(groups)
    found = []
    for group in groups.groups:
        for layer in group.producers:
            module = submodule(model, layer)
            if not isinstance(module, Conv | nn.Linear):
                continue
            found.append(
                LayerShape(
                    name=layer,
                    group=group.name,
                    weights=module.weight.numel(),
                    outputs=channel_count(module, "out"),
                    inputs=channel_count(module, "in"),
                    makes=tuple(uses.get((layer, "out"), ())),
                    reads=tuple(uses.get((layer, "in"), ())),
                    read_elements=read.get(layer, 0),
                    places=made.get(layer, 0) // channel_count(module, "out"),
                    block=next(
                        (owner for block, owner in owners.items() if layer.startswith(f"{block}.")), ""
                    ),
                )
            )
    return tuple(found)


def _uses(model: nn.Module, groups: Groups) -> dict[tuple[str, Axis], list[AxisUse]]:
    """Return how groups take part in the axes of layers."""
    uses: dict[tuple[str, Axis], list[AxisUse]] = {}
    taken: dict[tuple[str, Axis], list[set[int]]] = {}
    for group in groups.groups:
        for member in group.members:
            if member.kind not in ("conv", "depthwise", "linear"):
                continue
            channels = channel_count(submodule(model, member.layer), member.axis)
            own = {channel for owned in member.index_map for channel in owned}
            parts = taken.setdefault((member.layer, member.axis), [])
            part = next((place for place, other in enumerate(parts) if own & other), len(parts))
            parts.append(own)
            use = AxisUse(
                group=group.name,
                share=len(own) / channels / group.size,
                units=group.size,
                part=part,
                sets_bits=bool(group.producers),
            )
            uses.setdefault((member.layer, member.axis), []).append(use)
    return uses


def _block_owners(groups: Groups) -> dict[str, str]:
    return {g.block: g.name for g in groups.groups if g.block}


@torch.no_grad()
def _elements(model: nn.Module, layers: list[str], inputs: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Run ``inputs`` once and return the elements of each layer's input and output for one example."""
    read: dict[str, int] = {}
    made: dict[str, int] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            read[name], made[name] = (each.numel() // len(inputs) for each in (arguments[0], output))

        return hook

    handles = [submodule(model, name).register_forward_hook(note(name)) for name in layers]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return read, made
