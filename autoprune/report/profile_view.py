"""The profile as people read it: a table and a heat map of what each choice costs and buys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autoprune.search.cost_model import CostModel
from autoprune.search.options import GroupOptions, Options
from autoprune.search.profile import Profile
from autoprune.study.artifacts import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A cut is called free where the loss grows by less than this share of the dense loss (and a constant for networks
# that hardly lose anything), or outputs diverge by less, in nats: some tenths of a point of accuracy.
_FREE = 0.01
_CONSTANT = 0.05
_FREE_DIVERGENCE = 0.005
_TITLES = {"divergence": "outputs diverge by (nats, log10)", "loss": "the task's loss grows by (log10)"}
# Groups in the dearest quarter by loss for each byte are called precious.
_PRECIOUS = 0.75


@dataclass(frozen=True)
class Cell:
    """One width of one group.

    Attributes:
        ratio: Share removed.
        kept: Units that stay.
        loss: Growth of the loss; see :class:`~autoprune.search.profile.CutLoss`.
        size: Share of the dense file that it saves, at the smallest bits.
        latency: Share of the dense latency that it saves at the smallest bits; below 0 where it is slower.
    """

    ratio: float
    kept: int
    loss: float
    size: float
    latency: float


@dataclass(frozen=True)
class Row:
    """One group.

    Attributes:
        group: Its name.
        units: Its units.
        verdict: ``free``, ``precious`` or empty.
        bits: Smallest bit-width.
        bits_loss: Growth of the loss by those bits alone.
        bits_size: Share of the dense file that they save.
        bits_latency: Share of the dense latency that they save; below 0 where they are slower.
        cells: Its widths, from the mildest cut on.
    """

    group: str
    units: int
    verdict: str
    bits: int
    bits_loss: float
    bits_size: float
    bits_latency: float
    cells: tuple[Cell, ...]


def profile_rows(profile: Profile, options: Options) -> list[Row]:
    """Return what each group's choices cost and buy, all other groups whole and at their smallest bits."""
    costs = options.costs
    smallest: dict[str, int] = {o.group.name: min(o.bits) for o in options.of}
    rows = [_row(o, costs, smallest) for o in options.of]
    dear = {row.group: _price(row) for row in rows if row.cells}
    limit = float(np.quantile(list(dear.values()), _PRECIOUS)) if dear else math.inf
    free = _least_loss(profile)
    verdicts = {
        row.group: "free"
        if any(cell.ratio >= 0.2 and cell.loss < free for cell in row.cells)
        else "precious"
        if row.cells and dear[row.group] >= limit
        else ""
        for row in rows
    }
    return [Row(**{**vars(row), "verdict": verdicts[row.group]}) for row in rows]


def _least_loss(profile: Profile) -> float:
    if profile.measure == "divergence":
        return _FREE_DIVERGENCE
    return _FREE * (profile.dense_loss + _CONSTANT)


def _row(options: GroupOptions, costs: CostModel, smallest: dict[str, int]) -> Row:
    group = options.group
    bits, most = min(options.bits), max(options.bits)
    others = {name: width for name, width in smallest.items() if name != group.name}

    def figures(kept: int, width: int) -> tuple[float, float]:
        counts, widths = {group.name: kept}, {**others, group.name: width}
        return costs.size(counts, widths), costs.latency(counts, widths)

    whole = figures(group.size, bits)
    wide = figures(group.size, most)
    loss = {
        (k, b): float(value) for k, b, value in zip(options.kept, options.bits, options.loss, strict=True)
    }
    cells = []
    for kept, ratio in dict(zip(options.kept, options.ratio, strict=True)).items():
        if kept == group.size:
            continue
        size, latency = figures(kept, bits)
        growth = loss[kept, bits] - loss[group.size, bits]
        cells.append(Cell(ratio, kept, growth, whole[0] - size, whole[1] - latency))
    return Row(
        group=group.name,
        units=group.size,
        verdict="",
        bits=bits,
        bits_loss=loss[group.size, bits],
        bits_size=wide[0] - whole[0],
        bits_latency=wide[1] - whole[1],
        cells=tuple(cells),
    )


def _price(row: Row) -> float:
    """Return the loss for each share of bytes in the middle of a group's widths."""
    cell = row.cells[len(row.cells) // 2]
    return cell.loss / max(cell.size, 1e-6)


def profile_json(profile: Profile, options: Options, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the profile with the predictor's own errors as one object."""
    costs = options.costs
    measured = sum(cut.measured for cut in profile.cuts)
    error = None if math.isnan(costs.latency_error) else costs.latency_error
    return {
        "measure": profile.measure,
        "dense_loss": profile.dense_loss,
        "examples": profile.examples,
        "losses_measured": measured,
        "losses_estimated": len(profile.cuts) - measured,
        "networks_timed": len(profile.designs),
        "size_error": costs.size_error,
        "latency_error": error,
        "seconds": profile.seconds,
        "groups": [{**vars(row), "cells": [vars(cell) for cell in row.cells]} for row in rows],
    }


def heat_map(profile: Profile, rows: Sequence[Row]) -> Figure:
    """Return three maps of groups by share removed: the loss, the bytes saved and the latency saved."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.cells]
    ratios = sorted({cell.ratio for row in shown for cell in row.cells})
    figure = Figure(
        figsize=(3.0 + 1.1 * len(ratios) * 3 / 2, 1.8 + 0.28 * max(3, len(shown))),
        dpi=120,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    maps = (
        (_TITLES[profile.measure], "loss", "YlOrRd"),
        ("saves of the dense file, %", "size", "Greens"),
        ("saves of the dense latency, %", "latency", "PuOr"),
    )
    least = _least_loss(profile) / 5
    axes = figure.subplots(1, 3, sharey=True, squeeze=False)[0]
    for axis, (title, name, colours) in zip(axes, maps, strict=True):
        values = np.full((max(1, len(shown)), max(1, len(ratios))), np.nan)
        for i, row in enumerate(shown):
            for cell in row.cells:
                value = getattr(cell, name)
                values[i, ratios.index(cell.ratio)] = (
                    math.log10(max(value, least)) if name == "loss" else 100 * value
                )
        largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
        limits = {"vmin": -largest, "vmax": largest} if name == "latency" else {}
        image = axis.imshow(values, aspect="auto", cmap=colours, **limits)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios], fontsize=8)
        axis.set_xlabel("share of the group removed", fontsize=8)
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                axis.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=6.5)
        figure.colorbar(image, ax=axis, shrink=0.8)
    axes[0].set_yticks(range(len(shown)), [f"{row.group} ({row.units})" for row in shown], fontsize=7)
    return figure


def write_heat_map(profile: Profile, rows: Sequence[Row], path: Path) -> None:
    """Write :func:`heat_map` as PNG in one step."""
    buffer = BytesIO()
    heat_map(profile, rows).savefig(buffer, format="png")
    write_bytes_atomic(path, buffer.getvalue())
