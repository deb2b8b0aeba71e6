"""Distillation on features: where the dense network looks, at the end of each stage of its own.

A network that was cut has other channels than the dense one, so features are compared by a map that has none: the
energy at each place, as in activation-based attention transfer [Zagoruyko2017]_, a hint in the sense of [Romero2015]_
that needs no layer to adapt widths. Ours takes the squared distance and the mean over layers and examples.

References:
    [Romero2015] FitNets: Hints for Thin Deep Nets, ICLR 2015.
    [Zagoruyko2017] Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via
        Attention Transfer, ICLR 2017, section 3.1.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from autoprune.compress.layers import split_name
from autoprune.errors import UsageError

# Most layers to compare; where a network has fewer stages than the second figure, its blocks are added.
_MOST_LAYERS = 4
_FEW_STAGES = 3


@dataclass(frozen=True)
class FeatureLayer:
    """A module whose outputs are compared.

    Attributes:
        name: Name of the module.
        channel_dim: Dimension of its outputs that channels lie along; all others but the first are places.
    """

    name: str
    channel_dim: int


@dataclass(frozen=True)
class _Output:
    """One module's outputs, seen in a run: in the order in which the modules ended."""

    name: str
    kind: type[nn.Module]
    is_block: bool
    channel_dim: int
    places: int


def feature_layers(model: nn.Module, inputs: Tensor) -> tuple[FeatureLayer, ...]:
    """Choose the modules whose outputs are compared: the last of each stretch of equal places, up to four.

    A stretch is a run of modules with parameters whose outputs have the same number of places; of its modules the last
    of those that lie least deep counts, so that it is the end of a stage and not a layer of the next one's first
    block. Of more than four the last are taken. A network with fewer than three stretches, such as a transformer, gets
    blocks evenly spaced over the longest sequence of alike blocks as well.

    Args:
        model: The dense network; it is not changed.
        inputs: A batch of at least two examples, on the device of the network.

    Returns:
        The layers in the order in which they run.

    Raises:
        UsageError: If the outputs of no module have places.
    """
    seen = _outputs(model, inputs)
    stretches = [list(outputs) for _, outputs in groupby(seen, key=lambda output: output.places)]
    chosen = [_end(stretch) for stretch in stretches][-_MOST_LAYERS:]
    if not chosen:
        raise UsageError(
            "feature_distill needs layers whose outputs have places, such as (n, channels, height, width) or "
            "(n, tokens, channels), and the network has none",
            "set recovery.feature_distill to 0",
        )
    if len(chosen) < _FEW_STAGES:
        chosen += _spaced_blocks(stretches, _MOST_LAYERS - len(chosen))
    names = {output.name for output in chosen}
    return tuple(FeatureLayer(o.name, o.channel_dim) for o in seen if o.name in names)


def check_own_step(is_given: bool) -> None:
    """Refuse to compare features where the user's own training step makes the whole loss.

    Raises:
        UsageError: If a step is given.
    """
    if is_given:
        raise UsageError(
            "feature_distill above 0 cannot be used with a training_step of your own, whose loss replaces all others; "
            "allowed: 0",
            "set recovery.feature_distill to 0, or leave training_step out",
        )


def attention_map(features: Tensor, channel_dim: int) -> Tensor:
    """Return how much energy lies at each place, at unit norm [Zagoruyko2017]_.

    Args:
        features: ``(n, ...)``, with channels along ``channel_dim``.
        channel_dim: From 1 on.

    Returns:
        Sums of squares over the channels, ``(n, places)``, float32; each row has norm 1, or 0 where nothing was active.
    """
    # A copy, for a layer that follows may change its inputs in place.
    energy = features.to(torch.float32, copy=True).square().sum(channel_dim).flatten(1)
    return nn.functional.normalize(energy, dim=1)


def attention_loss(maps: Mapping[str, Tensor], taught: Mapping[str, Tensor]) -> Tensor:
    """Return the squared distance between maps, the mean over examples and layers: a scalar in ``[0, 2]``.

    Args:
        maps: Of the network by layer, ``(n, places)``.
        taught: Of the dense network; layers that ``maps`` lacks are left out.
    """
    distances = [(own - taught[name]).square().sum(1).mean() for name, own in maps.items()]
    return torch.stack(distances).mean()


@contextmanager
def maps_of(model: nn.Module, layers: Sequence[FeatureLayer]) -> Iterator[dict[str, Tensor]]:
    """Note the maps of ``layers`` in the runs of ``model`` inside the block; of several calls of one the last.

    Args:
        model: The network.
        layers: Those that the network lacks are left out.
    """
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def noting(layer: FeatureLayer) -> Callable[[nn.Module, object, Tensor], None]:
        def note(_module: nn.Module, _arguments: object, outputs: Tensor) -> None:
            found[layer.name] = attention_map(outputs, layer.channel_dim)

        return note

    handles = [
        modules[layer.name].register_forward_hook(noting(layer)) for layer in layers if layer.name in modules
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor) -> list[_Output]:
    """Return the outputs of modules with parameters that have places, in one run in evaluation mode."""
    found: dict[str, _Output] = {}

    def noting(name: str) -> Callable[[nn.Module, object, object], None]:
        def note(module: nn.Module, _arguments: object, outputs: object) -> None:
            if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
                return
            if outputs.dim() not in (3, 4) or len(outputs) != len(inputs):
                return
            channels = _channel_dim(outputs)
            places = outputs[0].numel() // outputs.shape[channels]
            if places > 1:
                found.pop(name, None)
                is_block = next(module.children(), None) is not None
                found[name] = _Output(name, type(module), is_block, channels, places)

        return note

    handles = [
        module.register_forward_hook(noting(name))
        for name, module in model.named_modules()
        if name and next(module.parameters(), None) is not None
    ]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return list(found.values())


def _channel_dim(outputs: Tensor) -> int:
    """Return the dimension of channels: the last one of tokens, and of images whose sides before it alone are equal."""
    if outputs.dim() == 3:
        return 2
    _, first, second, third = outputs.shape
    return 3 if first == second != third else 1


def _end(stretch: Sequence[_Output]) -> _Output:
    depth = min(output.name.count(".") for output in stretch)
    return [output for output in stretch if output.name.count(".") == depth][-1]


def _spaced_blocks(stretches: Sequence[Sequence[_Output]], count: int) -> list[_Output]:
    """Return ``count`` blocks spaced evenly in the longest sequence of blocks of one kind; fewer if it is short.

    Of a network that is written as a graph, which runs layers alone, the last layer of each block stands for it.
    """
    alike: dict[tuple[str, type[nn.Module], int], list[_Output]] = defaultdict(list)
    runs_blocks = any(output.is_block for stretch in stretches for output in stretch)
    for number, stretch in enumerate(stretches):
        for output in stretch:
            if output.is_block:
                alike[split_name(output.name)[0], output.kind, number].append(output)
            elif not runs_blocks:
                alike[re.sub(r"\d+", "#", output.name), output.kind, number].append(output)
    # The last of several that are as long: it ends the block.
    longest = max(reversed(alike.values()), key=len, default=[])
    places = {len(longest) * part // (count + 1) - 1 for part in range(1, count + 1)}
    return [longest[place] for place in sorted(places) if place >= 0]
