"""The front as a picture, drawn without pyplot, so that it leaves no state behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.measure.record import Interval, Measurement
from autoprune.report.view import Shown, StudyView, view_of
from autoprune.study.artifacts import write_bytes_atomic
from autoprune.study.store import StudyStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRONT, DENSE, BASELINE, GREY = "#2563eb", "#b45309", "#0f766e", "#9ca3af"
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")
Figures = Callable[[Measurement], tuple[float, Interval | None]]


def latency_of(measurement: Measurement) -> tuple[float, Interval | None]:
    """Return the latency ratio and its interval."""
    return measurement.latency.ratio, measurement.latency.ratio_ci


def size_of(measurement: Measurement) -> tuple[float, Interval | None]:
    """Return the size ratio, which has no interval: it is counted, not sampled."""
    return measurement.size_ratio, None


def figure(store: StudyStore, view: StudyView | None = None) -> Figure:
    """Return capability against latency and against size.

    Dominated points are grey, the front is joined by a step line, bars are 95 % intervals.

    Args:
        store: The study's record.
        view: What is shown of it, if that was gathered before.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    view = view or view_of(store)
    result = Figure(figsize=(12.0, 5.4), dpi=120, layout="constrained")
    FigureCanvasAgg(result)
    left, right = result.subplots(1, 2, sharey=True)
    _draw(left, view, latency_of, "latency, share of the dense network's (1)")
    _draw(right, view, size_of, "size of the model file, share of the dense one (1)")
    split = "report" if view.has_final else "search"
    unit = " (fraction)" if view.metric == "accuracy" else ""
    left.set_ylabel(_plain(f"{view.metric} on the {split} split{unit}"))
    result.suptitle(_plain(f"{view.name}: {view.settings.get('model', '')}"), fontsize=13)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        result.legend(handles, labels, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    return result


def write_png(store: StudyStore, path: Path, view: StudyView | None = None) -> None:
    """Write the picture of the front in one step.

    Raises:
        StorageError: If the file cannot be written.
    """
    buffer = BytesIO()
    figure(store, view).savefig(buffer, format="png", bbox_inches="tight")
    write_bytes_atomic(path, buffer.getvalue())


def staircase(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points ``(cost, capability)`` that no other beats in this plane, by rising cost."""
    best: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    return best


def capability_range(view: StudyView) -> tuple[float, float] | None:
    """Return the range of capability that the front and the baselines need; None without points."""
    bounds = [
        s.point.capability.ci for s in view.shown if s.point.on_front or s.role in ("dense", "baseline")
    ]
    values = [edge for ci in bounds for edge in ci]
    if not values:
        return None
    pad = max(0.06 * (max(values) - min(values)), 1e-3)
    return min(values) - pad, max(values) + pad


def _draw(axes: Axes, view: StudyView, figures: Figures, label: str) -> None:
    axes.set_xlabel(label)
    axes.grid(visible=True, color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    grey = [*view.of("dominated"), *view.of("trial")]
    if grey:
        name = "trial (search split)" if view.of("trial") else "dominated"
        xs = [figures(s.point.measurement)[0] for s in grey]
        axes.scatter(xs, [s.point.capability.value for s in grey], s=16, color=GREY, alpha=0.6, label=name)
    members = [
        (figures(s.point.measurement)[0], s.point.capability.value) for s in view.shown if s.point.on_front
    ]
    stairs = staircase(members)
    if stairs:
        axes.step(*zip(*stairs, strict=True), where="post", color=FRONT, linewidth=1.4, alpha=0.7)
    _bars(axes, view.of("front"), figures, "o", FRONT, "front")
    for index, shown in enumerate(view.of("baseline")):
        name = f"{shown.name} ({'search split' if shown.provisional else 'baseline'})"
        _bars(axes, [shown], figures, _MARKERS[index % len(_MARKERS)], BASELINE, name)
    _bars(axes, view.of("dense"), figures, "*", DENSE, "dense")
    limits = capability_range(view)
    if limits is not None:
        axes.set_ylim(*limits)
        below = sum(s.point.capability.value < limits[0] for s in grey)
        if below:
            axes.text(
                0.99,
                0.01,
                f"{below} points below this range",
                transform=axes.transAxes,
                ha="right",
                color="#6b7280",
            )


def _bars(
    axes: Axes, members: Sequence[Shown], figures: Figures, marker: str, color: str, label: str
) -> None:
    if not members:
        return
    costs = [figures(s.point.measurement) for s in members]
    scores = [s.point.capability for s in members]
    wide = [(max(0.0, x - ci[0]), max(0.0, ci[1] - x)) if ci else (0.0, 0.0) for x, ci in costs]
    high = [(max(0.0, c.value - c.ci[0]), max(0.0, c.ci[1] - c.value)) for c in scores]
    hollow = all(s.provisional for s in members)
    axes.errorbar(
        [x for x, _ in costs],
        [c.value for c in scores],
        xerr=list(zip(*wide, strict=True)) if any(ci for _, ci in costs) else None,
        yerr=list(zip(*high, strict=True)),
        fmt=marker,
        markersize=15 if marker == "*" else 7,
        markerfacecolor="white" if hollow else color,
        color=color,
        ecolor=color,
        elinewidth=1.0,
        alpha=0.95,
        label=_plain(label),
    )


def _plain(text: str) -> str:
    # A dollar sign would begin mathematics, and an underscore first would hide a legend's entry.
    return (" " + text if text.startswith("_") else text).replace("$", r"\$")
