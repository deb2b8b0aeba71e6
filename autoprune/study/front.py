"""The front of a study: which points are on it, which are ties, and which one to take."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autoprune.errors import NoFeasiblePointError
from autoprune.measure.record import Capability, Measurement
from autoprune.measure.stats import indistinguishable
from autoprune.naming import StudyPaths
from autoprune.study.artifacts import artifact_folder
from autoprune.study.pareto import Array, hypervolume, knee, non_dominated
from autoprune.study.records import TrialRecord, is_given, superseded

if TYPE_CHECKING:
    import pandas as pd

    from autoprune.study.store import StudyStore

# A tenth lost is where the volume of a front ends; latency and size end at the dense network's.
WORST_DROP = 0.1


@dataclass(frozen=True)
class FrontPoint:
    """One measured trial seen as a point.

    Attributes:
        record: The trial.
        on_front: Whether no other point of the same fidelity dominates it.
        tie_with: Trials on the front whose capability and latency no interval tells from this one's.
        baseline: Whether the search did not choose it: the dense network, int8 alone, a plain sampler's uniform ratios.
    """

    record: TrialRecord
    on_front: bool
    tie_with: tuple[int, ...]
    baseline: bool

    @property
    def measurement(self) -> Measurement:
        """What was measured of it."""
        if self.record.measurement is None:
            raise ValueError(f"trial {self.record.number} was not measured")
        return self.record.measurement

    @property
    def capability(self) -> Capability:
        """Capability on the report split, on the search split before the final measurement."""
        return self.measurement.report or self.measurement.search


def costs(measurement: Measurement, objectives: Sequence[str], *, on_search: bool) -> list[float]:
    """Return the objectives' values with all of them minimised, capability first.

    Args:
        measurement: What was measured.
        objectives: Names of the objectives.
        on_search: Whether capability is the search split's even where the report split's is known.
    """
    capability = measurement.search if on_search else measurement.report or measurement.search
    by_name = {
        "accuracy": -capability.value,
        "latency": measurement.latency.ratio,
        "size": measurement.size_ratio,
    }
    return [by_name["accuracy"], *(by_name[name] for name in objectives if name != "accuracy")]


def front_numbers(records: Sequence[TrialRecord], objectives: Sequence[str]) -> set[int]:
    """Return the trials on the search's fronts: of search fidelity, by what the search may see.

    Only results of one rung are compared; what needs no training counts in all of them. Each recipe is there once, by
    its highest rung.
    """
    fronts = (
        {r.number for r, on in zip(pool, _mask(pool, objectives, on_search=True), strict=True) if on}
        for pool in _pools(records).values()
    )
    later = superseded(records)
    return {number for front in fronts for number in front} - later


def _pools(records: Sequence[TrialRecord]) -> dict[int, list[TrialRecord]]:
    """Return the measured search trials by rung, those that need no training with every rung."""
    measured = [r for r in records if r.is_measured_search]
    free = [r for r in measured if not r.is_trained]
    rungs = sorted({r.rung for r in measured if r.is_trained}) or [1]
    return {rung: [*free, *(r for r in measured if r.is_trained and r.rung == rung)] for rung in rungs}


def _mask(pool: Sequence[TrialRecord], objectives: Sequence[str], *, on_search: bool) -> list[bool]:
    measured = [r.measurement for r in pool if r.measurement is not None]
    if not measured:
        return []
    values = np.array([costs(m, objectives, on_search=on_search) for m in measured])
    return [bool(on) for on in non_dominated(values)]


def study_hypervolume(records: Sequence[TrialRecord], objectives: Sequence[str]) -> float:
    """Return the volume of the search's front below (0.1 lost, dense latency, dense size), each axis scaled to 1.

    Results of different rungs are not mixed: it is that of the rung whose front has most. Capability counts as the
    share of 0.1 lost against the dense network; for a metric whose dense value is above 1 the loss is relative to
    that value.
    """
    dense = dense_record(records)
    if dense is None or dense.measurement is None:
        return 0.0
    before = dense.measurement.search.value
    pools = ([r.measurement for r in pool if r.measurement] for pool in _pools(records).values())
    return max(volume_of(pool, objectives, before, on_search=True) for pool in pools)


def volume_of(
    measurements: Sequence[Measurement], objectives: Sequence[str], dense: float, *, on_search: bool
) -> float:
    """Return the volume that measurements dominate; see :func:`study_hypervolume`.

    Args:
        measurements: What was measured.
        objectives: Names of the objectives.
        dense: Capability of the dense network on the same split.
        on_search: Whether capability is that of the search split.
    """
    if not measurements:
        return 0.0
    scale = WORST_DROP * max(1.0, abs(dense))
    values: Array = np.array([costs(m, objectives, on_search=on_search) for m in measurements])
    # A capability above the dense network's adds nothing beyond it, so that the volume stays within [0, 1].
    values[:, 0] = np.maximum(0.0, (values[:, 0] + dense) / scale)
    return hypervolume(values, np.ones(values.shape[1]))


def dense_record(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """Return the dense network's trial, its final measurement if there is one; None before trial 0."""
    first = next((r for r in records if r.origin == "dense" and r.state == "complete"), None)
    if first is None:
        return None
    final = [
        r for r in records if r.fidelity == "final" and r.parent == first.number and r.state == "complete"
    ]
    return final[-1] if final else first


def dense_number(records: Sequence[TrialRecord]) -> int | None:
    """Return the trial whose artifact is the dense network's; not 0 where a run was killed before it ended."""
    found = (
        r.number for r in records if r.origin == "dense" and r.state == "complete" and r.fidelity == "search"
    )
    return next(found, None)


def all_points(store: StudyStore) -> list[FrontPoint]:
    """Return every measured trial as a point.

    Once final trials exist the front is theirs, by the figures that are printed beside them; points of the
    search's fidelity are then never on it, their recovery having been brief.
    """
    records = store.records()
    # A later final phase measures all that an earlier one had again.
    latest = max((r.round for r in records), default=0)
    measured = [
        r
        for r in records
        if r.measurement is not None and r.repeat_of is None and (r.fidelity == "search" or r.round == latest)
    ]
    finals = [r for r in measured if r.fidelity == "final"]
    if finals:
        on = _mask(finals, store.objectives, on_search=False)
        on_front = {r.number for r, is_on in zip(finals, on, strict=True) if is_on}
    else:
        on_front = front_numbers(records, store.objectives)
    members = [r for r in measured if r.number in on_front]
    marked = {r.number for r in records if is_given(r, store.sampler_name)}
    return [
        FrontPoint(
            record=r,
            on_front=r.number in on_front,
            tie_with=_ties(r, members, store.objectives) if r.number in on_front else (),
            baseline=r.number in marked or r.parent in marked,
        )
        for r in measured
    ]


def front_points(store: StudyStore) -> list[FrontPoint]:
    """Return the points on the front, the most capable first."""
    points = [point for point in all_points(store) if point.on_front]
    return sorted(points, key=lambda p: (-p.capability.value, p.measurement.latency.ratio, p.record.number))


def _ties(record: TrialRecord, members: Sequence[TrialRecord], objectives: Sequence[str]) -> tuple[int, ...]:
    """Return the other members that no interval of an objective tells apart from ``record``; bytes have none."""
    own = record.measurement
    found = []
    for other in members:
        theirs = other.measurement
        if other.number == record.number or own is None or theirs is None:
            continue
        same_capability = indistinguishable(
            (own.report or own.search).ci, (theirs.report or theirs.search).ci
        )
        same_latency = "latency" not in objectives or indistinguishable(
            own.latency.ratio_ci, theirs.latency.ratio_ci
        )
        if same_capability and same_latency:
            found.append(other.number)
    return tuple(found)


def pick_points(
    points: Sequence[FrontPoint],
    *,
    max_latency_ms: float | None = None,
    max_latency_ratio: float | None = None,
    max_size_mb: float | None = None,
    min_accuracy: float | None = None,
    max_drop: float | None = None,
    knee: bool = False,
    dense: FrontPoint | TrialRecord | None = None,
    objectives: Sequence[str] = ("accuracy", "latency", "size"),
) -> list[FrontPoint]:
    """Return the points that keep every limit, the most capable first; with ``knee`` the knee alone.

    Args:
        points: A front.
        max_latency_ms: Most milliseconds for one batch.
        max_latency_ratio: Most latency as a share of the dense network's.
        max_size_mb: Most megabytes (1e6 bytes) of the model file.
        min_accuracy: Least capability.
        max_drop: Most capability lost against the dense network.
        knee: Whether to return only the point where the trade turns.
        dense: The dense network, against which a drop counts; the point of dense origin if not given.
        objectives: Names of the objectives, whose trade the knee is of.

    Raises:
        NoFeasiblePointError: If no point keeps the limits; names the nearest miss of each limit.
    """
    before = _dense_capability(points, dense)
    limits: list[tuple[str, float | None, Callable[[FrontPoint], float]]] = [
        ("latency_ms", max_latency_ms, lambda p: p.measurement.latency.latency_ms),
        ("latency_ratio", max_latency_ratio, lambda p: p.measurement.latency.ratio),
        ("size_mb", max_size_mb, lambda p: p.measurement.size_bytes / 1e6),
        ("drop", max_drop, lambda p: before - p.capability.value),
        ("accuracy", None if min_accuracy is None else -min_accuracy, lambda p: -p.capability.value),
    ]
    kept = [p for p in points if all(limit is None or figure(p) <= limit for _, limit, figure in limits)]
    if not kept:
        nearest = [
            f"{name}: asked at most {limit:g}, the front's least is {min(map(figure, points)):g}"
            if name != "accuracy"
            else f"accuracy: asked at least {-limit:g}, the front's best is {-min(map(figure, points)):g}"
            for name, limit, figure in limits
            if limit is not None and points and min(map(figure, points)) > limit
        ]
        if points and not nearest:
            nearest = ["each of them is kept by some point, but no point keeps all"]
        raise NoFeasiblePointError(
            "no point of the front keeps these limits" + "".join(f"\n  {line}" for line in nearest),
            "relax a limit, or search longer",
        )
    kept = sorted(kept, key=lambda p: (-p.capability.value, p.measurement.latency.ratio, p.record.number))
    return [kept[_knee(kept, objectives)]] if knee else kept


def _dense_capability(points: Sequence[FrontPoint], dense: FrontPoint | TrialRecord | None) -> float:
    record = dense.record if isinstance(dense, FrontPoint) else dense
    if record is None:
        # The dense network is the only one without any choice, and always measured.
        found = [p.record for p in points if p.record.label == "dense"]
        record = found[0] if found else None
    if record is None or record.measurement is None:
        return max((p.capability.value for p in points), default=0.0)
    return (record.measurement.report or record.measurement.search).value


def _knee(points: Sequence[FrontPoint], objectives: Sequence[str]) -> int:
    return knee(np.array([costs(p.measurement, objectives, on_search=False) for p in points]))


def point_json(paths: StudyPaths, record: TrialRecord) -> dict[str, Any]:
    """Return one measured trial with the names that scripts rely on.

    ``accuracy`` is that of the report split, None before the final measurement; shares are of the dense file's.

    Raises:
        ValueError: If the trial was not measured.
    """
    measured = record.measurement
    if measured is None:
        raise ValueError(f"trial {record.number} was not measured")
    folder = artifact_folder(paths, record)
    there = f" --target {shlex.quote(paths.target)}" if paths.target else ""
    return {
        "trial": record.number,
        "label": record.label,
        "origin": record.origin,
        "fidelity": record.fidelity,
        "parent": record.parent,
        "started_from": record.started_from,
        "rung": record.rung,
        "accuracy": measured.report.value if measured.report else None,
        "accuracy_ci": measured.report.ci if measured.report else None,
        "accuracy_search": measured.search.value,
        "metric": measured.search.name,
        "latency_ms": measured.latency.latency_ms,
        "latency_p95_ms": measured.latency.latency_p95_ms,
        "latency_ratio": measured.latency.ratio,
        "latency_ratio_ci": measured.latency.ratio_ci,
        "latency_noisy": measured.latency.noisy,
        "size_bytes": measured.size_bytes,
        "size_ratio": measured.size_ratio,
        "params": measured.params,
        "macs": measured.macs,
        **measured.figures.flat(),
        "int8_layers": measured.executed.int8_layers,
        "layers": measured.executed.layers,
        "as_asked": measured.executed.as_asked,
        "ran": measured.executed.ran,
        "not_as_asked": measured.executed.reasons or dict.fromkeys(measured.executed.not_as_asked, ""),
        "train_steps": record.train_steps,
        "recipe": record.recipe.content() if record.recipe else None,
        "artifact": str(folder) if folder.is_dir() else None,
        "export_command": f"autoprune export {shlex.quote(paths.name)} --trial {record.number}{there} --to DIR",
    }


def to_frame(points: Sequence[FrontPoint], paths: StudyPaths) -> pd.DataFrame:
    """Return points as a table, one row each, with the names of :func:`point_json` but for the recipe."""
    import pandas as pd

    rows = []
    for point in points:
        row = point_json(paths, point.record)
        row.pop("recipe")
        row["not_measured"] = "; ".join(f"{name}: {why}" for name, why in row["not_measured"].items())
        row["baseline"], row["tie_with"] = point.baseline, " ".join(map(str, point.tie_with))
        for name in ("accuracy_ci", "latency_ratio_ci"):
            interval = row.pop(name)
            row[f"{name}_low"], row[f"{name}_high"] = interval or (None, None)
        rows.append(row)
    return pd.DataFrame(rows)
