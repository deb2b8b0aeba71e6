r"""Low rank: a layer replaced by two that together have fewer weights and multiply-accumulates.

A linear layer ``(out, in)`` becomes ``in -> r -> out``; a convolution becomes one of the same kernel, stride and
padding to ``r`` channels and a 1 x 1 convolution from them. This is the channel decomposition of [Zhang2016]_ in its
linear form, not the separable kernels of [Jaderberg2014]_: the patch that is read stays one.

Where second moments of the inputs are known, the factors minimise the error of the outputs,
:math:`E\lVert (W - W') x \rVert^2`, as [Zhang2016]_ and for language models [Wang2024]_ do; else that of the weights.
Ours differs from [Zhang2016]_ in that nonlinearities are not modelled, and that the errors of earlier layers are not
made up for: moments are those of the network before the cut, at the inputs that stayed.

References:
    [Jaderberg2014] Speeding up Convolutional Neural Networks with Low Rank Expansions, BMVC 2014.
    [Zhang2016] Accelerating Very Deep Convolutional Networks for Classification and Detection, TPAMI 2016, section 3.1.
    [Wang2024] SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression, 2024.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autoprune.compress.layers import split_name, submodule
from autoprune.compress.statistics import LayerStatistics
from autoprune.errors import CompressionError
from autoprune.space.groups import Groups, kept_count
from autoprune.space.recipe import Recipe

# Added to the diagonal of the moments as a share of its mean, so that directions the data lacks are not lost at will.
_RIDGE = 1e-3


class LowRank(nn.Sequential):
    """Two layers in the place of one: to fewer channels and, from them, to the outputs."""


@dataclass(frozen=True)
class Factorised:
    """What became of the layers that were to be factorised.

    Attributes:
        ranks: Rank of each layer that was replaced by two, by the layer's name.
        left_whole: Why a layer was left as it is, by the layer's name.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    left_whole: Mapping[str, str] = field(default_factory=dict)


def low_rank_factors(weight: Tensor, rank: int, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Return the factors of the matrix of ``rank`` that is nearest to ``weight``.

    With :math:`W G^{1/2} = U S V^T` the matrix that minimises :math:`\mathrm{tr}\,(W - W') G (W - W')^T` is
    :math:`U_r U_r^T W` (Eckart and Young 1936); :math:`U_r` are the leading eigenvectors of :math:`W G W^T`, so no root
    of :math:`G` is taken. Rows of the first factor and columns of the second have equal norms, which keeps gradients
    and the steps of int8 alike.

    Args:
        weight: ``W``, ``(out, features)``.
        rank: At least 1, at most the smaller side of ``weight``.
        moments: ``G``, second moments of the inputs, ``(features, features)``; the identity if not given. A ridge of
            1e-3 of its mean diagonal is added.

    Returns:
        The first factor ``(rank, features)`` and the second ``(out, rank)``, float64; second @ first is ``W'``.

    Raises:
        CompressionError: If the rank or the shape of the moments does not fit.
    """
    out, features = weight.shape
    if not 1 <= rank <= min(out, features):
        raise CompressionError(
            f"rank {rank} does not fit a weight {out} x {features}; allowed: 1 to the smaller side"
        )
    if moments is not None and moments.shape != (features, features):
        raise CompressionError(
            f"moments {tuple(moments.shape)} do not fit a weight that reads {features} features",
            "the statistics belong to another network",
        )
    matrix = weight.detach().cpu().double()
    seen = matrix
    if moments is not None:
        ridge = _RIDGE * float(moments.diagonal().double().mean())
        # Long moments are kept in float32 to bound memory.
        seen = (matrix.to(moments.dtype) @ moments).double() + ridge * matrix
    leading = torch.linalg.eigh(seen @ matrix.T).eigenvectors[:, -rank:].flip(1)
    first = leading.T @ matrix
    scale = first.norm(dim=1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return first / scale[:, None], leading * scale


def wins(out: int, features: int, rank: int) -> bool:
    """Whether two layers of ``rank`` are smaller and cheaper than the one.

    Both layers run at the places of the outputs, so multiply-accumulates are weights times places on either side, and
    one comparison answers both questions.

    Args:
        out: Output channels.
        features: Inputs of one output: input channels times taps of the kernel.
        rank: Channels between the two layers.
    """
    return rank * (out + features) < out * features


@torch.no_grad()
def factorise(
    model: nn.Module,
    groups: Groups,
    recipe: Recipe,
    example: Tensor,
    *,
    kept_inputs: Mapping[str, Sequence[int]],
    statistics: LayerStatistics | None,
    refreshed: bool,
) -> Factorised:
    """Replace the layers of ``model`` whose groups have a ``rank_ratio`` by two each, in place.

    Args:
        model: A network after surgery, in evaluation mode.
        groups: Groups of the network before it; layers of blocks that were taken out are passed over.
        recipe: Says the share of the rank to remove; ranks are multiples of its width as kept counts are.
        example: A few inputs, which show what layers are run.
        kept_inputs: Input channels, counted before surgery, that each layer still reads; layers not named read all.
        statistics: Of the network before surgery; plain singular values are used where a layer has no moments there.
        refreshed: Whether BatchNorm statistics are estimated anew afterwards, so that they take up a shift of the mean.

    Returns:
        The ranks of the layers that were replaced, and why the others were not.

    Raises:
        CompressionError: If the network does not run with the new layers.
    """
    asked = {
        layer: recipe.choice(group.name).rank_ratio
        for group in groups.groups
        if recipe.choice(group.name).rank_ratio > 0
        for layer in group.producers
    }
    modules = dict(model.named_modules())
    unfit = _unfit_layers(model, [layer for layer in asked if layer in modules], example)
    ranks: dict[str, int] = {}
    left = dict(unfit)
    for layer, ratio in asked.items():
        if layer not in modules or layer in unfit:
            continue
        weight = modules[layer].get_parameter("weight").flatten(1)
        out, features = weight.shape
        rank = kept_count(min(out, features), ratio, recipe.width)
        if not wins(out, features, rank):
            left[layer] = f"rank {rank} of {min(out, features)} saves nothing in a weight {out} x {features}"
            continue
        _replace(model, layer, rank, _Moments.of(layer, modules[layer], kept_inputs, statistics, refreshed))
        ranks[layer] = rank
    if ranks:
        _check_runs(model, example, ranks)
    return Factorised(ranks, left)


def shape_factors(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Put two layers of the given ranks in the place of layers, in place; their weights are to be loaded.

    Args:
        model: The network before it was factorised.
        ranks: Rank of each layer to replace.
    """
    for layer, rank in ranks.items():
        _put(model, layer, _two_layers(submodule(model, layer), rank))


def with_factors(model: nn.Module, layers: Collection[str]) -> list[str]:
    """Return ``layers`` with the two layers of each that was factorised in its place.

    Args:
        model: The network.
        layers: Names of its layers; those that it lacks are kept.
    """
    modules = dict(model.named_modules())
    found: list[str] = []
    for layer in layers:
        found += [f"{layer}.0", f"{layer}.1"] if isinstance(modules.get(layer), LowRank) else [layer]
    return found


@dataclass(frozen=True)
class _Moments:
    """Moments of a layer's inputs: ``matrix`` ``(features, features)``, or None; ``mean`` if they are central."""

    matrix: Tensor | None
    mean: Tensor | None

    @classmethod
    def of(
        cls,
        name: str,
        layer: nn.Module,
        kept_inputs: Mapping[str, Sequence[int]],
        statistics: LayerStatistics | None,
        refreshed: bool,
    ) -> _Moments:
        """Return the moments at the inputs that stayed; central where a bias or a BatchNorm takes up the mean."""
        gram = None if statistics is None else statistics.gram.get(name)
        if gram is None or statistics is None:
            return cls(None, None)
        weight = layer.get_parameter("weight")
        taps = weight[0, 0].numel()
        if name in kept_inputs:
            kept = (torch.tensor(kept_inputs[name])[:, None] * taps + torch.arange(taps)).flatten()
            kept = torch.cat([kept, torch.tensor([len(gram) - 1])])
            gram = gram[kept][:, kept]
        mean, matrix = gram[:-1, -1], gram[:-1, :-1]
        has_bias = getattr(layer, "bias", None) is not None
        if has_bias or (refreshed and name in statistics.before_batchnorm):
            return cls(matrix - torch.outer(mean, mean), mean if has_bias else None)
        return cls(matrix, None)


def _replace(model: nn.Module, name: str, rank: int, moments: _Moments) -> None:
    layer = submodule(model, name)
    weight = layer.get_parameter("weight")
    first, second = low_rank_factors(weight.flatten(1), rank, moments.matrix)
    made = _two_layers(layer, rank)
    for own, factor in (("0.weight", first), ("1.weight", second)):
        made.get_parameter(own).copy_(factor.reshape(made.get_parameter(own).shape))
    if isinstance(bias := getattr(layer, "bias", None), nn.Parameter):
        made.get_parameter("1.bias").copy_(bias)
        if moments.mean is not None:
            lost = weight.detach().cpu().double().flatten(1) - second @ first
            made.get_parameter("1.bias").add_((lost @ moments.mean.double()).to(bias))
    _put(model, name, made)


def _two_layers(layer: nn.Module, rank: int) -> LowRank:
    """Return two layers of the right shapes, of the type and mode of ``layer``, with any weights."""
    if isinstance(layer, nn.Conv2d):
        spatial = {
            name: getattr(layer, name)
            for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        }
        first: nn.Module = nn.Conv2d(layer.in_channels, rank, bias=False, **spatial)
        second: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None)
    elif isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, rank, bias=False)
        second = nn.Linear(rank, layer.out_features, bias=layer.bias is not None)
    else:
        raise CompressionError(f"{type(layer).__name__} cannot be factorised; allowed: Conv2d, Linear")
    made = LowRank(first, second).to(layer.weight).train(layer.training)
    for parameter in made.parameters():
        parameter.requires_grad_(layer.weight.requires_grad)
    return made


def _put(model: nn.Module, name: str, made: nn.Module) -> None:
    owner, own = split_name(name)
    setattr(submodule(model, owner), own, made)


def _unfit_layers(model: nn.Module, layers: Sequence[str], example: Tensor) -> dict[str, str]:
    """Say why layers cannot be two, whatever their rank."""
    called: Counter[str] = Counter()
    handles = [
        submodule(model, name).register_forward_pre_hook(lambda *_, name=name: called.update([name]))
        for name in layers
    ]
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    found = {}
    for name in layers:
        module = submodule(model, name)
        # A subclass may compute something else, or its owner may read the weight, as in nn.MultiheadAttention.
        if type(module) not in (nn.Conv2d, nn.Linear):
            found[name] = (
                f"it is a {type(module).__name__}; only plain Conv2d and Linear layers are factorised"
            )
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            kind = "depthwise" if module.groups == module.in_channels else "grouped"
            found[name] = f"it is a {kind} convolution"
        elif not called[name]:
            found[name] = "the network does not run it as a layer: it reads the weight itself, or never"
        elif places[id(module)] > 1 or owners[id(module.weight)] > 1:
            found[name] = "it shares its weight with another layer"
        elif module._forward_hooks or module._forward_pre_hooks:
            found[name] = "hooks change what it computes"
    return found


def _check_runs(model: nn.Module, example: Tensor, ranks: Mapping[str, int]) -> None:
    try:
        model(example)
    except Exception as error:  # a forward may read any attribute of a layer
        raise CompressionError(
            f"the network does not run with low-rank layers: {type(error).__name__}: {error}",
            f"give these groups rank_ratio 0; replaced were {', '.join(ranks)}",
        ) from error
