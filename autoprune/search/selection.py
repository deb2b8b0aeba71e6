"""Which networks the final recovery trains. Torch-free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autoprune.measure.record import Measurement
from autoprune.search.baselines import architecture_key
from autoprune.space.groups import Groups
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
) -> list[list[TrialRecord]]:
    """Choose up to ``most`` pruned networks that cover the whole front.

    Trials that differ only in bit-widths share one network, which is trained once for all of them. Networks
    on the search's front come first; if there are fewer than ``most``, the next non-dominated layers fill up.
    Among them the axis of costs is cut into equal parts on a logarithmic scale, and each part gives the network
    that adds most hypervolume, so that the training covers the axis instead of one corner.

    Args:
        records: Trials of the study.
        groups: Groups of the model.
        objectives: Names of the objectives.
        most: Largest number of networks.
        available: Trials whose artifacts are kept; all of them if not given.
        left: For each rung the share of its loss that more training is expected to leave, which brings results of
            several rungs to one fidelity; 1 where not given.

    Returns:
        For each network its trials that are worth an artifact, the leading one first; networks ordered from the
        mildest to the smallest.
    """
    later = superseded(records)
    pool = [r for r in records if r.is_measured_search and r.recipe is not None and r.number not in later]
    if not pool or most < 1:
        return []
    dense = max(
        (r.measurement.search.value for r in pool if r.origin == "dense" and r.measurement), default=0.0
    )
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
    chosen: list[int] = []
    for rank in sorted({int(ranks[i]) for i in leaders}):
        layer = [i for i in leaders if ranks[i] == rank]
        room = most - len(chosen)
        if room <= 0:
            break
        chosen += layer if len(layer) <= room else [layer[i] for i in _spread_out(values[layer], room)]
    networks = []
    for leader in sorted(chosen, key=lambda i: -float(values[i, 1:].sum())):
        recipe = pool[leader].recipe
        members = by_network[architecture_key(recipe, groups)] if recipe is not None else []
        networks.append([pool[i] for i in members if i == leader or ranks[i] == 0])
    return networks


def _costs(measurement: Measurement, objectives: Sequence[str], dense: float, left: float) -> list[float]:
    by_name = {
        "accuracy": (dense - measurement.search.value) * left,
        "latency": float(np.log(measurement.latency.ratio)),
        "size": float(np.log(measurement.size_ratio)),
    }
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


def _spread_out(values: NDArray[np.float64], room: int) -> list[int]:
    """Choose ``room`` rows: one from each part of the axis of costs, then by hypervolume where parts are empty."""
    scaled, reference = _unit(values)
    place = scaled[:, 1:].mean(axis=1)
    span = np.ptp(place)
    parts = np.minimum(room - 1, ((place - place.min()) / (span or 1.0) * room).astype(int))
    chosen: list[int] = []
    for part in range(room):
        chosen = _add_best(scaled, reference, chosen, [int(i) for i in np.flatnonzero(parts == part)])
    while len(chosen) < room:
        chosen = _add_best(scaled, reference, chosen, [i for i in range(len(values)) if i not in chosen])
    return chosen


def _add_best(
    scaled: NDArray[np.float64], reference: NDArray[np.float64], chosen: list[int], candidates: list[int]
) -> list[int]:
    if not candidates:
        return chosen
    return [*chosen, max(candidates, key=lambda i: hypervolume(scaled[[*chosen, i]], reference))]


def _unit(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale columns to ``[0, 1]`` and return them with the reference point."""
    span = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1.0)
    return scaled, np.full(values.shape[1], _REFERENCE)
