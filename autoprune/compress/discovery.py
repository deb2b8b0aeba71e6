"""Groups of a model, found and proved in a child process with a time limit."""

from __future__ import annotations

import multiprocessing
import signal
import time
import warnings
from copy import deepcopy
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoprune.bound import end_with
from autoprune.compress.layers import Conv, channel_count, device_of, layer_kind
from autoprune.space.groups import Group, Groups, Member

if TYPE_CHECKING:  # the parent needs none of it
    from autoprune.compress.graph.find import Traced

# Share of the time left after the search for groups that is kept for the last proof.
_LAST_PROOF = 0.15


def find_groups(model: nn.Module, example: Tensor, *, time_limit_s: float = 60.0) -> Groups:
    """Find the channels of ``model`` that can only be removed together, and prove that they can be.

    The work runs in a forked child with one thread: a network of the user's own can do anything, also while it
    is exported, and may not take the search down. Fork, not spawn, because a network that is defined
    in a script or notebook cannot be sent to a fresh interpreter, and because a fresh one would run the
    user's script again; one thread, because a forked child has none of its parent's thread pools. Where
    the platform cannot fork it is spawned. Groups whose proof did not end in time are left alone by name,
    and so is every layer if the search for groups itself failed or ran out of time: never an error.

    Args:
        model: The dense network; it is not changed.
        example: One batch of its inputs, ``(n, channels, height, width)``; two examples are used.
        time_limit_s: Seconds that it may take in all.

    Returns:
        All groups in the order of the model's modules. Every convolution and linear layer is a producer in
        exactly one; a group that is left alone says why.
    """
    # The child changes its own copy of the memory; only a network on a GPU has to be copied here.
    network = model if device_of(model).type == "cpu" else deepcopy(model).cpu()
    inputs = example[:2].detach().cpu()
    context: Any = multiprocessing.get_context(
        "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    )
    deadline = (
        time.monotonic() + time_limit_s
    )  # the same clock in the child: it counts from the machine's start
    receiver, sender = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # fork beside threads: the child starts none of its own
        child = context.Process(target=_discover, args=(sender, network, inputs, deadline), daemon=True)
        child.start()
    sender.close()
    listener = _Listener(_alone(network, inputs, "not examined"))
    ended = listener.listen(receiver, deadline)
    if not ended:
        child.kill()
    child.join()
    receiver.close()
    why = f"it died with exit code {child.exitcode}" if ended else f"it took more than {time_limit_s:g} s"
    return listener.result(why)


def cuttable(model: nn.Module, groups: Groups, example: Tensor) -> nn.Module:
    """Return the network that ``groups`` are of: the network itself, or the same written as a graph.

    Args:
        model: The network that :func:`find_groups` got; it is not changed, and a graph shares its parameters.
        groups: What it returned.
        example: One batch of its inputs.
    """
    if not groups.rewritten:
        return model
    # Imported here: most networks need nothing of it.
    from autoprune.compress.graph.find import trace

    return trace(model, example).network


class _Listener:
    """Collects what the child reports, so that what it found before it stopped counts."""

    def __init__(self, fallback: Groups) -> None:
        self.fallback = fallback
        self.found: Groups | None = None
        self.failure = ""
        self.verdicts: dict[str, str] = {}
        self.blocks: dict[str, str] = {}
        self.done = False

    def listen(self, receiver: Connection, deadline: float) -> bool:
        """Take messages until the child ends (True) or the time is over (False)."""
        while not self.done:
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                return False
            try:
                kind, *content = receiver.recv()
            except EOFError:
                return True
            if kind == "found":
                self.found = content[0]
            elif kind == "verdict":
                self.verdicts[content[0]] = content[1]
            elif kind == "blocks":
                self.blocks = content[0]
            elif kind == "failed":
                self.failure = content[0]
            self.done = kind in ("done", "failed")
        return True

    def result(self, why_unfinished: str) -> Groups:
        """Return the groups with what is known about each."""
        if self.found is None:
            reason = self.failure or f"the search for groups did not end: {why_unfinished}"
            alone = tuple(g.model_copy(update={"reason": reason}) for g in self.fallback.groups)
            return Groups(groups=alone, input_shape=self.fallback.input_shape)
        unproved = f"surgery was not proved: {why_unfinished}"
        judged = []
        for group in self.found.groups:
            if group.prunable:
                reason = self.verdicts.get(group.name, "" if self.done else unproved)
                block = "" if reason else self.blocks.get(group.name, "")
                group = group.model_copy(update={"prunable": not reason, "reason": reason, "block": block})
            judged.append(group)
        return Groups(
            groups=tuple(judged), input_shape=self.found.input_shape, rewritten=self.found.rewritten
        )


def _discover(sender: Connection, model: nn.Module, example: Tensor, deadline: float) -> None:
    """Find and prove groups; runs in the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    end_with(None if parent is None else parent.pid)  # it has the parent's locks too
    torch.set_num_threads(1)
    try:
        # Imported here: the parent needs neither.
        from autoprune.compress.blocks import that_can_go
        from autoprune.compress.graph import find, residual
        from autoprune.compress.verification import verify_groups

        traced = find.trace(model, example)
        groups = _carried_out(model, traced, example)
        sender.send(("found", groups))
        time_left_s = deadline - time.monotonic()
        enough = deadline - _LAST_PROOF * time_left_s
        faulty: set[str] = set()
        judged = verify_groups(model, traced, groups, example, stop=lambda: time.monotonic() > enough)
        for name, reason in judged:
            sender.send(("verdict", name, reason))
            if reason:
                faulty.add(name)
        sound = [
            g if g.name not in faulty else g.model_copy(update={"prunable": False}) for g in groups.groups
        ]
        proved = Groups(groups=tuple(sound), input_shape=groups.input_shape, rewritten=groups.rewritten)
        last = deadline - 0.5 * _LAST_PROOF * time_left_s
        one = example[:1] if traced.free_batch else example
        blocks = residual.removable_blocks(traced.network, proved, one, stop=lambda: time.monotonic() > last)
        sender.send(("blocks", blocks if groups.rewritten else that_can_go(model, blocks, one)))
        sender.send(("done",))
    except Exception as error:  # reported as the reason why every group is left alone
        text = (str(error).strip().splitlines() or [""])[0][:200]
        sender.send(("failed", f"the search for groups failed: {type(error).__name__}: {text}"))


def _carried_out(model: nn.Module, traced: Traced, example: Tensor) -> Groups:
    """Return the groups as the network itself can carry them out, or as the one that is written as a graph can.

    A network whose code asks its tensors for their sizes stays what it is.
    """
    shape = tuple(example.shape[1:])
    held = {name for name, _ in traced.network.named_modules()}
    rewritten = Groups(
        groups=tuple(_without_layers_of_training(group, held) for group in traced.groups),
        input_shape=shape,
        rewritten=True,
    )
    if not any(_needs_graph(model, group) for group in rewritten.prunable):
        return Groups(groups=traced.groups, input_shape=shape)
    if all(_lacks_size_alone(model, group) for group in rewritten.prunable):
        from autoprune.compress.verification import fault_of

        plain = Groups(groups=tuple(_without_sizes(group) for group in traced.groups), input_shape=shape)
        if not fault_of(model, traced, plain, example):
            return plain
    if traced.free_batch:
        return rewritten
    reason = "its code holds sizes, and also the number of examples"
    return Groups(
        groups=tuple(
            g.model_copy(update={"prunable": False, "reason": reason}) if _needs_graph(model, g) else g
            for g in traced.groups
        ),
        input_shape=shape,
    )


def _needs_graph(model: nn.Module, group: Group) -> bool:
    """Whether the network itself cannot be cut at all members of a group, were its sizes changed."""
    return any(m.kind == "size" for m in group.members) or not _lacks_size_alone(model, group)


def _lacks_size_alone(model: nn.Module, group: Group) -> bool:
    """Whether the network has every layer and parameter of a group."""
    modules = dict(model.named_modules())
    tensors = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return all(
        (m.layer in modules and layer_kind(modules[m.layer]) == m.kind) or m.layer in tensors
        for m in group.members
        if m.kind != "size"
    )


def _without_layers_of_training(group: Group, held: set[str]) -> Group:
    """Leave out the members that the graph, which is that of evaluation, does not run."""
    members = tuple(m for m in group.members if m.kind in ("size", "parameter") or m.layer in held)
    if not any(m.axis == "out" for m in members):
        # A group that is left alone is still listed, and has nothing to say of any layer.
        members = tuple(m.model_copy(update={"own": False}) for m in group.members)
        reason = group.reason or "it runs in training alone"
        return group.model_copy(update={"members": members, "prunable": False, "reason": reason})
    return group.model_copy(update={"members": members})


def _without_sizes(group: Group) -> Group:
    return group.model_copy(update={"members": tuple(m for m in group.members if m.kind != "size")})


def _alone(model: nn.Module, example: Tensor, reason: str) -> Groups:
    """Return one group for each convolution and linear layer, all left alone."""
    groups = []
    for name, module in model.named_modules():
        if not isinstance(module, Conv | nn.Linear):
            continue
        count = channel_count(module, "out")
        member = Member(
            layer=name,
            kind=layer_kind(module) or "conv",
            axis="out",
            index_map=tuple((channel,) for channel in range(count)),
        )
        kind = "linear" if isinstance(module, nn.Linear) else "conv"
        groups.append(
            Group.model_validate(
                {
                    "name": name,
                    "type": kind,
                    "size": count,
                    "members": (member,),
                    "prunable": False,
                    "reason": reason,
                }
            )
        )
    return Groups(groups=tuple(groups), input_shape=tuple(example.shape[1:]))
