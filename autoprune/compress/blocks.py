"""Residual blocks that can be taken out whole; run inside discovery's child process.

A block is what computes ``x + f(x)``. Without the branch it is the identity, and the network runs on without its
layers: the only cut that saves their time whatever widths the kernels like.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.compress.graph.network import GraphNetwork, bypass
from autoprune.compress.layers import Conv, split_name, submodule
from autoprune.compress.outputs import flat_outputs
from autoprune.space.groups import Group, Groups

# With a constant branch and inputs this large, a residual block returns its inputs up to this share.
_LARGE = 1e4
_NEAR = 0.05


@dataclass
class _Call:
    count: int
    inputs: Tensor | None
    same_shape: bool


def removable_blocks(
    model: nn.Module, groups: Groups, example: Tensor, *, stop: Callable[[], bool] = lambda: False
) -> dict[str, str]:
    """Find for each group the block that goes when all of its units are removed.

    The block is the smallest module that holds every layer of the group, is run once on one tensor, and returns a
    tensor of the same shape that is its input once the group's channels are constant: a residual connection, not a
    gate and not a chain. The network has to run with the identity in its place.

    Args:
        model: The dense network on the CPU in evaluation mode; it is not changed.
        groups: Its groups.
        example: One batch of inputs.
        stop: Whether time is over; groups that were not looked at by then have no block.

    Returns:
        Name of the block by the name of the group; of several groups in one block only the first has it.
    """
    calls = _calls(model, example)
    with torch.no_grad():
        before = [t.shape for t in flat_outputs(deepcopy(model).eval()(example))]
    found: dict[str, str] = {}
    for group in groups.prunable:
        if stop():
            break
        block = _block_of(model, group, calls)
        nested = any(f"{block}.".startswith(f"{b}.") or b.startswith(f"{block}.") for b in found.values())
        if block and not nested and _runs_without(model, block, example, before):
            found[group.name] = block
    return found


def take_out(model: nn.Module, block: str) -> None:
    """Put the identity in the place of a block, in place."""
    if isinstance(model, GraphNetwork):
        bypass(model, block)
        return
    owner, own = split_name(block)
    setattr(submodule(model, owner), own, nn.Identity())


def _block_of(model: nn.Module, group: Group, calls: dict[str, _Call]) -> str:
    paths = [member.layer.split(".") for member in group.members]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    for depth in range(min(shared, min(len(path) for path in paths) - 1), 0, -1):
        name = ".".join(paths[0][:depth])
        call = calls.get(name)
        if call is None or call.count != 1 or not call.same_shape or call.inputs is None:
            continue
        if _is_residual(model, name, group, call.inputs):
            return name
    return ""


@torch.no_grad()
def _is_residual(model: nn.Module, name: str, group: Group, inputs: Tensor) -> bool:
    block = deepcopy(submodule(model, name)).eval()
    for member in group.members:
        inner = member.layer.removeprefix(f"{name}.")
        if member.axis == "in" and isinstance(layer := submodule(block, inner), Conv | nn.Linear):
            layer.weight.zero_()
    # Positive, so that an activation after the addition lets it pass.
    large = (1.0 + torch.rand(inputs.shape, generator=torch.Generator().manual_seed(0))) * _LARGE
    try:
        outputs = block(large.to(inputs).clone())  # a block that writes into its input is no identity
    except Exception:  # whatever a module raises on inputs that it was not made for
        return False
    return float((outputs - large).abs().max()) <= _NEAR * _LARGE


@torch.no_grad()
def _runs_without(model: nn.Module, block: str, example: Tensor, before: list[torch.Size]) -> bool:
    copy = deepcopy(model).eval()
    take_out(copy, block)
    try:
        after = flat_outputs(copy(example))
    except Exception:  # the network asks something of the block that the identity lacks
        return False
    return before == [t.shape for t in after] and all(bool(torch.isfinite(t).all()) for t in after)


@torch.no_grad()
def _calls(model: nn.Module, example: Tensor) -> dict[str, _Call]:
    """Run the network once and note what each module was called with."""
    seen: dict[str, _Call] = {}
    handles = []
    for name, module in model.named_modules():

        def note(
            _: nn.Module,
            args: tuple[object, ...],
            kwargs: dict[str, object],
            output: object,
            name: str = name,
        ) -> None:
            inputs = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None
            same = False
            if isinstance(output, Tensor) and inputs is not None:
                same = output.shape == inputs.shape and output.dtype == inputs.dtype
            count = seen[name].count + 1 if name in seen else 1
            seen[name] = _Call(count, inputs, same)

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        model(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return seen
