"""Lottery tickets as people read them: a table, a CSV file and a picture, all of the record."""

from __future__ import annotations

import csv
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.search.ticket_record import TicketRecord, TicketResult
from autoprune.study.artifacts import write_bytes_atomic, write_text_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSV_FILE, PNG_FILE = "tickets.csv", "tickets.png"
COLUMNS = ("kind", "weights left", "{metric} mean", "lowest", "highest", "seeds", "steps")
_DENSE, _TICKET, _CONTROL = "#b45309", "#2563eb", "#9ca3af"
_CONTROLS = ("reinit", "random_mask")


def ticket_table(record: TicketRecord) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells, one row for each kind: means over seeds, and the lowest and highest of a seed."""
    headings = [column.format(metric=record.metric) for column in COLUMNS]
    cells = [
        [
            row.kind,
            f"{row.share_left:.1%}",
            f"{row.accuracy:.4f}",
            f"{row.lowest:.4f}",
            f"{row.highest:.4f}",
            str(row.seeds),
            str(row.steps),
        ]
        for row in record.rows()
    ]
    return headings, cells


def write_tickets(record: TicketRecord, folder: Path) -> dict[str, str]:
    """Write ``tickets.csv``, one line for each network, and ``tickets.png``; return their paths by name.

    Raises:
        StorageError: If a file cannot be written.
    """
    text = StringIO()
    names = list(TicketResult.model_fields)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_columns(names))
    for result in record.results:
        dump = result.model_dump()
        writer.writerow([value for name in names for value in _values(dump[name])])
    write_text_atomic(folder / CSV_FILE, text.getvalue())
    buffer = BytesIO()
    tickets_figure(record).savefig(buffer, format="png")
    write_bytes_atomic(folder / PNG_FILE, buffer.getvalue())
    return {"csv": str(folder / CSV_FILE), "png": str(folder / PNG_FILE)}


def tickets_figure(record: TicketRecord) -> Figure:
    """Return the accuracy of each kind: a dot for each seed, a bar at the mean; controls are grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = record.rows()
    figure = Figure(figsize=(7.0, 1.6 + 0.45 * max(3, len(rows))), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for place, row in enumerate(rows):
        colour = _DENSE if row.kind == "dense" else _CONTROL if row.kind in _CONTROLS else _TICKET
        values = [r.accuracy for r in record.results if r.kind == row.kind]
        axis.plot(values, [place] * len(values), "o", color=colour, alpha=0.6, markersize=6)
        axis.plot([row.accuracy], [place], "|", color=colour, markersize=20, markeredgewidth=2.5)
    axis.set_yticks(range(len(rows)), [f"{row.kind} ({row.share_left:.0%} left)" for row in rows])
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel(f"{record.metric} on the report split; a dot for each seed, a bar at the mean")
    axis.set_title(f"{record.settings.get('model', '')} on {record.settings.get('data', '')}", fontsize=11)
    return figure


def _columns(names: list[str]) -> list[str]:
    return [column for name in names for column in (("ci_low", "ci_high") if name == "ci" else (name,))]


def _values(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,)
