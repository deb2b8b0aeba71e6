"""Truth tables on the command line: measured with progress, shown, written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprune.cli.output import print_table, print_text
from autoprune.errors import AutopruneError, ExportError, StorageError
from autoprune.target import Target

if TYPE_CHECKING:
    from autoprune.measure.truth_table import TruthTable


def measure_tables(targets: Sequence[Target], *, full: bool, quiet: bool) -> bool:
    """Measure the tables of targets, one after the other, and keep them.

    Args:
        targets: What to measure.
        full: Whether to measure for long.
        quiet: Whether to show no progress.

    Returns:
        Whether all of it was done; not so after Ctrl-C, which keeps what was measured until then.

    Raises:
        ExportError: If targets cannot be measured, once the others are.
        StorageError: If a table cannot be kept.
    """
    from autoprune.measure.truth import measure_truth
    from autoprune.measure.truth_table import write_table

    failed: list[tuple[Target, AutopruneError]] = []
    for target in targets:

        def say(message: str, spec: str = target.spec) -> None:
            if not quiet:
                print(f"[measure] | {spec}: {message}", file=sys.stderr, flush=True)

        def keep(table: TruthTable, target: Target = target) -> None:
            try:
                write_table(table, target)
            except OSError as error:
                raise StorageError(
                    f"the table of {target.spec} cannot be kept: {error}",
                    "set AUTOPRUNE_CACHE to a folder on a disk with room",
                ) from error

        try:
            measure_truth(target, "full" if full else "quick", say=say, keep=keep)
        except KeyboardInterrupt:
            return False
        except StorageError:
            raise
        except AutopruneError as error:  # the others are measured all the same
            failed.append((target, error))
    if failed:
        told = "; ".join(f"{target.spec} cannot be measured: {error.message}" for target, error in failed)
        raise ExportError(told, failed[0][1].hint)
    return True


def show_tables(tables: Sequence[TruthTable]) -> None:
    """Print tables; say how to get one where there is none."""
    from autoprune.report.truth_view import COLUMNS, NUMERIC, WIDTH_COLUMNS, summary, truth_rows, width_rows

    if not tables:
        print_text(
            "nothing was measured of this machine: `autoprune doctor --measure` tells what is faster here"
        )
    for table in tables:
        print_text(f"{table.target} {table.machine.get('version') or ''}")
        print_table(COLUMNS, truth_rows(table), NUMERIC, whole=("operator", "format", "runs in", "95 %"))
        print_table(WIDTH_COLUMNS, width_rows(table), ("step",))
        print_text("\n".join(summary(table)))


def table_json(table: TruthTable) -> dict[str, Any]:
    """Return a table for scripts: its entries with verdicts, its steps and the recommended width."""
    content = table.model_dump(mode="json")
    content["entries"] = [
        {
            **entry.model_dump(mode="json"),
            "verdict": entry.verdict,
            "same_as": same.format if (same := table.same_as(entry)) else None,
        }
        for entry in table.entries
    ]
    steps = [{"operator": o, "format": f, "step": step} for (o, f), step in table.steps().items()]
    return {**content, "steps": steps, "width": table.width}


def tables_here() -> list[TruthTable]:
    """Return the tables of this machine."""
    from autoprune.measure.truth_table import tables_here as read

    return read()


def write_tables(tables: Sequence[TruthTable], to: Path) -> list[Path]:
    """Write tables and pictures into a folder and return the files.

    Raises:
        StorageError: If they cannot be written.
    """
    from autoprune.report.truth_view import write_truth

    try:
        return [path for table in tables for path in write_truth(table, to)]
    except OSError as error:
        raise StorageError(
            f"{str(to)!r} cannot be written: {error}", "choose a folder on a disk with room"
        ) from error
