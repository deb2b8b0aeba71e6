"""The words of the report page: its key facts, and how far its figures can be trusted."""

from __future__ import annotations

from html import escape

from autoprune.report.figures_view import HOW_MEASURED, not_measured
from autoprune.report.view import Shown, StudyView, duration, host_text, target_text
from autoprune.search.space_cut import cut_lines

# What counts as hardly any loss of capability.
_CLOSE = 0.01


def facts(view: StudyView) -> list[tuple[str, str, str]]:
    """Return the page's key facts as ``(name, value, note)``, plain text."""
    found: list[tuple[str, str, str]] = []
    dense = view.dense.measurement if view.dense is not None else None
    if dense is not None:
        before = dense.report or dense.search
        note = f"{dense.latency.latency_ms:.3f} ms, {dense.size_bytes / 1e6:.3f} MB"
        found.append((f"dense {before.name}", f"{before.value:.4f}", note))
        close = [
            s for s in view.shown if s.point.on_front and before.value - s.point.capability.value <= _CLOSE
        ]
        if close:
            fastest = min(close, key=lambda s: s.point.measurement.latency.ratio)
            measured = fastest.point.measurement
            note = f"{fastest.name} at {measured.latency.ratio:.3f} of the dense latency"
            found.append((f"fastest within {_CLOSE:g}", f"{1 / measured.latency.ratio:.2f}× faster", note))
            smallest = min(close, key=lambda s: s.point.measurement.size_ratio)
            ratio = smallest.point.measurement.size_ratio
            found.append(
                (
                    f"smallest within {_CLOSE:g}",
                    f"{1 / ratio:.2f}× smaller",
                    f"{smallest.name} at {ratio:.3f} of the file",
                )
            )
    failed = sum(r.state == "failed" for r in view.records)
    on_front = sum(s.point.on_front for s in view.shown)
    found.append(("points on the front", str(on_front), f"{len(view.records)} trials, {failed} failed"))
    found.append(("spent", duration(view.spent_s), f"budget {view.budget}" if view.budget else ""))
    return found


def how_to_read(view: StudyView) -> str:
    """Return the block that says what the figures mean and how far they hold, as HTML."""
    items = [
        (
            "Intervals",
            "Bars and brackets are 95 % intervals. Points marked as ties cannot be told apart by them.",
        ),
        ("Which split", _split(view)),
        ("Search against report split", _gap(view)),
        ("What the dense network has seen", _seen(view)),
        ("Run as asked", _executed(view)),
        (
            "Measured on",
            f"{host_text(view.host)}. Target: {target_text(view.settings)}. Latency on other machines differs.",
        ),
        ("Memory, cold start, throughput, energy", _figures(view)),
        *((("Search space", f"{'; '.join(lines)}."),) if (lines := cut_lines(view.notes)) else ()),
        ("Failures", _failures(view)),
        (
            "Budget",
            f"{duration(view.spent_s)} used"
            + (f" of {view.budget}" if view.budget else "")
            + ", everything counted.",
        ),
    ]
    body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in items)
    return f'<section class="card"><h2>How to read this</h2><dl>{body}</dl>{_gap_table(view)}</section>\n'


def _figures(view: StudyView) -> str:
    whole = [s.point.measurement.figures for s in view.shown if s.point.measurement.figures.dense is not None]
    if not whole:
        return "Of trials peak memory alone is measured; the rest is of the final front's points, which there are none of."
    return " ".join([f"{HOW_MEASURED[0].upper()}{HOW_MEASURED[1:]}.", *not_measured(*whole)])


def _split(view: StudyView) -> str:
    if view.has_final:
        return (
            "The front shows figures of the report split, which was read only after the search had ended. Grey trials of "
            "the search had a brief recovery and show the search split; the two should not be compared closely."
        )
    return (
        "All figures are of the search split, which the points were chosen by, so they are optimistic. The report split "
        "has not been read: the final phase has not run."
    )


def _finals(view: StudyView) -> list[Shown]:
    return [s for s in view.shown if s.point.measurement.report is not None]


def _difference(shown: Shown) -> float:
    measured = shown.point.measurement
    return 0.0 if measured.report is None else measured.search.value - measured.report.value


def _gap(view: StudyView) -> str:
    finals = _finals(view)
    chosen = [s for s in finals if s.role in ("front", "dominated")]
    if not finals:
        return "Not known yet: no point has been measured on the report split."
    found = [f"{name} {mean:+.4f}" for name, mean in _means(finals, chosen)]
    return (
        "Points chosen for a high figure tend to have been lucky (the winner's curse). Search minus report, on average: "
        + "; ".join(found)
        + ". The gap of each point is in the table below; the dense network's tells how far the splits differ anyway."
    )


def _means(finals: list[Shown], chosen: list[Shown]) -> list[tuple[str, float]]:
    groups = (
        ("points that the search chose", chosen),
        ("baselines", [s for s in finals if s.role == "baseline"]),
        ("dense network", [s for s in finals if s.role == "dense"]),
    )
    return [(name, sum(map(_difference, members)) / len(members)) for name, members in groups if members]


def _gap_table(view: StudyView) -> str:
    rows = []
    for shown in _finals(view):
        measured = shown.point.measurement
        if measured.report is not None:
            rows.append(
                f"<tr><td>{escape(shown.name)} <span class=sub>#{shown.record.number}</span></td>"
                f"<td>{measured.search.value:.4f}</td><td>{measured.report.value:.4f}</td>"
                f"<td>{_difference(shown):+.4f}</td></tr>"
            )
    if not rows:
        return ""
    head = "<tr><th>point</th><th>search split</th><th>report split</th><th>gap</th></tr>"
    return (
        "<details><summary>Gap of each point</summary><div class=scroll>"
        f'<table class="plain"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div></details>'
    )


def _seen(view: StudyView) -> str:
    seen = view.notes.get("search_split_seen")
    if seen == "yes":
        return (
            "The dense weights came from elsewhere and may have been trained on images of the search split. Figures on the "
            "search split are then too high for the dense network and all that follows from it; the report split's are not."
        )
    if seen == "no":
        return "The dense network was not trained on the search split."
    return "Not recorded whether the dense network was trained on images of the search split."


def _executed(view: StudyView) -> str:
    members = [s.point.measurement.executed for s in view.shown if s.point.on_front or s.role == "baseline"]
    layers = sum(each.layers for each in members)
    off: dict[str, list[str]] = {}
    for each in members:
        for layer in each.not_as_asked:
            off.setdefault(layer, []).append(each.reasons.get(layer, "it runs in float"))
    if not layers:
        return "No point was measured."
    done = layers - sum(map(len, off.values()))
    text = (
        f"{done} of {layers} layers ({done / layers:.1%}) of the front and the baselines run in the format that their recipe "
        "asks for, read back from what the runtime executes"
    )
    if not off:
        return text + "."
    names = sorted(off, key=lambda name: (-len(off[name]), name))
    told = "; ".join(f"{n}: {off[n][0]} (in {len(off[n])} of {len(members)} points)" for n in names[:20])
    more = f"; and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{text}. Not so: {told}{more}."


def _failures(view: StudyView) -> str:
    kinds = view.failures()
    if not kinds:
        return f"None of {len(view.records)} trials failed."
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"{sum(kinds.values())} of {len(view.records)} trials: {listed}. Failed trials are never on the front."
