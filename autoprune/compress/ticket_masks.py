"""Masks of lottery tickets: which weights of a network stay, and the random controls for them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.compress.layers import Conv
from autoprune.compress.surgery import Plan, make_plan
from autoprune.compress.unit_scaling import scale_units
from autoprune.space.groups import Groups
from autoprune.space.recipe import uniform_recipe

Masks = dict[str, Tensor]
"""For each masked parameter, by its name, True where a weight stays; of the parameter's shape."""


@dataclass(frozen=True)
class Ticket:
    """A choice of weights.

    Attributes:
        masks: What stays of each parameter.
        plan: Kept units by group, where whole channels are masked; else empty.
    """

    masks: Masks
    plan: Plan


def hold(model: nn.Module, masks: Masks) -> None:
    """Set the masked weights of ``model`` to zero, and their gradients whenever there are any.

    A weight that is zero and gets no gradient stays exactly zero under SGD and AdamW with momentum and weight decay,
    so that nothing has to be done after a step.
    """
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        here = mask.to(parameter.device)
        with torch.no_grad():
            parameter.mul_(here)
        parameter.register_hook(_masked_by(here))  # type: ignore[no-untyped-call]


def share_left(model: nn.Module, masks: Masks) -> float:
    """Return the share of the weights of convolutions and linear layers that masks leave, in ``[0, 1]``."""
    weights = _weights(model)
    gone = sum(int((~masks[name]).sum()) for name in weights if name in masks)
    return 1.0 - gone / sum(weight.numel() for weight in weights.values())


def by_magnitude(model: nn.Module, share: float) -> Ticket:
    """Keep the weights of largest magnitude over all convolutions and linear layers together [Han2015]_.

    Args:
        model: A trained network, in which what was masked before is zero.
        share: Share of these weights that stays, in ``(0, 1)``. The largest weight of every layer stays in any case,
            for without it nothing would pass.

    References:
        [Han2015] Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015.
    """
    weights = _weights(model)
    flat = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[flat.topk(max(1, round(share * len(flat)))).indices] = True
    masks: Masks = {}
    parts = torch.split(kept, [weight.numel() for weight in weights.values()])
    for (name, weight), part in zip(weights.items(), parts, strict=True):
        own = part.clone()
        own[weight.detach().abs().argmax()] = True
        masks[name] = own.reshape(weight.shape)
    return Ticket(masks, {})


def by_channel(model: nn.Module, groups: Groups, ratio: float, part: float) -> Ticket:
    """Keep the channels of largest norm over their coupled layers, as many of every group alike.

    Args:
        model: A trained network, in which what was masked before is zero.
        groups: Its groups.
        ratio: Share of every group that is removed in the end, in ``(0, 1)``.
        part: How far the rounds have come, in ``(0, 1]``; each removes the same share of what is left.
    """
    recipe = uniform_recipe(groups, ratio, 32, "l2", width=1)
    final = recipe.kept_counts(groups)
    counts = {
        g.name: final[g.name] if part >= 1 else max(1, round(g.size * (final[g.name] / g.size) ** part))
        for g in groups.groups
    }
    plan = make_plan(model, groups, recipe, None, counts)
    return Ticket(channel_masks(model, groups, plan), plan)


def channel_masks(model: nn.Module, groups: Groups, plan: Plan) -> Masks:
    """Return masks that drop all weights that make, scale, shift or read the units that a plan drops."""
    ones = deepcopy(model)
    with torch.no_grad():
        for parameter in ones.parameters():
            parameter.fill_(1.0)
    for name, units in plan.items():
        alive = torch.zeros(groups.by_name[name].size)
        alive[list(units)] = 1.0
        scale_units(ones, groups.by_name[name], alive)
    kept = {name: parameter.detach().bool() for name, parameter in ones.named_parameters()}
    return {name: mask for name, mask in kept.items() if not bool(mask.all())}


def random_like(ticket: Ticket, model: nn.Module, groups: Groups | None, seed: int) -> Ticket:
    """Return a random ticket that keeps as much of every layer: the control for which weights were chosen.

    Args:
        ticket: The ticket.
        model: The network.
        groups: Its groups, where the ticket is one of channels.
        seed: Source of chance.
    """
    generator = torch.Generator().manual_seed(seed)
    if groups is not None:
        plan: Plan = {
            name: tuple(
                sorted(torch.randperm(groups.by_name[name].size, generator=generator)[: len(units)].tolist())
            )
            for name, units in ticket.plan.items()
        }
        return Ticket(channel_masks(model, groups, plan), plan)
    shuffled = {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].reshape(mask.shape)
        for name, mask in ticket.masks.items()
    }
    return Ticket(shuffled, {})


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of convolutions and linear layers by name; one that is shared counts once."""
    owners = {id(m.weight) for m in model.modules() if isinstance(m, Conv | nn.Linear)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in owners}


def _masked_by(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * mask
