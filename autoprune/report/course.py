"""How a default search went: its profile, who proposed what, how far one rung tells of the next, and lineage."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from autoprune.report.view import StudyView
from autoprune.search.cost_model import CostModel
from autoprune.search.fidelity import Step, steps_between_rungs
from autoprune.search.profile import Profile, read_profile
from autoprune.study.records import TrialRecord
from autoprune.study.screens import Screen, read_screens


@dataclass(frozen=True)
class Course:
    """What is told of a search's course.

    Attributes:
        screens: Recipes that were screened.
        trained: Trials by training rung.
        steps: How each rung relates to the next one.
        to_final: How the last result before the final recovery relates to it, on the search split.
        overhead: Share of the search's time that went into anything but profile, screens and trials; None if it
            cannot be told.
        profile: What was measured first; None if the study has none.
        profile_failure: Why there is none; empty if it was not tried or did not fail.
    """

    screens: tuple[Screen, ...]
    trained: dict[int, list[TrialRecord]]
    steps: tuple[Step, ...]
    to_final: Step
    overhead: float | None
    profile: Profile | None
    profile_failure: str


def course_of(view: StudyView) -> Course | None:
    """Return the course of a study; None where a plain sampler searched."""
    if view.settings.get("sampler") != "auto":
        return None
    records = view.records
    trained: dict[int, list[TrialRecord]] = {}
    for record in records:
        if record.is_trained:
            trained.setdefault(record.rung, []).append(record)
    screens = tuple(read_screens(view.paths))
    rungs = max(trained, default=1) + 1
    return Course(
        screens=screens,
        trained=dict(sorted(trained.items())),
        steps=tuple(steps_between_rungs(records, rungs)),
        to_final=_to_final(records),
        overhead=overhead_of(records, screens),
        profile=read_profile(view.paths.profile),
        profile_failure=view.notes.get("profile_failure", ""),
    )


def _to_final(records: tuple[TrialRecord, ...]) -> Step:
    dense = next((r.measurement for r in records if r.origin == "dense" and r.measurement), None)
    best = dense.search.value if dense is not None else 0.0
    by_number = {r.number: r for r in records}
    before, after = [], []
    for record in records:
        parent = by_number.get(record.parent if record.parent is not None else -1)
        if record.fidelity != "final" or parent is None or not parent.is_trained:
            continue
        if record.measurement is not None and parent.measurement is not None:
            before.append(best - parent.measurement.search.value)
            after.append(best - record.measurement.search.value)
    return Step.of(before, after, best)


def overhead_of(records: Sequence[TrialRecord], screens: Sequence[Screen]) -> float | None:
    """Return what lies between the ends of screens and trials beyond their own seconds, as a share of these."""
    done = sorted(
        [(s.ended_s, s.duration_s) for s in screens]
        + [
            (r.ended_s, r.duration_s)
            for r in records
            if r.fidelity == "search"
            and r.ended_s > 0
            and r.repeat_of is None
            and r.rung > 0
            and not _is_free(r)
        ]
    )
    if len(done) < 10:
        return None
    busy_s = sum(duration for _, duration in done[1:])
    between_s = done[-1][0] - done[0][0] - busy_s
    return max(0.0, between_s) / busy_s if busy_s > 0 else None


def _is_free(record: TrialRecord) -> bool:
    """Return whether a trial is of the dense network or int8 alone, which come before the profile."""
    prunes = record.recipe is not None and record.recipe.prunes
    return record.origin in ("dense", "baseline") and not prunes


def course_lines(course: Course) -> list[tuple[str, str]]:
    """Return names and sentences that tell the course."""
    lines = [("Profile", _profile_text(course))]
    counts = []
    if course.screens:
        counts.append(f"{len(course.screens)} recipes screened (closed-form recovery, nothing exported)")
    counts += [f"{len(found)} trained to rung {rung}" for rung, found in course.trained.items()]
    lines.append(("Fidelity", (", ".join(counts) or "Nothing was screened or trained") + "."))
    relations = [
        f"{'the screen' if rung == 0 else f'rung {rung}'} to rung {rung + 1}: {_step_text(step)}"
        for rung, step in enumerate(course.steps)
    ]
    relations.append(f"last rung to final recovery: {_step_text(course.to_final)}")
    lines.append(("Rank correlation of what is lost", "; ".join(relations) + "."))
    arms = Counter(s.arm for s in course.screens)
    promoted = Counter(r.origin for found in course.trained.values() for r in found if r.rung == 1)
    told = [f"{arm} {arms[arm]} screened, {promoted[arm]} trained" for arm in sorted({*arms, *promoted})]
    lines.append(("Who proposed", ("; ".join(told) or "No recipe was proposed") + "."))
    if course.overhead is not None:
        text = f"{course.overhead:.2%} of the time of screens and trials went into deciding and recording."
        lines.append(("Engine overhead", text))
    return lines


def _profile_text(course: Course) -> str:
    profile = course.profile
    if course.profile_failure:
        return f"It could not be measured ({course.profile_failure}); TPE proposed, as in a study with --sampler tpe."
    if profile is None or len(profile.designs) < 1:
        return "No profile was kept with this study."
    measured = sum(cut.measured for cut in profile.cuts)
    costs = CostModel(profile.shapes, profile.designs)
    error = (
        ""
        if math.isnan(costs.latency_error)
        else f", latency to {costs.latency_error:.1%} (left-out networks)"
    )
    return (
        f"{profile.seconds:.0f} s: loss of {measured} choices measured and {len(profile.cuts) - measured} estimated on "
        f"{profile.examples} examples; {len(profile.designs)} networks timed. Size is predicted to "
        f"{costs.size_error:.2%} of the dense file{error}."
    )


def _step_text(step: Step) -> str:
    if math.isnan(step.correlation):
        return f"too few pairs ({step.pairs})"
    if math.isnan(step.seen_loss):
        return f"{step.correlation:+.2f} over {step.pairs} recipes"
    return f"{step.correlation:+.2f} over {step.pairs} recipes, {step.seen_loss:.0%} of the loss left"


def course_block(view: StudyView) -> str:
    """Return the course as a block of the report page; empty for plain samplers."""
    course = course_of(view)
    if course is None:
        return ""
    body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in course_lines(course))
    return f'<section class="card"><h2>How the search went</h2><dl>{body}</dl>{_lineage(view)}</section>\n'


def _lineage(view: StudyView) -> str:
    finals = [r for r in view.records if r.fidelity == "final" and r.recipe is not None and r.recipe.prunes]
    if not any(r.started_from is not None for r in finals):
        return ""
    rows = "".join(
        f"<tr><td>{r.number}</td><td>trial {r.parent}</td>"
        f"<td>{'its own trial' if r.started_from is None else f'the recovery of trial {r.started_from}'}</td>"
        f"<td>{r.train_steps}</td></tr>"
        for r in finals
    )
    head = "<tr><th>point</th><th>recipe of</th><th>cut from</th><th>steps in the line</th></tr>"
    return (
        "<details><summary>Lineage: which network each point was cut from</summary><div class=scroll>"
        f'<table class="plain"><thead>{head}</thead><tbody>{rows}</tbody></table></div></details>'
    )
