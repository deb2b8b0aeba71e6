"""Robustness as people read it: accuracy on corrupted images and of the worst class, against the dense network's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprune.measure.record import CorruptedScore, Robustness
from autoprune.report.table import write_csv
from autoprune.study.artifacts import write_bytes_atomic
from autoprune.study.records import TrialRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROBUSTNESS_COLUMNS = ("trial", "what", "accuracy", "worst class", "corrupted")
_DENSE, _MOST_IN_LEGEND = "black", 12


def robustness_json(result: Robustness, dense: Robustness | None) -> dict[str, Any]:
    """Return one network's figures, and what each lost against the dense network's.

    Args:
        result: What was measured.
        dense: The same of the dense network; None leaves the drops out.
    """
    found = {
        **_figures(result),
        "worst_class_is": result.clean.worst_class.model_dump(mode="json"),
        "accuracy_ci": result.clean.accuracy.ci,
        "examples": result.clean.accuracy.examples,
        "seed": result.seed,
    }
    if dense is not None:
        found["drop"] = _difference(_figures(dense), _figures(result))
    return found


def _figures(result: Robustness) -> dict[str, Any]:
    return {
        "accuracy": result.clean.accuracy.value,
        "worst_class": result.clean.worst_class.value,
        "mean_corrupted": result.mean(),
        "corruptions": {
            name: {str(s.severity): s.accuracy.value for s in result.corrupted if s.corruption == name}
            for name in result.corruptions
        },
    }


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``before - now`` of numbers in mappings of one shape."""
    return {
        name: _difference(before[name], value) if isinstance(value, Mapping) else before[name] - value
        for name, value in now.items()
    }


def robustness_table(
    records: Sequence[TrialRecord], results: Mapping[int, Robustness], dense: Robustness | None
) -> tuple[list[str], list[list[str]]]:
    """Return headings, and for each trial its figures with what they lost against the dense network in brackets.

    Args:
        records: Trials to show, in their order.
        results: What was measured, by the trial's number; others show that they have no artifact.
        dense: The dense network's.
    """
    names = dict.fromkeys(name for result in results.values() for name in result.corruptions)
    rows = []
    for record in records:
        result = results.get(record.number)
        what = record.label or record.origin
        if result is None:
            rows.append([str(record.number), f"{what} (no artifact)", *[""] * (3 + len(names))])
            continue
        base = dense or result
        own, worst = result.clean.accuracy.value, result.clean.worst_class
        rows.append(
            [
                str(record.number),
                what,
                _cell(own, base.clean.accuracy.value),
                f"{_cell(worst.value, base.clean.worst_class.value)} {worst.name} of {worst.examples}",
                _cell(result.mean(), base.mean()),
                *(_cell(result.mean(name), base.mean(name)) for name in names),
            ]
        )
    return [*ROBUSTNESS_COLUMNS, *names], rows


def _cell(value: float, dense: float) -> str:
    return f"{value:.4f} ({value - dense:+.4f})"


def write_robustness_csv(results: Mapping[int, Robustness], dense: Robustness | None, path: Path) -> None:
    """Write a row for each trial, corruption and severity.

    Raises:
        StorageError: If the file cannot be written.
    """
    import pandas as pd

    rows = []
    for number, result in results.items():
        before = {} if dense is None else {(s.corruption, s.severity): s for s in _all(dense)}
        for score in _all(result):
            base = before.get((score.corruption, score.severity))
            rows.append(
                {
                    "trial": number,
                    "corruption": score.corruption,
                    "severity": score.severity,
                    "accuracy": score.accuracy.value,
                    "accuracy_low": score.accuracy.ci[0],
                    "accuracy_high": score.accuracy.ci[1],
                    "accuracy_drop": None if base is None else base.accuracy.value - score.accuracy.value,
                    "worst_class": score.worst_class.name,
                    "worst_class_accuracy": score.worst_class.value,
                    "worst_class_low": score.worst_class.ci[0],
                    "worst_class_high": score.worst_class.ci[1],
                    "worst_class_examples": score.worst_class.examples,
                    "worst_class_drop": None
                    if base is None
                    else base.worst_class.value - score.worst_class.value,
                    "examples": score.accuracy.examples,
                }
            )
    write_csv(pd.DataFrame(rows), path)


def _all(result: Robustness) -> tuple[CorruptedScore, ...]:
    return (result.clean, *result.corrupted)


def robustness_figure(results: Mapping[int, Robustness], dense: int | None) -> Figure:
    """Return one panel for each corruption, accuracy over severity, a line for each trial; and one of worst classes.

    Args:
        results: What was measured, by the trial's number.
        dense: Number of the dense network's trial, which is drawn black.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for result in results.values() for name in result.corruptions))
    figure = Figure(figsize=(3.0 * (len(names) + 1), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(names) + 1, sharey=True, squeeze=False)[0]
    others = [number for number in results if number != dense]
    shades = colormaps["viridis"].resampled(max(2, len(others)))
    colours = {number: shades(place) for place, number in enumerate(others)} | {dense: _DENSE}
    for number, result in results.items():
        label = "dense" if number == dense else f"trial {number}"
        style = {"color": colours[number], "linewidth": 2.0 if number == dense else 1.1, "marker": "o"}
        for axis, name in zip(axes, names, strict=False):
            scores = [result.clean, *(s for s in result.corrupted if s.corruption == name)]
            axis.plot([s.severity for s in scores], [s.accuracy.value for s in scores], label=label, **style)
        worst = result.clean.worst_class
        low, high = worst.value - worst.ci[0], worst.ci[1] - worst.value
        axes[-1].errorbar(
            [result.clean.accuracy.value], [worst.value], yerr=[[max(0.0, low)], [max(0.0, high)]], **style
        )
    for axis, name in zip(axes, names, strict=False):
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xlabel("severity (0: as it is)", fontsize=8)
    axes[-1].set_title("worst class, images as they are", fontsize=9)
    axes[-1].set_xlabel("accuracy of all classes", fontsize=8)
    axes[0].set_ylabel("top-1 accuracy", fontsize=8)
    if len(results) <= _MOST_IN_LEGEND:
        axes[0].legend(fontsize=6.5)
    return figure


def write_robustness_png(results: Mapping[int, Robustness], dense: int | None, path: Path) -> None:
    """Write :func:`robustness_figure` as PNG in one step."""
    buffer = BytesIO()
    robustness_figure(results, dense).savefig(buffer, format="png")
    write_bytes_atomic(path, buffer.getvalue())
