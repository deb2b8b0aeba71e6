"""Live view of a search on the standard error: a panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from autoprune.search.events import Listener, Progress

_RECENT = 6
_WORKERS_SHOWN = 16


@contextmanager
def live_view(title: str, quiet: bool = False) -> Iterator[Listener]:
    """Show progress for the length of the block.

    Args:
        title: Heading of the panel.
        quiet: Show nothing.

    Yields:
        The listener to hand to a search.
    """
    if quiet:
        yield lambda progress: None
    elif sys.stderr.isatty():
        view = _Panel(title)
        console = Console(stderr=True)
        with Live(view, console=console, refresh_per_second=2, transient=True, redirect_stdout=False):
            yield view.update
        if view.state is not None:
            console.print(Text(plain_line(view.state)))
    else:
        lines = _Lines()
        yield lines.update


class _Lines:
    """Prints one line for each event that says something new."""

    def __init__(self) -> None:
        self._last = ""

    def update(self, progress: Progress) -> None:
        line = plain_line(progress)
        if line != self._last:
            self._last = line
            print(line, file=sys.stderr, flush=True)


class _Panel:
    """A panel that counts the time down by itself between events."""

    def __init__(self, title: str) -> None:
        self.state: Progress | None = None
        self._title = title
        self._at_s = time.monotonic()
        self._recent: list[str] = []

    def update(self, progress: Progress) -> None:
        self.state = progress
        self._at_s = time.monotonic()
        if progress.last and progress.last not in self._recent[-1:]:
            self._recent = [*self._recent, progress.last][-_RECENT:]

    def __rich__(self) -> Panel:
        state = self.state
        if state is None:
            return Panel("starting", title=Text(self._title))
        left_s = None if state.left_s is None else state.left_s - (time.monotonic() - self._at_s)
        grid = Table.grid(padding=(0, 2))
        for name, value in (
            ("phase", f"{state.phase}: {state.message}"),
            ("time left", "counts trials" if left_s is None else duration(left_s)),
            ("trials", str(state.trials)),
            ("front", f"{state.front} points, hypervolume {state.hypervolume:.4f}"),
            ("failures", failures(state.failures)),
        ):
            grid.add_row(Text(name, style="bold"), Text(value))
        recent = Text("\n".join(self._recent), style="dim")
        if state.workers:
            return Panel(Group(grid, workers_table(state), recent), title=Text(self._title))
        return Panel(Group(grid, recent), title=Text(self._title))


def workers_table(progress: Progress) -> Table:
    """Return who does what: each worker, or those that last changed and how many others there are."""
    table = Table(box=None, pad_edge=False, title_justify="left", title=Text(workers_line(progress)))
    for heading in ("worker", "node", "does", "for", "busy", "lost"):
        table.add_column(heading, justify="right" if heading in ("for", "busy", "lost") else "left")
    shown = sorted(progress.workers, key=lambda worker: (-worker.lost, worker.since_s))[:_WORKERS_SHOWN]
    shown.sort(key=lambda worker: progress.workers.index(worker))
    for worker in shown:
        table.add_row(
            *(
                Text(cell)
                for cell in (
                    worker.name,
                    worker.node or "-",
                    worker.doing,
                    duration(worker.since_s),
                    f"{worker.busy_share:.0%}",
                    str(worker.lost or ""),
                )
            )
        )
    if len(progress.workers) > len(shown):
        table.add_row(Text(f"and {len(progress.workers) - len(shown)} more", style="dim"))
    return table


def workers_line(progress: Progress) -> str:
    """Return how many workers have work, how busy all were so far, and which nodes lost trials."""
    busy = sum(worker.is_busy for worker in progress.workers)
    efficiency = progress.efficiency or 0.0
    line = f"{busy} of {len(progress.workers)} workers busy, efficiency {efficiency:.0%}"
    lost: dict[str, int] = {}
    for worker in progress.workers:
        if worker.lost:
            lost[worker.node or "a node that is gone"] = (
                lost.get(worker.node or "a node that is gone", 0) + worker.lost
            )
    if lost:
        line += ", lost " + ", ".join(f"{count} on {node}" for node, count in sorted(lost.items()))
    return line


def plain_line(progress: Progress) -> str:
    """Return the state of a search on one line."""
    parts = [f"[{progress.phase}]"]
    if progress.left_s is not None:
        parts.append(f"{duration(progress.left_s)} left")
    if progress.trials:
        parts.append(
            f"{progress.trials} trials, front {progress.front}, hypervolume {progress.hypervolume:.4f}"
        )
    if progress.failures:
        parts.append(f"failures: {failures(progress.failures)}")
    if progress.workers:
        parts.append(workers_line(progress))
    parts.append(progress.message)
    if progress.last and progress.last != progress.message:
        parts.append(progress.last)
    return " | ".join(parts)


def failures(counts: dict[str, int]) -> str:
    """Return failed trials by kind for people."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"


def duration(seconds: float) -> str:
    """Return a time for people, such as ``1h02m`` or ``4m05s``; below zero counts as zero."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{whole % 60:02d}s"
