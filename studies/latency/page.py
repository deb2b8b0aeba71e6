"""The page of the study of latency: its tables and its picture, from the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tables import markdown

from autoprune.measure.stats import indistinguishable, wilson_interval

if TYPE_CHECKING:
    from latency import Book

Line = dict[str, Any]


def cells(book: Book) -> dict[tuple[str, str, str], list[Line]]:
    """Return the lines by protocol, network and load."""
    found: dict[tuple[str, str, str], list[Line]] = {}
    for run, line in sorted(book.runs().items(), key=lambda item: item[0].number):
        if run.protocol != "reference":
            found.setdefault(
                (run.protocol, run.network, "load half-way" if run.burners else "quiet"), []
            ).append(line)
    return dict(
        sorted(
            found.items(),
            key=lambda item: (item[0][0] != "search", item[0][1] != "same", item[0][2] != "quiet"),
        )
    )


def reference(book: Book) -> Line | None:
    """Return what the long run found of the slower network."""
    return next((line for run, line in book.runs().items() if run.protocol == "reference"), None)


def counted(hits: list[bool]) -> str:
    """Return how many of how many, with the share's interval."""
    low, high = wilson_interval(sum(hits), len(hits))
    return f"{sum(hits)} of {len(hits)} ({low:.0%} to {high:.0%})"


def holds(line: Line, value: float) -> bool:
    """Return whether a run's interval holds a value."""
    return bool(line["interval"][0] <= value <= line["interval"][1])


def main_table(book: Book, least: dict[str, float]) -> pd.DataFrame:
    """Return the table of what was asked for and found."""
    truth = reference(book)
    rows = []
    for (protocol, network, load), lines in cells(book).items():
        same = network == "same"
        hits = [holds(line, 1.0) if same else not holds(line, 1.0) and line["ratio"] > 1.0 for line in lines]
        bar = least["holds" if same else "finds"]
        errors = (
            [abs(np.log(line["ratio"] / (1.0 if same else truth["ratio"]))) for line in lines]
            if same or truth
            else []
        )
        rows.append({
            "protocol": protocol,
            "candidate": "the dense file itself" if same else "with more work",
            "machine": load,
            "asked": "interval holds 1" if same else "interval lies above 1",
            "runs": counted(hits),
            "bar": f"{bar:.0%}",
            "met": "yes" if np.mean(hits) >= bar else "**no**",
            "interval holds the truth": "" if same or truth is None else counted([holds(line, truth["ratio"]) for line in lines]),
            "half width, median": f"{100 * np.median([np.log(line['interval'][1] / line['interval'][0]) / 2 for line in lines]):.1f} %",
            "error, median": f"{100 * np.median(errors):.1f} %" if errors else "",
            "noisy": sum(line["noisy"] for line in lines),
        })  # fmt: skip
    return pd.DataFrame(rows)


def ties_table(book: Book) -> pd.DataFrame:
    """Return how often two measurements are told as ties: of equal files, and of one that is slower."""
    found = cells(book)
    rows = []
    for (protocol, network, load), lines in found.items():
        if network != "same" or (protocol, "slower", load) not in found:
            continue
        others = found[protocol, "slower", load]
        equal = [
            indistinguishable(tuple(a["interval"]), tuple(b["interval"]))
            for a, b in zip(lines[::2], lines[1::2], strict=False)
        ]
        apart = [
            indistinguishable(tuple(a["interval"]), tuple(b["interval"]))
            for a, b in zip(lines, others, strict=False)
        ]
        row = {"protocol": protocol, "machine": load, "equal ones are ties": counted(equal) if equal else ""}
        rows.append({**row, "those that differ are ties": counted(apart)})
    return pd.DataFrame(rows)


def load_lines(book: Book) -> list[str]:
    """Return when the load began, as shares of the time that a quiet run takes."""
    lines = []
    for protocol in ("search", "final"):
        loaded = [line for run, line in book.runs().items() if run.protocol == protocol and run.burners]
        shares = [book.timed_before_load(line) for line in loaded]
        if shares:
            low, middle, high = np.percentile(shares, [5, 50, 95])
            lines.append(f"- load in runs by the protocol *{protocol}*: began when {middle:.0%} of a quiet run's time had been timed "
                         f"(5 to 95 % of runs: {low:.0%} to {high:.0%}); runs in which it began before a quarter of it or after three quarters are repeated")  # fmt: skip
    return lines


def draw(book: Book, place: Path) -> None:
    """Write the picture of all intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {key: lines for key, lines in cells(book).items() if key[0] == "search"}
    truth = reference(book)
    figure, axes = pyplot.subplots(1, len(found), figsize=(3.2 * len(found), 3.6), sharey=True, squeeze=False)
    for axis, ((_, network, load), lines) in zip(axes[0], found.items(), strict=True):
        ordered = sorted(lines, key=lambda line: line["ratio"])
        for place_x, line in enumerate(ordered):
            wrong = not holds(line, 1.0) if network == "same" else holds(line, 1.0)
            axis.plot(
                [place_x] * 2, line["interval"], color="tab:red" if wrong else "tab:blue", linewidth=1.0
            )
        axis.plot(range(len(ordered)), [line["ratio"] for line in ordered], ".", color="black", markersize=2)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        if network == "slower" and truth:
            axis.axhline(truth["ratio"], color="tab:green", linewidth=0.8, linestyle="--")
        axis.set_title(f"{'same file' if network == 'same' else 'more work'}, {load}", fontsize=9)
        axis.set_xlabel("runs, by ratio", fontsize=8)
    middles = [end for lines in found.values() for line in lines for end in line["interval"]]
    low, high = np.percentile(middles, [2, 98])
    axes[0][0].set_ylim(min(low, 0.95) - 0.02, max(high, 1.1) + 0.02)
    axes[0][0].set_ylabel("ratio to the dense file, 95 % interval", fontsize=8)
    figure.tight_layout()
    figure.savefig(place, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def truth_line(book: Book) -> str:
    """Return what the true ratio is."""
    truth = reference(book)
    if truth is None:
        return "The long run that tells the true ratio of the candidate with more work is missing."
    pairs = sum(map(len, truth["ratios"]))
    low, high = truth["interval"]
    return (f"The candidate with more work truly takes {truth['ratio']:.4f} times as long ({low:.4f} to {high:.4f}), by "
            f"{pairs:,} pairs in {len(truth['ratios'])} processes.")  # fmt: skip


def write(book: Book, given: dict[str, Any], folder: Path) -> None:
    """Write README.md and intervals.png."""
    own = given["network"]
    draw(book, folder / "intervals.png")
    hosts = book.hosts()
    protocols = hosts[-1]["protocols"]
    described = [
        f"- *{name}*: {p['processes']} process{'es' if p['processes'] > 1 else ''} × {p['sessions']} session{'s' if p['sessions'] > 1 else ''} × "
        f"{p['rounds']} rounds, blocks of {1e3 * p['block_s']:g} ms"
        for name, p in protocols.items()
    ]  # fmt: skip
    seconds = {
        name: [line["seconds"] for key, lines in cells(book).items() if key[0] == name for line in lines]
        for name in protocols
    }
    took = ", ".join(f"{np.median(each):.1f} s by *{name}*" for name, each in seconds.items() if each)
    host = hosts[-1]["host"]
    text = [
        "# How far latency can be trusted",
        "",
        "Generated by `python studies/latency/latency.py page` from `runs.jsonl`, which `python studies/latency/latency.py run`",
        "writes; `latency.yaml` says what is run. Every run is one call of `measure_latency`, as a trial (*search*) or the final",
        f"front (*final*) makes it. The dense network is a chain of {own['convolutions']} convolutions; the candidate is the very same file, or a",
        f"chain with {own['more']} more of them. Load is one busy process or two, in turn, which begin when half of a run has been timed.",
        truth_line(book),
        "",
        markdown(main_table(book, given["least"])),
        "",
        "Two points are told as ties where their intervals overlap. Of pairs of runs:",
        "",
        markdown(ties_table(book)),
        "",
        "![intervals](intervals.png)",
        "",
        "Red intervals miss 1 where the files are the same, and hold it where one has more work; the green line is the true ratio.",
        "",
        *described,
        *load_lines(book),
        f"- one run took {took} (median)",
        f"- {host['processor']}, {host['usable_cores']} cores, {host['system']}; commit {hosts[-1]['commit']}; onnxruntime {host['versions']['onnxruntime']}",
        "",
    ]
    (folder / "README.md").write_text("\n".join(text), encoding="utf-8")
    print(json.dumps({"runs": len(book.runs()), "page": str(folder / "README.md")}))
