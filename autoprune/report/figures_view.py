"""Memory, cold start, throughput and energy as people read them: units, how they were measured, what is missing."""

from __future__ import annotations

from collections.abc import Iterable

from autoprune.measure.record import RUN_FIGURES, RunFigures

_SPOKEN = {
    "memory_bytes": "peak memory",
    "cold_start_ms": "cold start",
    "throughput_per_s": "throughput",
    "energy_mj": "energy",
}
HOW_MEASURED = (
    "memory, cold start, throughput and energy: in the session of the latency; memory is the peak that a fresh process "
    "adds, a cold start runs from opening the file to the first result (libraries are loaded before, the file is in "
    "the system's cache), throughput is that of the best batch, energy is all that the counter saw, idle power included"
)

HEADINGS = {
    "memory_bytes": "memory MB",
    "cold_start_ms": "start ms",
    "throughput_per_s": "per s",
    "energy_mj": "mJ",
}


def figure_rows(figures: RunFigures) -> list[tuple[str, str]]:
    """Return ``(name, value)`` of every figure with its unit; the value is empty where there is none."""
    cells = figure_cells(figures)
    batch, source = figures.throughput_batch, figures.energy_source
    return [
        ("peak memory that it added", cells["memory_bytes"] and f"{cells['memory_bytes']} MB"),
        ("cold start, median", cells["cold_start_ms"] and f"{cells['cold_start_ms']} ms"),
        (
            "throughput at the best batch",
            cells["throughput_per_s"] and f"{cells['throughput_per_s']} examples/s (batch {batch})",
        ),
        ("energy of one example", cells["energy_mj"] and f"{cells['energy_mj']} mJ ({source})"),
    ]


def figure_cells(figures: RunFigures) -> dict[str, str]:
    """Return the figures by name as text: megabytes (1e6 bytes), milliseconds, examples per second, millijoules."""
    memory, start, per_s, energy = (getattr(figures, name) for name in RUN_FIGURES)
    return {
        "memory_bytes": "" if memory is None else f"{memory / 1e6:.1f}",
        "cold_start_ms": "" if start is None else f"{start:.1f}",
        "throughput_per_s": "" if per_s is None else f"{per_s:.1f}",
        "energy_mj": "" if energy is None else f"{energy:.4g}",
    }


def present(figures: Iterable[RunFigures]) -> list[str]:
    """Return the names of the figures that any of these has, in their order."""
    each = list(figures)
    return [name for name in RUN_FIGURES if any(getattr(one, name) is not None for one in each)]


def not_measured(*figures: RunFigures) -> list[str]:
    """Return one sentence for each reason why figures are missing."""
    names: dict[str, list[str]] = {}
    for one in figures:
        for name in RUN_FIGURES:
            why = one.why(name)
            if why and _SPOKEN[name] not in names.setdefault(why, []):
                names[why].append(_SPOKEN[name])
    return [f"Not measured: {', '.join(each)} ({why})." for why, each in names.items()]
