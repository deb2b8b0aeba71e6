"""A truth table as people read it: tables, a CSV file and a picture of what is faster here and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.measure.truth_table import TruthEntry, TruthTable
from autoprune.report.table import write_csv
from autoprune.report.view import interval
from autoprune.study.artifacts import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = ("operator", "format", "runs in", "x float", "95 %", "verdict", "x bytes")
NUMERIC = ("x float", "x bytes")
WIDTH_COLUMNS = ("operator", "in", "time at so many channels, of the widest", "step")
_COLORS = {"faster": "#2a8a4a", "slower": "#c0392b", "no difference": "#7f8c8d"}


def truth_rows(table: TruthTable) -> list[list[str]]:
    """Return the cells of every entry, by operator."""
    return [
        [
            f"{entry.operator}, {entry.channels} channels",
            entry.format,
            ", ".join(f"{word} ({count})" for word, count in entry.ran.items()) or "-",
            "-" if entry.ratio is None else f"{entry.ratio:.3f}",
            "-" if entry.ratio_ci is None else interval(entry.ratio_ci),
            judgement(table, entry),
            "-" if entry.size_ratio is None else f"{entry.size_ratio:.3f}",
        ]
        for entry in table.entries
    ]


def judgement(table: TruthTable, entry: TruthEntry) -> str:
    """Return what is to be said of an entry: its verdict, and what of it is no more than storage."""
    if entry.verdict is None:
        return f"refused: {entry.refused}"
    if not entry.real:
        return f"storage only ({entry.verdict})" + (f"; {entry.refused}" if entry.refused else "")
    same = table.same_as(entry)
    return entry.verdict + (f", as {same.format}" if same else "")


def width_rows(table: TruthTable) -> list[list[str]]:
    """Return the cells of every operator whose widths were looked at."""
    steps = table.steps()
    rows = []
    for (operator, word), times in _times(table).items():
        text = "  ".join(f"{channels}: {time:.2f}" for channels, time in sorted(times.items()))
        rows.append([operator, word, text, str(steps[operator, word])])
    return rows


def summary(table: TruthTable) -> list[str]:
    """Return the lines below the tables."""
    lines = []
    if table.width is not None:
        lines.append(
            f"width: {table.width} (the largest step that costs nothing in any convolution; `width: auto` takes it)"
        )
    if not table.complete:
        lines.append("not complete: the same command again measures all of it")
    if table.noisy:
        lines.append(f"noisy: {', '.join(table.noisy)}; measure again on a quiet machine")
    for date in sorted(set(table.earlier.values())):
        kept = [name for name, each in table.earlier.items() if each == date]
        lines.append(f"measured {date}: {', '.join(kept)}")
    lines.append(f"measured {table.measured} ({table.thoroughness}) in {table.seconds:.0f} s")
    return lines


def write_truth(table: TruthTable, folder: Path) -> list[Path]:
    """Write a table and its picture, each in one step, and return their paths.

    Args:
        table: The table.
        folder: Gets ``truth-TARGET.csv`` and ``truth-TARGET.png``; made if it is not there.

    Raises:
        StorageError: If a file cannot be written.
        OSError: If the folder cannot be made.
    """
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    name = "truth-" + table.target.replace(":", "-").replace("=", "")
    rows = []
    for entry in table.entries:
        row = entry.model_dump(mode="json")
        low, high = row.pop("ratio_ci") or (None, None)
        row["ran"] = " ".join(f"{word}={count}" for word, count in entry.ran.items())
        rows.append({**row, "ratio_ci_low": low, "ratio_ci_high": high, "verdict": entry.verdict})
    csv, png = folder / f"{name}.csv", folder / f"{name}.png"
    write_csv(pd.DataFrame(rows), csv)
    buffer = BytesIO()
    truth_figure(table).savefig(buffer, format="png", dpi=150)
    write_bytes_atomic(png, buffer.getvalue())
    return [csv, png]


def truth_figure(table: TruthTable) -> Figure:
    """Draw the ratio of every entry with its interval, and time over channels of those whose widths were looked at."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [entry for entry in table.entries if entry.ratio is not None]
    figure = Figure(figsize=(13, max(4.0, 1.2 + 0.17 * len(timed))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["ratios", "widths"], ["ratios", "."]], width_ratios=(1.5, 1.0))
    _draw_ratios(axes["ratios"], timed)
    _draw_widths(axes["widths"], table)
    version = table.machine.get("version") or ""
    figure.suptitle(
        f"{table.target} {version} on {table.machine.get('processor', '?')}, {table.measured[:10]}"
    )
    return figure


def _draw_ratios(axes: Axes, entries: list[TruthEntry]) -> None:
    axes.axvline(1.0, color="black", linewidth=0.8)
    for place, entry in enumerate(entries):
        if entry.ratio is None or entry.ratio_ci is None or entry.verdict is None:
            continue
        color, (low, high) = _COLORS[entry.verdict], entry.ratio_ci
        axes.plot([low, high], [place, place], color=color, linewidth=2, alpha=0.6)
        # What is only stored so is hollow.
        axes.plot(
            entry.ratio, place, "o", color=color, markersize=5, fillstyle="full" if entry.real else "none"
        )
    axes.set_yticks(range(len(entries)), [f"{e.operator} · {e.format}" for e in entries], fontsize=7)
    axes.set_ylim(max(len(entries), 1) - 0.5, -0.5)
    axes.set_xscale("log")
    ticks = [t for t in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20) if _within(t, entries)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("latency, of float (log scale; lines: 95 % intervals; hollow: storage only)")
    for verdict, color in _COLORS.items():
        axes.plot([], [], "o", color=color, label=verdict)
    axes.legend(loc="lower right", fontsize=8)


def _within(tick: float, entries: list[TruthEntry]) -> bool:
    ends = [end for entry in entries for end in entry.ratio_ci or ()]
    return not ends or min(ends) / 1.2 <= tick <= max(ends) * 1.2


def _draw_widths(axes: Axes, table: TruthTable) -> None:
    for (operator, word), times in _times(table).items():
        channels = sorted(times)
        style = "-" if word == "float" else "--"
        relative = [c / channels[-1] for c in channels]
        axes.plot(relative, [times[c] for c in channels], style, marker=".", label=f"{operator}, {word}")
    axes.plot([0.6, 1.0], [0.6, 1.0], color="black", linewidth=0.6, label="in proportion")
    axes.set_xlabel("channels, of the widest")
    axes.set_ylabel("time, of the widest")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    if table.width is not None:
        axes.set_title(f"steps of {table.width} channels cost nothing", fontsize=10)


def _times(table: TruthTable) -> Mapping[tuple[str, str], dict[int, float]]:
    found: dict[tuple[str, str], dict[int, float]] = {}
    for each in table.widths:
        found.setdefault((each.operator, each.format), {})[each.channels] = each.ratio
    return found
