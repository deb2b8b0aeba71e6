"""The front as a table: for terminals, plain text and CSV files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autoprune.printing import printable
from autoprune.report.figures_view import HEADINGS, figure_cells, not_measured, present
from autoprune.report.view import interval
from autoprune.study.artifacts import write_bytes_atomic
from autoprune.study.front import FrontPoint
from autoprune.study.records import TrialRecord

if TYPE_CHECKING:
    import pandas as pd

_TEXT_COLUMNS = ("what",)
_COLUMNS = (
    "trial",
    "what",
    "accuracy",
    "95 %",
    "latency ms",
    "x dense",
    "95 % of it",
    "MB",
    "x size",
    "int8",
    "steps",
)
# Columns of plain text.
_PLAIN_WIDTH = 200
# What spreadsheets take for a formula; a tab or carriage return before it is skipped by them.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def front_table(
    points: Sequence[FrontPoint], dense: TrialRecord | None, figures: Sequence[str] = ()
) -> Table:
    """Return the front as a table, the dense network first.

    Args:
        points: The points to show, in their order.
        dense: The dense network's trial; left out where it was not measured.
        figures: Names of further figures to show.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in [*_COLUMNS, *(HEADINGS[name] for name in figures)]:
        text = column in _TEXT_COLUMNS
        table.add_column(column, justify="left" if text else "right", no_wrap=not text)
    own = next((p for p in points if dense is not None and p.record.number == dense.number), None)
    if dense is not None and dense.measurement is not None:
        first = own or FrontPoint(dense, on_front=False, tie_with=(), baseline=True)
        table.add_row(*(escape(printable(cell)) for cell in _cells(first, figures)))
    for point in points:
        if point is not own:
            table.add_row(*(escape(printable(cell)) for cell in _cells(point, figures)))
    return table


def _cells(point: FrontPoint, figures: Sequence[str]) -> list[str]:
    record, measured = point.record, point.measurement
    score, latency = point.capability, measured.latency
    notes = ["baseline"] if point.baseline else []
    if measured.report is None:
        notes.append("search split")
    if point.tie_with:
        notes.append("tie with " + ", ".join(map(str, point.tie_with)))
    own = figure_cells(measured.figures)
    what = (record.label or record.origin) + (f" ({'; '.join(notes)})" if notes else "")
    return [
        str(record.number),
        what,
        f"{score.value:.4f}",
        interval(score.ci),
        f"{latency.latency_ms:.3f}",
        f"{latency.ratio:.3f}",
        interval(latency.ratio_ci) + (" noisy" if latency.noisy else ""),
        f"{measured.size_bytes / 1e6:.3f}",
        f"{measured.size_ratio:.3f}",
        f"{measured.executed.int8_layers}/{measured.executed.layers}",
        str(record.train_steps),
        *(own[name] or "-" for name in figures),
    ]


def print_front(points: Sequence[FrontPoint], dense: TrialRecord | None, file: TextIO | None = None) -> None:
    """Print the front; plain text that neither wraps nor cuts where ``file`` is no terminal.

    What was measured besides accuracy, latency and size is in it where that fits, and why something of it is missing.
    """
    stream = sys.stdout if file is None else file
    console = Console(file=stream, highlight=False)
    whole = [p.measurement.figures for p in points if p.measurement.figures.dense is not None]
    table = front_table(points, dense, present(whole))
    width = console.width if stream.isatty() else _PLAIN_WIDTH
    if console.measure(table, options=console.options.update(width=2 * _PLAIN_WIDTH)).maximum > width:
        table = front_table(points, dense)
    if stream.isatty():
        console.print(table)
    else:
        stream.write(table_text(table))
    stream.writelines(f"{printable(line)}\n" for line in not_measured(*whole))


def table_text(table: Table, width: int = _PLAIN_WIDTH) -> str:
    """Return a table as plain text, without control sequences."""
    buffer = StringIO()
    Console(file=buffer, width=width, highlight=False, force_terminal=False, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def csv_text(frame: pd.DataFrame) -> str:
    """Return a table as CSV; text that a spreadsheet would run as a formula gets a leading ``'``."""
    safe = frame.map(_harmless)
    safe.columns = [_harmless(str(column)) for column in safe.columns]
    return str(safe.to_csv(index=False))


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV in one step; see :func:`csv_text`.

    Args:
        frame: The table; numbers stay numbers.
        path: The file.

    Raises:
        StorageError: If the file cannot be written.
    """
    write_bytes_atomic(path, csv_text(frame).encode("utf-8"))


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
