"""Printing of results: JSON, CSV and tables, always on the standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autoprune.printing import printable


def print_json(value: Any) -> None:
    """Print one object on one line."""
    print(json.dumps(value, sort_keys=False, allow_nan=False, default=_plain), flush=True)


def print_text(text: str) -> None:
    """Print text, ending in one newline; what a terminal would obey and bytes that are no UTF-8 are written out."""
    text = printable(text)
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    numeric: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> None:
    """Print a table that neither wraps nor cuts where the output is no terminal.

    Args:
        columns: Headings.
        rows: Cells, one row after the other.
        numeric: Columns aligned to the right, which do not wrap.
        whole: Other columns that do not wrap on a narrow terminal.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column in numeric
        table.add_column(column, justify="right" if right else "left", no_wrap=right or column in whole)
    for row in rows:
        table.add_row(*(escape(printable(str(cell))) for cell in row))
    console().print(table)


def print_pairs(values: Mapping[str, object]) -> None:
    """Print names and values, one pair a line."""
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        print(f"{name:<{width}}  {_shown(value)}")
    sys.stdout.flush()


def console() -> Console:
    """Return a console on the standard output of this moment; wide where it is no terminal."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, highlight=False)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    if isinstance(value, tuple | list) and all(isinstance(item, float) for item in value):
        return " to ".join(f"{item:.4g}" for item in value)
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, default=_plain)
    return printable(str(value))


def _plain(value: object) -> object:
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        return dump(mode="json")
    return str(value)
