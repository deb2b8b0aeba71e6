"""A sensitivity analysis as people read it: a table, a heat map of all groups and the curves of the worst."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autoprune.report.table import write_csv
from autoprune.search.curves import POINT, Analysis, Curve, by_sensitivity, curves_of
from autoprune.study.artifacts import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN_CURVES = 8
# Colours of the heat map end where this many points are lost: what is lost beyond is lost.
_DEEPEST = 20.0
_DIVERGENCE = {"divergence": "divergence of outputs, nats", "loss": "growth of the loss"}


def sensitivity_table(analysis: Analysis) -> tuple[list[str], list[list[str]]]:
    """Return headings, and a row for each group and criterion: drops in points at the shares asked for."""
    columns = ["group", "units", "criterion", "1 point at", *(f"-{r:.0%}" for r in analysis.ratios), "block"]
    rows = []
    for curve in curves_of(analysis):
        ratio = curve.ratio_at()
        cells = [_at(curve, asked) for asked in analysis.ratios]
        rows.append(
            [
                curve.group.name,
                str(curve.group.units),
                curve.criterion,
                f">{curve.removed[-1]:.2f}" if ratio is None else f"{ratio:.2f}",
                *("" if cell is None else f"{100 * cell:.1f}" for cell in cells),
                "" if curve.block_drop is None else f"{100 * curve.block_drop:.1f}",
            ]
        )
    return columns, rows


def _at(curve: Curve, asked: float) -> float | None:
    """Return the drop at the share nearest to the one asked for; None where that was not measured."""
    near = min(range(len(curve.removed)), key=lambda i: abs(curve.removed[i] - asked))
    # A unit has to be whole, and one has to stay.
    return curve.drops[near] if abs(curve.removed[near] - asked) <= 1.0 / curve.group.units else None


def extremes(analysis: Analysis, count: int = 3) -> tuple[list[str], list[str]]:
    """Return the names of the most sensitive groups, the worst first, and of the least, the most robust first."""
    names = [curve.group.name for curve in by_sensitivity(curves_of(analysis))]
    count = min(count, len(names) // 2) or len(names)
    return names[:count], names[::-1][:count]


def sensitivity_json(analysis: Analysis) -> dict[str, Any]:
    """Return the analysis as one object."""
    most, least = extremes(analysis)
    return {
        "metric": analysis.metric,
        "measure": analysis.measure,
        "recover": analysis.recover,
        "dense": analysis.dense,
        "uncut": analysis.uncut,
        "examples": analysis.examples,
        "complete": analysis.complete,
        "most_sensitive": most,
        "least_sensitive": least,
        "curves": [
            {
                "group": curve.group.name,
                "type": curve.group.type,
                "units": curve.group.units,
                "criterion": curve.criterion,
                "ratio_at_one_point": curve.ratio_at(),
                "removed": curve.removed,
                "drops": curve.drops,
                "divergences": curve.divergences,
                "block": curve.group.block or None,
                "block_drop": curve.block_drop,
            }
            for curve in curves_of(analysis)
        ],
    }


def write_sensitivity_csv(analysis: Analysis, path: Path) -> None:
    """Write a row for each cut that was measured.

    Raises:
        StorageError: If the file cannot be written.
    """
    import pandas as pd

    groups = {group.name: group for group in analysis.groups}
    rows = [
        {
            "group": cut.group,
            "type": groups[cut.group].type,
            "units": groups[cut.group].units,
            "criterion": cut.criterion,
            "kept": cut.kept,
            "removed": 1.0 - cut.kept / groups[cut.group].units,
            analysis.metric: cut.accuracy,
            "drop": analysis.uncut - cut.accuracy,
            analysis.measure: cut.divergence,
            "block": groups[cut.group].block if cut.kept == 0 else "",
        }
        for cut in analysis.cuts
    ]
    write_csv(pd.DataFrame(rows), path)


def sensitivity_figure(analysis: Analysis) -> Figure:
    """Return a heat map of drops for each criterion, groups by rows, and the curves of the most sensitive groups."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = curves_of(analysis)
    worst = by_sensitivity(curves)[:_SHOWN_CURVES]
    count = len(analysis.criteria)
    height = max(5.0, 1.6 + 0.2 * len(analysis.groups))
    figure = Figure(figsize=(2.6 + 2.2 * count + 5.0, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(2.6 + 2.2 * count, 5.0))[0]
    maps = left.subplots(1, count, sharey=True, squeeze=False)[0]
    for axis, criterion in zip(maps, analysis.criteria, strict=True):
        _heat_map(axis, analysis, [c for c in curves if c.criterion == criterion])
        axis.set_title(f"points lost, by {criterion}", fontsize=9)
    maps[0].set_yticks(
        range(len(analysis.groups)), [f"{_plain(g.name)} ({g.units})" for g in analysis.groups], fontsize=6.5
    )
    upper, lower = right.subplots(2, 1, sharex=True)
    for curve in worst:
        label = f"{_plain(curve.group.name)} ({curve.criterion})"
        upper.plot([0.0, *curve.removed], [0.0, *(100 * d for d in curve.drops)], marker="o", label=label)
        lower.plot(curve.removed, curve.divergences, marker="o")
    upper.axhline(100 * POINT, color="grey", linewidth=0.8, linestyle="--")
    upper.set_ylabel(f"points of {analysis.metric} lost", fontsize=8)
    upper.set_title(f"the {len(worst)} most sensitive groups, each by its best criterion", fontsize=9)
    lower.set_ylabel(_DIVERGENCE[analysis.measure], fontsize=8)
    lower.set_xlabel("share of the group removed", fontsize=8)
    if worst:
        upper.legend(fontsize=6.5)
    return figure


def _heat_map(axis: Axes, analysis: Analysis, curves: Sequence[Curve]) -> None:
    rows = {group.name: row for row, group in enumerate(analysis.groups)}
    has_block = any(curve.block_drop is not None for curve in curves)
    values = np.full((len(rows), len(analysis.ratios) + has_block), np.nan)
    for curve in curves:
        drops = [_at(curve, asked) for asked in analysis.ratios]
        drops += [curve.block_drop] if has_block else []
        values[rows[curve.group.name]] = [np.nan if drop is None else 100 * drop for drop in drops]
    axis.imshow(np.clip(values, 0.0, _DEEPEST), aspect="auto", cmap="YlOrRd", vmin=0.0, vmax=_DEEPEST)
    names = [f"{ratio:g}" for ratio in analysis.ratios] + ["block"] * has_block
    axis.set_xticks(range(len(names)), names, fontsize=7)
    axis.set_xlabel("share of the group removed", fontsize=8)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            shade = "white" if value > 0.7 * _DEEPEST else "black"
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=6, color=shade)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")


def write_sensitivity_png(analysis: Analysis, path: Path) -> None:
    """Write :func:`sensitivity_figure` as PNG in one step."""
    buffer = BytesIO()
    sensitivity_figure(analysis).savefig(buffer, format="png")
    write_bytes_atomic(path, buffer.getvalue())
