"""Criteria: the importance of a group's units, made of the importance of its coupled layers."""

from __future__ import annotations

from torch import Tensor, nn

from autoprune.compress import importance
from autoprune.compress.layers import BatchNorm, submodule, weight_rows
from autoprune.compress.statistics import LayerStatistics
from autoprune.errors import CompressionError
from autoprune.naming import unknown_name
from autoprune.space.groups import Group, Member
from autoprune.space.recipe import CRITERIA


def score_group(
    model: nn.Module, group: Group, criterion: str, statistics: LayerStatistics | None = None
) -> Tensor:
    """Score the units of one group.

    Every layer of the group that the criterion speaks of gives one score for each unit; they are divided by
    their mean and added. ``l1``, ``l2``, ``taylor`` and ``fisher`` speak of the filters that make the channels
    and of the weights that read them, ``fpgm`` of the filters alone, ``bn_scale`` of the BatchNorm layers
    between, ``activation`` of the readers. A group without a BatchNorm that has scales is scored by ``l2``
    under ``bn_scale``, and one that no layer reads under ``activation``. ``lamp`` makes shares of the ``l2`` scores.

    Args:
        model: The dense network.
        group: One of its groups.
        criterion: One of :data:`autoprune.space.recipe.CRITERIA`.
        statistics: What ``activation``, ``taylor`` and ``fisher`` need.

    Returns:
        ``(group.size,)``, float64 on the CPU; larger means keep.

    Raises:
        UsageError: If the criterion is unknown.
        CompressionError: If statistics are missing or a score is not finite.
    """
    if criterion not in CRITERIA:
        raise unknown_name("criterion", criterion, CRITERIA)
    if criterion == "random":
        return importance.random_scores(group.name, group.size)
    if criterion == "bn_scale":
        scores = _bn_scale(model, group) or _magnitude(model, group, "l2")
    elif criterion == "activation":
        scores = _activation(model, group, _needed(statistics, criterion)) or _magnitude(model, group, "l2")
    elif criterion == "taylor":
        scores = _taylor(group, _needed(statistics, criterion))
    elif criterion == "fisher":
        scores = _fisher(group, _needed(statistics, criterion))
    elif criterion == "fpgm":
        scores = _fpgm(model, group)
    elif criterion == "lamp":
        return importance.lamp_scores(score_group(model, group, "l2"))
    else:
        scores = _magnitude(model, group, criterion)
    try:
        return importance.normalised_sum([score.cpu() for score in scores])
    except CompressionError as error:
        raise CompressionError(
            f"group {group.name!r}, criterion {criterion!r}: {error.message}", error.hint
        ) from error


def _weighted(group: Group) -> list[Member]:
    return [m for m in group.members if m.kind in ("conv", "depthwise", "linear")]


def _magnitude(model: nn.Module, group: Group, criterion: str) -> list[Tensor]:
    scores = []
    for member in _weighted(group):
        rows = weight_rows(submodule(model, member.layer), member.axis)
        if criterion == "l1":
            scores.append(importance.pool_units(importance.l1_scores(rows), member.index_map))
        else:
            scores.append(importance.pool_units(importance.l2_scores(rows), member.index_map, power=2.0))
    return scores


def _bn_scale(model: nn.Module, group: Group) -> list[Tensor]:
    scores = []
    for member in group.members:
        module = submodule(model, member.layer) if member.kind == "norm" else None
        if isinstance(module, BatchNorm) and module.weight is not None:
            scale = importance.bn_scale_scores(module.weight.detach())
            scores.append(importance.pool_units(scale, member.index_map))
    return scores


def _activation(model: nn.Module, group: Group, statistics: LayerStatistics) -> list[Tensor]:
    scores = []
    for member in _weighted(group):
        if member.axis == "in":
            rows = weight_rows(submodule(model, member.layer), "in").cpu()
            energy = importance.activation_scores(rows, statistics.moment_of(member.layer))
            scores.append(importance.pool_units(energy, member.index_map))
    return scores


def _taylor(group: Group, statistics: LayerStatistics) -> list[Tensor]:
    scores = []
    for member in _weighted(group):
        products = statistics.products_of(member.layer, member.axis)
        scores.append(importance.taylor_scores(importance.pool_units(products, member.index_map)))
    return scores


def _fisher(group: Group, statistics: LayerStatistics) -> list[Tensor]:
    scores = []
    for member in _weighted(group):
        squares = statistics.squares_of(member.layer, member.axis)
        scores.append(importance.fisher_scores(importance.pool_units(squares, member.index_map)))
    return scores


def _fpgm(model: nn.Module, group: Group) -> list[Tensor]:
    scores = []
    for member in _weighted(group):
        if member.axis == "out":
            rows = weight_rows(submodule(model, member.layer), "out")
            scores.append(importance.pool_units(importance.fpgm_scores(rows), member.index_map))
    return scores


def _needed(statistics: LayerStatistics | None, criterion: str) -> LayerStatistics:
    if statistics is None:
        raise CompressionError(
            f"criterion {criterion!r} needs statistics of calibration data",
            "collect them with collect_statistics",
        )
    return statistics
