"""Which networks the final recovery trains. Torch-free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autoprune.measure.record import Measurement
from autoprune.search.baselines import architecture_key
from autoprune.search.promotion import cover
from autoprune.search.severity import severity, worst_severity
from autoprune.search.volume import pick_greedily
from autoprune.space.groups import Groups
from autoprune.space.recipe import Recipe
from autoprune.study.pareto import hypervolume, non_dominated
from autoprune.study.records import TrialRecord, superseded

# A point at the worst value of an axis still adds volume, so that both ends of the front can be chosen.
_REFERENCE = 1.1


def choose_networks(
    records: Sequence[TrialRecord],
    groups: Groups,
    objectives: Sequence[str],
    most: int,
    available: Container[int] | None = None,
    left: Mapping[int, float] | None = None,
    min_accuracy: float | None = None,
    *,
    covering: bool = True,
) -> list[list[TrialRecord]]:
    """Choose up to ``most`` pruned networks that cover the whole front.

    Trials that differ only in bit-widths share one network, which is trained once for all of them. Networks
    that cover every axis of costs come first (:func:`~autoprune.search.promotion.cover`), so that the training covers
    the axes instead of one corner; what then adds most hypervolume fills up.

    Args:
        records: Trials of the study.
        groups: Groups of the model.
        objectives: Names of the objectives.
        most: Largest number of networks.
        available: Trials whose artifacts are kept; all of them if not given.
        left: For each rung the share of its loss that more training is expected to leave, which brings results of
            several rungs to one fidelity; 1 where not given. With it, networks that are expected to end beyond the
            volume's end get no training while there are others, and the axes are cut by what is expected to be lost.
        min_accuracy: The user's cap on the capability that is lost, where the volume ends then.
        covering: Whether the axes are covered first; else only what adds volume to the networks that need no training
            is chosen. For both, ``left`` has to be given.

    Returns:
        For each network its trials that are worth an artifact, the leading one first; networks ordered from the
        mildest to the smallest.
    """
    later = superseded(records)
    pool = [r for r in records if r.is_measured_search and r.recipe is not None and r.number not in later]
    if not pool or most < 1:
        return []
    dense = next((r.measurement.search.value for r in pool if r.origin == "dense" and r.measurement), None)
    values = np.array(
        [
            _costs(r.measurement, objectives, dense, (left or {}).get(r.rung, 1.0) if r.is_trained else 1.0)
            for r in pool
            if r.measurement is not None
        ]
    )
    ranks = _ranks(values)
    by_network: dict[str, list[int]] = defaultdict(list)
    for index in np.lexsort((np.arange(len(pool)), ranks)):
        recipe = pool[index].recipe
        if recipe is not None and recipe.prunes and (available is None or pool[index].number in available):
            by_network[architecture_key(recipe, groups)].append(int(index))
    leaders = [indices[0] for indices in by_network.values()]
    worst = worst_severity(dense or 0.0, min_accuracy if dense is not None else None)
    if left is not None and dense is not None:
        leaders = [i for i in leaders if values[i, 0] < worst] or leaders
    scaled = values / np.array([worst, *np.ones(values.shape[1] - 1)])
    networks = []
    if left is None or dense is None:
        chosen = _chosen(values, ranks, leaders, most)
    else:
        free = [i for i, r in enumerate(pool) if r.recipe is not None and not r.recipe.prunes]
        recipes = [r for i in leaders if (r := pool[i].recipe) is not None]
        first = _covering(scaled, leaders, most, _nested(recipes, groups)) if covering else []
        chosen = _filled(scaled, free, leaders, first, most)
    for leader in sorted(chosen, key=lambda i: -float(np.log(values[i, 1:]).sum())):
        recipe = pool[leader].recipe
        members = by_network[architecture_key(recipe, groups)] if recipe is not None else []
        networks.append([pool[i] for i in members if i == leader or ranks[i] == 0])
    return networks


def _chosen(
    values: NDArray[np.float64], ranks: NDArray[np.int64], leaders: list[int], most: int
) -> list[int]:
    """Choose leaders that cover every axis of costs; if that leaves room, those of the next layers by volume."""
    if not leaders:
        return []
    chosen = _covering(values, leaders, most, None)
    for rank in sorted({int(ranks[i]) for i in leaders}):
        layer = [i for i in leaders if ranks[i] == rank and i not in chosen]
        scaled, reference = _unit(values[leaders])
        place = {leader: row for row, leader in enumerate(leaders)}
        while layer and len(chosen) < most:
            known = [place[i] for i in chosen]
            best = max(layer, key=lambda i: hypervolume(scaled[[*known, place[i]]], reference))
            chosen.append(best)
            layer.remove(best)
    return chosen


def _covering(
    values: NDArray[np.float64], leaders: list[int], most: int, nested: NDArray[np.bool_] | None
) -> list[int]:
    """Choose up to ``most`` leaders that cover every axis of costs in parts as fine as that allows."""
    chosen: list[int] = []
    for parts in range(1, most + 1) if leaders else ():
        covering = cover(values[leaders], parts, by_loss=nested is not None, nested=nested)
        if len(covering) <= most:
            chosen = [leaders[row] for row in covering]
    return chosen


def _nested(recipes: Sequence[Recipe], groups: Groups) -> NDArray[np.bool_]:
    """Return where the recipe of a row cuts that of a column further, ``(n, n)``."""
    counts = [recipe.kept_counts(groups) for recipe in recipes]
    kept = np.array([[own[g.name] for g in groups.groups] for own in counts]).reshape(
        len(recipes), len(groups.groups)
    )
    rows = [(own <= kept).all(axis=1) & (own < kept).any(axis=1) for own in kept]
    return np.array(rows, dtype=np.bool_).reshape(len(recipes), len(recipes))


def _filled(
    values: NDArray[np.float64], free: list[int], leaders: list[int], chosen: list[int], most: int
) -> list[int]:
    """Add the leaders that gain most volume beside the chosen ones and the points that need no training."""
    padded = np.zeros((len(values), 3))
    padded[:, : values.shape[1]] = values
    rest = [i for i in leaders if i not in chosen]
    added = pick_greedily(padded[[*free, *chosen]], padded[rest], max(0, most - len(chosen)))
    return [*chosen, *(rest[row] for row in added)]


def _costs(
    measurement: Measurement, objectives: Sequence[str], dense: float | None, left: float
) -> list[float]:
    # Without a dense network only differences count.
    value = measurement.search.value
    lost = 1.0 - value if dense is None else severity(dense - value, dense)
    by_name = {"accuracy": lost * left, "latency": measurement.latency.ratio, "size": measurement.size_ratio}
    return [by_name[name] for name in ("accuracy", *(o for o in objectives if o != "accuracy"))]


def _ranks(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the non-dominated layer of each row, 0 for the front."""
    ranks = np.full(len(values), -1)
    rank = 0
    while (ranks < 0).any():
        rest = np.flatnonzero(ranks < 0)
        front = rest[non_dominated(values[rest])]
        ranks[front if len(front) else rest] = rank
        rank += 1
    return ranks


def _unit(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale columns to ``[0, 1]`` and return them with the reference point."""
    span = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1.0)
    return scaled, np.full(values.shape[1], _REFERENCE)
