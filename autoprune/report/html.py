"""The report page: one file that needs no network, with the interactive front and what to make of it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

from autoprune.errors import NoFeasiblePointError
from autoprune.report import page
from autoprune.report.course import course_block
from autoprune.report.figures_view import HEADINGS, figure_cells, present
from autoprune.report.guide import facts, how_to_read
from autoprune.report.plot import capability_range, latency_of, size_of, staircase
from autoprune.report.view import Shown, StudyView, group_rows, interval, recipe_summary, view_of
from autoprune.study.front import WORST_DROP, FrontPoint, pick_points, point_json
from autoprune.study.store import StudyStore

# A page with the rows of 10,000 trials has 34 MB, which browsers open slowly.
_MOST_HIDDEN = 500
_HEADINGS = (
    ("point", "text"), ("kind", "text"), ("accuracy", "number"), ("95 %", ""), ("latency, ms", "number"),
    ("× dense", "number"), ("95 % of it", ""), ("MB", "number"), ("× size", "number"), ("int8 layers", "number"),
    ("training steps", "number"), ("export", ""),
)  # fmt: skip


def report_page(store: StudyStore, view: StudyView | None = None) -> str:
    """Return ``report.html`` of a study as one text.

    Args:
        store: The study's record.
        view: What is shown of it, if that was gathered before.
    """
    from plotly.offline import get_plotlyjs

    view = view or view_of(store)
    fewer = nearest(view)
    left_out = len(view.shown) - len(fewer.shown)
    plotly = get_plotlyjs()
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in (plotly, page.SCRIPT))
    # The only scripts that may run are these two, by their content; nothing may be loaded or sent.
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    title = f"{view.name} · autoprune"
    return "".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{escape(title)}</title>\n<style>{page.STYLE}</style>\n</head>\n<body>\n<main>\n",
            _header(view),
            page.PLOTS,
            _chosen(),
            _table(fewer, left_out),
            course_block(view),
            how_to_read(view),
            "</main>\n",
            f'<script type="application/json" id="data">{script_json(page_data(fewer))}</script>\n',
            f"<script>{plotly}</script>\n<script>{page.SCRIPT}</script>\n</body>\n</html>\n",
        ]
    )


def nearest(view: StudyView, most: int = _MOST_HIDDEN) -> StudyView:
    """Return a study with all that its front is read by, and of the other points those that come nearest to it.

    Args:
        view: The study.
        most: Most points of roles that the page hides at first.
    """
    hidden = [s for s in view.shown if s.role in ("dominated", "trial")]
    if len(hidden) <= most:
        return view

    def cost(shown: Shown) -> float:
        measured = shown.point.measurement
        return measured.latency.ratio + measured.size_ratio - shown.point.capability.value / WORST_DROP

    kept = {s.record.number for s in sorted(hidden, key=cost)[:most]}
    kept |= {s.record.number for s in view.shown} - {s.record.number for s in hidden}
    return replace(view, shown=tuple(s for s in view.shown if s.record.number in kept))


def script_json(value: Any) -> str:
    """Return JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # Without `<` no tag and no comment can begin; the two separators end lines in old scripts.
    for sign, safe in (("<", "\\u003c"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(sign, safe)
    return text


def page_data(view: StudyView) -> dict[str, Any]:
    """Return what the page's script draws, ready for JSON."""
    split = "report" if view.has_final else "search"
    members = [s for s in view.shown if s.point.on_front]
    stairs = {
        name: staircase([(figures(s.point.measurement)[0], s.point.capability.value) for s in members])
        for name, figures in (("latency", latency_of), ("size", size_of))
    }
    return {
        "metric": f"{view.metric} on the {split} split"
        + (" (fraction)" if view.metric == "accuracy" else ""),
        "points": [_point(view, shown) for shown in view.shown],
        "stairs": stairs,
        "range": capability_range(view),
        "chosen": _first_choice(view),
        "search_split": split == "search",
    }


def _point(view: StudyView, shown: Shown) -> dict[str, Any]:
    record, measured = shown.record, shown.point.measurement
    score, latency = shown.point.capability, measured.latency
    summary = recipe_summary(record, view.groups)
    ties = ", ".join(map(str, shown.point.tie_with))
    lines = [
        f"<b>{escape(shown.name)}</b> (#{record.number}{', search split' if shown.provisional else ''})",
        f"{escape(score.name)} {score.value:.4f} [{interval(score.ci)}]",
        f"latency {latency.latency_ms:.3f} ms, × dense {latency.ratio:.3f} [{interval(latency.ratio_ci)}]",
        f"size {measured.size_bytes / 1e6:.3f} MB, × dense {measured.size_ratio:.3f}",
        *(escape(part) for part in summary.split("; ")),
        *([f"tie with {ties}"] if ties else []),
    ]
    rows = [] if record.recipe is None else group_rows(record.recipe, view.groups)
    return {
        "trial": record.number,
        "name": shown.name,
        # Plotly reads a few tags in its texts, so these are escaped; the page's own texts are set as text.
        "label": escape(shown.name),
        "role": shown.role,
        "provisional": shown.provisional,
        "value": score.value,
        "value_ci": score.ci,
        "latency": latency.ratio,
        "latency_ci": latency.ratio_ci,
        "size": measured.size_ratio,
        "hover": "<br>".join(lines),
        "summary": summary,
        "groups": [
            {"name": r.name, "ratio": r.ratio, "kept": r.kept, "size": r.size, "bits": r.bits} for r in rows
        ],
    }


def _first_choice(view: StudyView) -> int | None:
    """Return the trial that the page shows at first: the knee of what the search found."""
    points: list[FrontPoint] = [s.point for s in view.of("front")]
    if not points:
        return view.shown[0].record.number if view.shown else None
    try:
        return pick_points(points, knee=True, dense=view.dense, objectives=view.objectives)[0].record.number
    except NoFeasiblePointError:
        return points[0].record.number


def _header(view: StudyView) -> str:
    model, data = view.settings.get("model", "?"), view.settings.get("data") or "its usual data"
    cards = "".join(
        f'<div class="fact"><div class="fact-name">{escape(name)}</div><div class="fact-value">{escape(value)}</div>'
        f'<div class="fact-note">{escape(note)}</div></div>'
        for name, value, note in facts(view)
    )
    return (
        f"<header><h1>{escape(view.name)}</h1><p class=sub>{escape(str(model))} on {escape(str(data))}</p></header>\n"
        f'<section class="facts">{cards}</section>\n'
    )


def _chosen() -> str:
    return (
        '<section class="card" id="chosen"><h2>What the recipe does: <span id="chosen-name">no point yet</span></h2>'
        '<p class="sub" id="chosen-summary">Click a point or a row.</p><div id="groups"></div>'
        '<p class="key"><span class="swatch int8"></span>kept, int8 <span class="swatch float"></span>kept, float '
        '<span class="swatch gone"></span>removed</p></section>\n'
    )


def _table(view: StudyView, left_out: int = 0) -> str:
    figures = present(s.point.measurement.figures for s in view.shown)
    hidden = sum(s.role in ("dominated", "trial") for s in view.shown)
    told = f"also the {hidden} points not on the front"
    if left_out:
        told += f" that come nearest to it; {left_out} more are in the record and in the picture"
    headings = (*_HEADINGS[:-1], *((HEADINGS[name], "number") for name in figures), _HEADINGS[-1])
    heads = "".join(
        f'<th scope="col" data-sort="{kind}" aria-sort="none"><button type="button">{escape(_metric(name, view))}</button></th>'
        if kind
        else f'<th scope="col">{escape(name)}</th>'
        for name, kind in headings
    )
    rows = "\n".join(_row(view, shown, figures) for shown in view.shown)
    empty = '<p class="sub">No trial has been measured yet.</p>' if not view.shown else ""
    return (
        '<section class="card"><h2>Points</h2><div class="tools">'
        '<input id="filter" type="search" placeholder="Filter by any text" aria-label="Filter the rows">'
        f'<label><input id="all" type="checkbox"> {told}</label>'
        '<span id="count" class="sub"></span></div>'
        f'<div class="scroll"><table id="points"><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
        f"{empty}</section>\n"
    )


def _metric(name: str, view: StudyView) -> str:
    return view.metric if name == "accuracy" else name


def _row(view: StudyView, shown: Shown, figures: Sequence[str]) -> str:
    record, measured = shown.record, shown.point.measurement
    score, latency, executed = shown.point.capability, measured.latency, measured.executed
    own = figure_cells(measured.figures)
    content = point_json(view.paths, record)
    kind = "trial of the search" if shown.role == "trial" else shown.role
    tags = f'<span class="tag {shown.role}">{escape(kind)}</span>'
    if shown.role == "baseline" and shown.point.on_front:
        tags += ' <span class="tag front">front</span>'
    if measured.report is None and view.has_final:
        tags += ' <span class="tag">search split</span>'
    if shown.point.tie_with:
        tags += f' <span class="tag">tie with {escape(", ".join(map(str, shown.point.tie_with)))}</span>'
    cells = [
        (f"<b>{escape(shown.name)}</b> <span class=sub>#{record.number}</span>", shown.name),
        (tags, shown.role),
        (f"{score.value:.4f}", score.value),
        (interval(score.ci), None),
        (f"{latency.latency_ms:.3f}", latency.latency_ms),
        (f"{latency.ratio:.3f}", latency.ratio),
        (interval(latency.ratio_ci) + (" noisy" if latency.noisy else ""), None),
        (f"{measured.size_bytes / 1e6:.3f}", measured.size_bytes),
        (f"{measured.size_ratio:.3f}", measured.size_ratio),
        (f"{executed.int8_layers}/{executed.layers}", executed.int8_layers),
        (str(record.train_steps), record.train_steps),
        *((own[name] or "–", getattr(measured.figures, name) or -1) for name in figures),
        (_export(shown, str(content["export_command"]), content["artifact"] is not None), None),
    ]
    body = "".join(_cell(text, key) for text, key in cells)
    extra = ' class="extra"' if shown.role in ("dominated", "trial") else ""
    return f'<tr data-trial="{record.number}" tabindex="0"{extra}>{body}</tr>'


def _cell(text: str, key: object) -> str:
    attribute = "" if key is None else f' data-key="{escape(str(key))}"'
    return f"<td{attribute}>{text}</td>"


def _export(shown: Shown, command: str, kept: bool) -> str:
    if not (kept or shown.point.on_front or shown.role == "dense"):
        return '<span class="sub">artifact not kept</span>'
    return (
        f'<div class="command"><button type="button" class="copy" data-copy="{escape(command)}">Copy</button>'
        f"<code>{escape(command)}</code></div>"
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
