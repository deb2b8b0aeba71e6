"""card.md: what one artifact is, what it reaches, and how both came about."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from autoprune.measure.record import Capability, GpuState, RunFigures
from autoprune.report.figures_view import HOW_MEASURED, figure_rows, not_measured
from autoprune.report.view import (
    RANKED,
    StudyView,
    duration,
    group_rows,
    host_text,
    interval,
    recipe_summary,
    target_text,
    view_of,
)
from autoprune.space.quantization import INTEGER_BITS, Quantization
from autoprune.space.recipe import Recipe
from autoprune.space.schedule import SETTINGS_OF
from autoprune.study.records import TrialRecord
from autoprune.study.store import StudyStore
from autoprune.target import recorded_target

# No recipe has these bits: int8 layers get them where kernels add in 16 bits.
_NARROW = "7"
_WHY_NARROW = (
    "Weights of layers in int8 have 7 of their 8 bits: on the processor that this was made on, the target's int8 "
    "kernels add products in 16 bits, which wider weights exceed. The file is right on other processors too."
)


def card_text(store: StudyStore, record: TrialRecord) -> str:
    """Return the card of one measured trial, ``card.md`` beside its artifact.

    Args:
        store: The study's record.
        record: The trial.

    Raises:
        ValueError: If the trial was not measured.
    """
    view = view_of(store)
    sections = [
        _head(view, record),
        _figures(view, record),
        _method(view, record),
        _recipe(view, record),
        _commands(view, record),
    ]
    return "\n\n".join(sections) + "\n"


def _head(view: StudyView, record: TrialRecord) -> str:
    model, data = _cell(view.settings.get("model", "?")), _cell(view.settings.get("data") or "its usual data")
    label = f" ({_cell(record.label)})" if record.label else ""
    return (
        f"# {model}, compressed by autoprune\n\n"
        f"Trial {record.number}{label} of study `{view.name}`: {model} on {data}, "
        f"{_cell(recipe_summary(record, view.groups))}."
    )


def _figures(view: StudyView, record: TrialRecord) -> str:
    measured = record.measurement
    if measured is None:
        raise ValueError(f"trial {record.number} was not measured")
    before = view.dense.measurement if view.dense is not None else None
    rows = [("", "this artifact", "95 % interval", "dense")]
    if measured.report is not None:
        rows.append(_capability("report", measured.report, before.report if before else None))
    rows.append(_capability("search", measured.search, before.search if before else None))
    latency, executed = measured.latency, measured.executed
    rows.append(
        ("latency of one batch, median", f"{latency.latency_ms:.3f} ms", "", f"{latency.dense_ms:.3f} ms")
    )
    if latency.latency_p95_ms is not None:
        rows.append(("latency, 95th percentile", f"{latency.latency_p95_ms:.3f} ms", "", ""))
    if latency.gpu is not None:
        rows.append(("GPU while it was measured", _gpu(latency.gpu), "", ""))
    rows.append(("latency, share of dense", f"{latency.ratio:.3f}", interval(latency.ratio_ci), "1"))
    rows.append(("model file", _size(measured.size_bytes), "", _size(before.size_bytes) if before else ""))
    rows.append(("model file, share of dense", f"{measured.size_ratio:.3f}", "", "1"))
    rows.append(("parameters", f"{measured.params:,}", "", f"{before.params:,}" if before else ""))
    rows.append(
        (
            "multiply-accumulates of one example",
            f"{measured.macs:,}",
            "",
            f"{before.macs:,}" if before else "",
        )
    )
    # Studies of earlier versions have the dense network's memory in its own trial.
    dense = measured.figures.dense or (before.figures if before else RunFigures())
    rows += [
        (name, own, "", other)
        for (name, own), (_, other) in zip(figure_rows(measured.figures), figure_rows(dense), strict=True)
        if own
    ]
    rows.append(("layers that run in int8", f"{executed.int8_layers} of {executed.layers}", "", ""))
    if executed.ran:
        ran = ", ".join(f"{count} in {_cell(kind)}" for kind, count in executed.ran.items())
        rows.append(("layers by what they run in", ran, "", ""))
    rows.append(("layers that run as asked", f"{executed.as_asked:.1%}", "", ""))
    for bits, layers in sorted(executed.stored_layers.items()):
        rows.append((f"layers whose weights have {_cell(bits)} bits", str(layers), "", ""))
    rows.append(
        ("difference from the network's outputs", f"{measured.parity_error:.2g} of the largest", "", "")
    )
    notes = []
    if latency.gpu is not None and latency.gpu.throttled:
        notes.append(f"The GPU was throttled while latency was measured: {', '.join(latency.gpu.throttled)}.")
    elif latency.noisy:
        notes.append("The latency was noisy: its spread stayed above the protocol's limit after all repeats.")
    if executed.not_as_asked:
        told = (
            f"`{_code(n)}`: {_cell(executed.reasons.get(n, 'it runs in float'))}"
            for n in executed.not_as_asked
        )
        notes.append("Not run in the format that the recipe asks for: " + "; ".join(told) + ".")
    notes += [_WHY_NARROW] if _NARROW in executed.stored_layers else []
    notes += map(_cell, not_measured(measured.figures))
    if measured.report is None:
        notes.append(
            "Not measured on the report split: its figure on the search split is what it was chosen by."
        )
    if view.notes.get("search_split_seen") == "yes":
        notes.append(
            "The dense weights came from elsewhere and may have been trained on images of the search split."
        )
    return "## Figures\n\n" + _table(rows) + "".join(f"\n\n{note}" for note in notes)


def _capability(split: str, own: Capability, dense: Capability | None) -> tuple[str, str, str, str]:
    before = "" if dense is None else f"{dense.value:.4f}"
    name = f"{_cell(own.name)}, {split} split, {own.examples} examples"
    return name, f"{own.value:.4f}", interval(own.ci, 4), before


def _method(view: StudyView, record: TrialRecord) -> str:
    measured = record.measurement
    mixed = measured is not None and 0 < measured.executed.int8_layers < measured.executed.layers
    return "\n".join(
        [
            "## How it was measured",
            "",
            f"- target: {_cell(target_text(view.settings))}",
            f"- host: {_cell(host_text(view.host))}",
            "- latency: this artifact and the dense one interleaved in one process; the ratio is the median over"
            " sessions of pairs, its interval by the sign test",
            f"- to open the file elsewhere: `{recorded_target(view.settings).facts.opens}`; it takes images in float32",
            *([f"- {HOW_MEASURED}"] if measured is not None and measured.figures.dense else []),
            *_session_lines(view.settings, mixed),
            "- capability: the exported file run in the target's runtime, not the network that it was made from",
            f"- study: {len(view.records)} trials in {duration(view.spent_s)}, seed {view.settings.get('seed', '?')}",
        ]
    )


def _session_lines(settings: Mapping[str, Any], mixed: bool) -> list[str]:
    """Say how a session has to be opened; for onnxruntime where float layers are among int8 ones."""
    from autoprune.deploy.session import opening  # loads the runtime

    target = recorded_target(settings)
    if not target.facts.installed or (target.runtime == "onnxruntime" and not mixed):
        return []
    entries = ", ".join(f"`{key}` = `{value}`" for key, value in opening(target).items())
    why = "left to itself the runtime computes otherwise, with other figures"
    if target.runtime == "onnxruntime":
        why = "without it onnxruntime runs the float layers between int8 ones in int8 as well"
    return [f"- session: opened with {entries}; {why}"]


def _recipe(view: StudyView, record: TrialRecord) -> str:
    recipe = record.recipe
    if recipe is None:
        return "## Recipe\n\nNone was recorded."
    rows = [("group", "asked to remove", "kept", "bits")]
    for row in group_rows(recipe, view.groups):
        kept = "" if row.kept is None else f"{row.kept} of {row.size}"
        rows.append((f"`{_code(row.name)}`", f"{row.ratio:.0%}", kept, str(row.bits)))
    recovery = recipe.recovery
    steps = [
        name
        for name, on in (("least squares", recovery.least_squares), ("BatchNorm", recovery.batchnorm))
        if on
    ]
    criteria = ", ".join(f"{value} for {kind}" for kind, value in sorted(recipe.criterion.items()))
    return (
        f"## Recipe\n\n{_table(rows)}\n\nRanked {RANKED[recipe.ranking]}by {_cell(criteria)}; "
        f"counts in steps of {recipe.width}. Recovery: {', '.join(steps) or 'nothing in closed form'}, "
        f"then {record.train_steps} gradient steps "
        f"(learning rate {recovery.learning_rate:g}, {recovery.schedule}, distillation {recovery.distill:g})."
        f"{_scheduled(recipe)}"
        + (f"\n\n{_masks(recipe, record)}" if recipe.masks else "")
        + _integers(recipe)
    )


def _integers(recipe: Recipe) -> str:
    """Say how weights became integers, where that is not as by default."""
    widths = {choice.bits for choice in recipe.groups.values()}
    integers = min(widths, default=32) <= INTEGER_BITS
    how = recipe.quantization.of_weights(integers=integers, halves=16 in widths)
    if how == Quantization():
        return ""
    halves = [f"16 bits are {how.half}"] if how.half != "float16" else []
    if not integers:
        return f"\n\nWeights: {', '.join(halves)}."
    parts = [f"scales by {how.scale}", f"rounding {how.rounding}"]
    parts += [f"blocks of {how.block_size} weights"] if how.block_size is not None else []
    parts += ["biases corrected"] if how.bias_correction else []
    parts += [f"channels rescaled first ({_cell(how.equalize)})"] if how.equalize != "none" else []
    parts += (
        ["ranges of linear layers' inputs found at each inference"] if how.activations == "dynamic" else []
    )
    parts += ["linear layers in fp8"] if how.activations == "fp8" else []
    parts += halves
    parts += (
        [f"the last {how.aware:.0%} of the steps trained with integers"] if recipe.trains_integers else []
    )
    return f"\n\nIntegers: {', '.join(parts)}."


def _masks(recipe: Recipe, record: TrialRecord) -> str:
    """Say which single weights are zero, and what that is worth."""
    ran = record.measurement.executed.ran if record.measurement is not None else {}
    skipped = any(word.startswith("2:4") for word in ran)
    worth = (
        "stored packed in the model file; layers with two zeros in every four run in kernels that skip them"
        if skipped
        else "stored packed in the model file and run dense: they make it smaller, not faster"
    )
    groups: dict[float, list[str]] = {}
    for name, choice in recipe.groups.items():
        if choice.sparsity > 0:
            groups.setdefault(choice.sparsity, []).append(f"`{_code(name)}`")
    shares = "; ".join(f"{share:.0%} of {', '.join(names)}" for share, names in sorted(groups.items()))
    mask = recipe.mask
    return (
        f"Single weights masked (pattern {mask.pattern}, allocation {mask.allocation}, by {mask.criterion}): {shares}. "
        f"Masked weights are {worth}."
    )


def _scheduled(recipe: Recipe) -> str:
    schedule = recipe.schedule
    if schedule.kind == "one_shot" or not recipe.prunes:
        return ""
    values = ", ".join(f"{name} {getattr(schedule, name):g}" for name in SETTINGS_OF[schedule.kind])
    return f" Channels were removed by the schedule {_cell(schedule.kind)} ({_cell(values)})."


def _commands(view: StudyView, record: TrialRecord) -> str:
    settings = "\n".join(f"{name}: {json.dumps(value)}" for name, value in view.settings.items())
    budget = f" --budget {shlex.quote(view.budget)}" if view.budget else ""
    if view.settings.get("data") == "given":
        made = "The model and data were given to `autoprune.search` as objects, with these settings:"
    else:
        made = f"Made by `autoprune search -c settings.yaml{budget}`, where `settings.yaml` holds:"
    name = shlex.quote(view.name)
    return (
        f"## Commands\n\n{made}\n\n```yaml\n{settings}\n```\n\n"
        f"```sh\nautoprune export {name} --trial {record.number} --to DIR   # writes this folder\n"
        "autoprune measure DIR                 # measures it afresh\n```"
    )


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|---|---|---|", *lines[1:]])


def _gpu(state: GpuState) -> str:
    clocks = [
        f"{low}" if low == high else f"{low} to {high}" for low, high in (state.sm_mhz, state.memory_mhz)
    ]
    return f"{clocks[0]} MHz, memory {clocks[1]} MHz, {state.temperature_c} °C"


def _size(count: int) -> str:
    return f"{count / 1e6:.3f} MB"


def _code(text: str) -> str:
    return text.replace("`", "'").replace("|", "\\|").replace("\n", " ")


def _cell(value: object) -> str:
    text = " ".join(str(value).split())
    for sign in "\\|*_`[]":
        text = text.replace(sign, "\\" + sign)
    return text.replace("&", "&amp;").replace("<", "&lt;")
