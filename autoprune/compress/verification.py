"""Proof by example that cutting a group equals ignoring its channels; run inside discovery's child process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import cache

import torch
from torch import Tensor, nn

from autoprune.compress.graph.find import Traced
from autoprune.compress.graph.ignoring import run_ignoring
from autoprune.compress.layers import BatchNorm, Conv, has_batchnorm
from autoprune.compress.outputs import flat_outputs
from autoprune.compress.surgery import Plan, prune
from autoprune.space.groups import Groups

# Largest difference of outputs, relative to the largest output.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
# A network that takes longer for one example, or has more parameters, is proved in float32, and if it has no BatchNorm
# on one example.
_SLOW_S = 1.0
_LARGE_PARAMS = 100_000_000


def fault_of(model: nn.Module, traced: Traced, groups: Groups, example: Tensor) -> str:
    """Return why cutting all groups at once is wrong; empty if it is right. See :func:`verify_groups`."""
    try:
        return _Checker(model, traced, groups, example).fault([group.name for group in groups.prunable])
    except Exception as error:  # whatever the user's network raises on its own example
        return f"the dense network fails on the example: {_first_line(error)}"


def compare(
    model: nn.Module, traced: Traced, groups: Groups, example: Tensor, plans: Sequence[Plan]
) -> list[float | str]:
    """Return how far cut networks are from the dense one that ignores the same units.

    Args:
        model: The dense network on the CPU; it is not changed.
        traced: The same as a graph.
        groups: Its groups.
        example: One batch.
        plans: Kept units of each.

    Returns:
        For each the largest difference of outputs as a share of the largest output, or why it fails.
    """
    checker = _Checker(model, traced, groups, example)
    return [checker.difference(plan) for plan in plans]


def verify_groups(
    model: nn.Module,
    traced: Traced,
    groups: Groups,
    example: Tensor,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, str]]:
    """Cut about half the units of every prunable group and compare with the network that ignores them.

    All groups are cut at once; if the outputs differ, halves of them are tried until the faulty ones are
    known. BatchNorm statistics, affine parameters and biases are randomised first, so that nothing is
    hidden by zeros.

    Args:
        model: The dense network on the CPU; it is not changed.
        traced: The same as a graph.
        groups: Candidates, of the graph if they say so, else of the network itself.
        example: One batch; its shape and type are used, and its values where they are not floating-point.
        stop: Returns True once no more halves can be tried; what is unknown then counts as failed.

    Yields:
        For each prunable group its name and why it failed; an empty reason means that it is proved.
    """
    names = [group.name for group in groups.prunable]
    if not names:
        return
    try:
        checker = _Checker(model, traced, groups, example)
    except Exception as error:  # whatever the user's network raises on its own example
        yield from ((name, f"the dense network fails on the example: {_first_line(error)}") for name in names)
        return
    # Where nothing is faulty all groups together are asked for twice.
    fault = cache(checker.fault)
    proved: list[str] = []
    for name, reason in _bisect(names, lambda chosen: fault(tuple(chosen)), stop):
        if reason:
            yield name, reason
        else:
            proved.append(name)
    yield from _jointly(proved, lambda chosen: fault(tuple(chosen)))


def _bisect(
    names: Sequence[str], fault: Callable[[Sequence[str]], str], stop: Callable[[], bool] = lambda: False
) -> Iterator[tuple[str, str]]:
    if stop():
        yield from ((name, "surgery was not proved in time") for name in names)
        return
    reason = fault(names)
    if not reason or len(names) == 1:
        yield from ((name, reason) for name in names)
        return
    middle = len(names) // 2
    yield from _bisect(names[:middle], fault, stop)
    yield from _bisect(names[middle:], fault, stop)


def _jointly(names: Sequence[str], fault: Callable[[Sequence[str]], str]) -> Iterator[tuple[str, str]]:
    """Drop groups that are sound alone and not with those before them."""
    if not names or not fault(names):
        yield from ((name, "") for name in names)
        return
    sound: list[str] = []
    for name in names:
        reason = fault([*sound, name])
        yield name, f"together with other groups: {reason}" if reason else ""
        if not reason:
            sound.append(name)


class _Checker:
    """The randomised network and the inputs that all comparisons share."""

    def __init__(self, model: nn.Module, traced: Traced, groups: Groups, example: Tensor) -> None:
        self.groups = groups
        self.traced = traced
        self.inside = ""
        generator = torch.Generator().manual_seed(0)
        self.plan: Plan = {}
        for group in groups.prunable:
            kept = torch.randperm(group.size, generator=generator)[: group.size - max(1, group.size // 2)]
            self.plan[group.name] = tuple(sorted(kept.tolist()))
        self.example = example
        if example.is_floating_point():
            shape = (max(2, example.shape[0]), *example.shape[1:])
            self.example = torch.randn(shape, generator=generator)
        # Copied together: they share their parameters, and what nothing here changes with the originals.
        weights = [*_weights(model), *_weights(traced.network)]
        shared = {id(w): nn.Parameter(w.detach(), w.requires_grad) for w in weights if bool(w.any())}
        self.model, self.network = deepcopy((model, traced.network), dict(shared))
        for module in (self.model, self.network):
            module.float().eval()
        slow = self._is_slow()
        if slow and traced.free_batch and not has_batchnorm(self.network):
            self.example = self.example[:1]
        try:
            self._set_precision(torch.float32 if slow else torch.float64)
        except Exception:  # a network may hold a constant in float32: compare it in float32
            self._set_precision(torch.float32)
        _randomise(self.network, self.example, generator)
        self._share_buffers()

    def _set_precision(self, dtype: torch.dtype) -> None:
        self.tolerance = _TOLERANCE[dtype]
        for module in (self.model, self.network):
            module.to(dtype)
        if self.example.is_floating_point():
            self.example = self.example.to(dtype)
        if dtype == torch.float64:
            self._outputs(self.network)

    def _is_slow(self) -> bool:
        """Whether one example takes long; the first run, which also allocates, is what counts."""
        if sum(p.numel() for p in self.network.parameters()) > _LARGE_PARAMS:
            return True
        begun_s = time.perf_counter()
        self._outputs(self.network, self.example if not self.traced.free_batch else self.example[:1])
        return time.perf_counter() - begun_s > _SLOW_S

    @torch.no_grad()
    def _share_buffers(self) -> None:
        """Give the network the statistics of the graph's layers, which may be others."""
        known = dict(self.network.named_buffers())
        for name, buffer in self.model.named_buffers():
            if name in known:
                buffer.copy_(known[name])

    def fault(self, names: Sequence[str]) -> str:
        """Return why cutting these groups is wrong; empty if it is right."""
        difference = self.difference({name: self.plan[name] for name in names})
        if isinstance(difference, str):
            return difference
        if not difference <= self.tolerance:
            return (
                f"cut, the output differs by {difference:.2g} from the network that ignores the same channels"
            )
        return ""

    def difference(self, plan: Plan) -> float | str:
        """Return how far the cut network is from the dense one, or why it fails."""
        try:
            expected = flat_outputs(run_ignoring(self.network, self.traced, plan, (self.example,)))
            whole = self.network if self.groups.rewritten else self.model
            actual = self._outputs(prune(whole, self.groups, plan))
        except Exception as error:  # whatever the network's forward raises on cut layers
            where = f"layer {self.inside!r}" if self.inside else "the network"
            return f"cut, {where} fails: {_first_line(error)}"
        differences = [0.0]
        for want, got in zip(expected, actual, strict=True):
            if want.shape != got.shape:
                return f"cut, the output has shape {tuple(got.shape)} instead of {tuple(want.shape)}"
            scale = float(want.abs().max()) or 1.0
            differences.append(float((want - got).abs().max()) / scale)
        # Not max, which forgets NaN.
        return sorted(differences, key=lambda each: each if each == each else float("inf"))[-1]

    @torch.no_grad()
    def _outputs(self, model: nn.Module, example: Tensor | None = None) -> list[Tensor]:
        """Run the model, remembering the innermost layer that is being computed."""
        inside: list[str] = []
        handles = []
        for name, module in model.named_modules():

            def enter(_module: nn.Module, _args: object, name: str = name) -> None:
                inside.append(name)

            def leave(_module: nn.Module, _args: object, _output: object) -> None:
                inside.pop()

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        self.inside = ""
        try:
            return flat_outputs(model(self.example if example is None else example))
        finally:
            self.inside = inside[-1] if inside else ""
            for handle in handles:
                handle.remove()


@torch.no_grad()
def _randomise(model: nn.Module, example: Tensor, generator: torch.Generator) -> None:
    """Give BatchNorms statistics that fit the network, and disturb everything that could be zero or one."""

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    weights = {id(weight) for weight in _weights(model)}
    for parameter in model.parameters():
        # Weights are uneven as they are, unless someone set them to zero to begin with an identity.
        if parameter.is_floating_point() and (id(parameter) not in weights or not bool(parameter.any())):
            parameter.add_(noise(parameter) * 0.1)
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    if norms:
        model(example)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
        mean, variance = norm.running_mean, norm.running_var
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            mean.add_(noise(mean) * 0.1 * variance.clamp_min(1e-6).sqrt())
            variance.mul_((0.5 * noise(variance)).exp()).clamp_min_(1e-6)


def _weights(model: nn.Module) -> list[nn.Parameter]:
    found = (m._parameters.get("weight") for m in model.modules() if isinstance(m, Conv | nn.Linear))
    return [weight for weight in found if weight is not None]


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}"
