"""StudyView: what all reports show of a study, gathered once, and the words that they share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import ValidationError

from autoprune.naming import StudyPaths
from autoprune.space.groups import Groups, kept_count
from autoprune.space.quantization import INTEGER_BITS
from autoprune.space.recipe import Recipe
from autoprune.study.env import read_environment
from autoprune.study.front import FrontPoint, all_points, dense_record
from autoprune.study.records import TrialRecord
from autoprune.study.store import StudyStore

Role = Literal["dense", "front", "baseline", "dominated", "trial"]
RANKED = {"group": "", "global": "across all groups ", "alike": "across groups that are alike "}


@dataclass(frozen=True)
class Shown:
    """One point as reports show it.

    Attributes:
        point: The point.
        role: ``dense``, ``front``, ``baseline``, ``dominated`` or, once final trials exist, ``trial`` for what only
            has the search's brief recovery.
        name: Short name for people.
        provisional: Whether its figures are of search fidelity while the front's are final.
    """

    point: FrontPoint
    role: Role
    name: str
    provisional: bool

    @property
    def record(self) -> TrialRecord:
        """The trial."""
        return self.point.record


@dataclass(frozen=True)
class StudyView:
    """A study as its reports see it.

    Attributes:
        paths: The study's paths.
        shown: Every measured point but what a final measurement replaced of the dense network and the baselines;
            the front first, the most capable first.
        dense: The dense network's trial, if measured.
        records: Every trial, failed ones included.
        groups: Groups of the model, if the study knows them.
        notes: Notes of the study.
        settings: Its settings.
        environment: One entry for each run; empty if not recorded.
        spent_s: Seconds used by all runs.
    """

    paths: StudyPaths
    shown: tuple[Shown, ...]
    dense: TrialRecord | None
    records: tuple[TrialRecord, ...]
    groups: Groups | None
    notes: dict[str, str]
    settings: dict[str, Any]
    environment: list[dict[str, Any]]
    spent_s: float

    @property
    def name(self) -> str:
        """The study's name."""
        return self.paths.name

    @property
    def objectives(self) -> tuple[str, ...]:
        """What the front is of; all three where not recorded."""
        return tuple(self.settings.get("objectives") or ("accuracy", "latency", "size"))

    @cached_property
    def has_final(self) -> bool:
        """Whether the front's figures come from the final measurement, on the report split."""
        return any(r.fidelity == "final" and r.state == "complete" for r in self.records)

    @property
    def metric(self) -> str:
        """Name of the capability."""
        return self.shown[0].point.capability.name if self.shown else "accuracy"

    @property
    def host(self) -> dict[str, Any]:
        """The machine of the latest run; empty if not recorded."""
        last = self.environment[-1] if self.environment else {}
        host = last.get("host") if isinstance(last, dict) else None
        return host if isinstance(host, dict) else {}

    @property
    def budget(self) -> str:
        """The budget of the latest run; empty if not recorded."""
        last = self.environment[-1] if self.environment else {}
        settings = last.get("settings") if isinstance(last, dict) else None
        return str(settings.get("budget", "")) if isinstance(settings, dict) else ""

    def of(self, role: Role) -> list[Shown]:
        """Return the points of one role."""
        return [shown for shown in self.shown if shown.role == role]

    def failures(self) -> dict[str, int]:
        """Return the number of failed trials by kind, and of failed final recoveries as ``final: kind``.

        Of a further target the points that failed there alone are in it as ``there: kind``.
        """
        kinds = Counter(r.failure_kind or "unknown" for r in self.records if r.state == "failed")
        final = (text for key, text in self.notes.items() if key.startswith("final_failure:") and text)
        kinds.update(f"final: {text.partition(':')[0]}" for text in final)
        there = (
            text
            for key, text in self.notes.items()
            if key.startswith("target_failure:")
            and key.partition(":")[2].partition(":")[2] == self.paths.target
        )
        kinds.update(f"there: {text.partition(':')[0]}" for text in there if text)
        return dict(sorted(kinds.items()))


def view_of(store: StudyStore) -> StudyView:
    """Gather what reports show of a study."""
    records = store.records()
    dense = dense_record(records)
    notes = store.notes()
    continued = {r.parent for r in records if r.fidelity == "final" and r.state == "complete"}
    shown = []
    for point in all_points(store):
        record = point.record
        if point.baseline and record.number in continued:
            continue
        shown.append(
            Shown(point, _role(point, dense, bool(continued)), _name(record), _early(record, continued))
        )
    order = {"dense": 0, "front": 1, "baseline": 2, "dominated": 3, "trial": 4}
    shown.sort(key=lambda s: (order[s.role], -s.point.capability.value, s.record.number))
    return StudyView(
        paths=store.paths,
        shown=tuple(shown),
        dense=dense,
        records=tuple(records),
        groups=_groups(notes),
        notes=notes,
        settings=store.settings(),
        environment=[run for run in read_environment(store.paths) if isinstance(run, dict)],
        spent_s=store.spent_s,
    )


def _early(record: TrialRecord, continued: set[int | None]) -> bool:
    return bool(continued) and record.fidelity == "search"


def _role(point: FrontPoint, dense: TrialRecord | None, finals: bool) -> Role:
    if dense is not None and point.record.number == dense.number:
        return "dense"
    if point.baseline:
        return "baseline"
    if finals and point.record.fidelity == "search":
        return "trial"
    return "front" if point.on_front else "dominated"


def _name(record: TrialRecord) -> str:
    return record.label or f"trial {record.number}"


def _groups(notes: dict[str, str]) -> Groups | None:
    try:
        return Groups.model_validate_json(notes["groups"])
    except (KeyError, ValidationError):
        return None


@dataclass(frozen=True)
class GroupRow:
    """What a recipe does to one group.

    Attributes:
        name: The group.
        ratio: Share that the recipe asks to remove; 1 for a group that goes with a block.
        kept: Units that stay; None where the group's size is unknown.
        size: Units of the dense network; None where unknown.
        bits: 8 or 32.
    """

    name: str
    ratio: float
    kept: int | None
    size: int | None
    bits: int


def group_rows(recipe: Recipe, groups: Groups | None) -> list[GroupRow]:
    """Return one row for each group, in the model's order where the groups are known."""
    if groups is None:
        return [GroupRow(name, c.ratio, None, None, c.bits) for name, c in sorted(recipe.groups.items())]
    gone = groups.removed_blocks(recipe.kept_counts(groups))
    left = {group.name for group in groups.without(gone).groups}
    rows = []
    for group in groups.groups:
        choice = recipe.choice(group.name)
        kept: int | None = kept_count(group.size, choice.ratio, recipe.width) if group.name in left else 0
        if recipe.ranking != "group" and kept not in (0, group.size):
            kept = None  # scores decided; the artifact's recipe.json holds the units
        ratio = choice.ratio if group.name in left else 1.0
        rows.append(GroupRow(group.name, ratio, kept, group.size, choice.bits))
    return rows


def recipe_summary(record: TrialRecord, groups: Groups | None) -> str:
    """Return one line that says what a recipe does."""
    if record.recipe is None:
        return "no recipe"
    rows = group_rows(record.recipe, groups)
    cut = [row for row in rows if row.ratio > 0]
    low = Counter(row.bits for row in rows if row.bits < 32 and row.kept != 0)
    parts = []
    if cut:
        mean = sum(row.ratio for row in cut) / len(cut)
        most = max(row.ratio for row in cut)
        parts.append(f"{len(cut)} of {len(rows)} groups pruned, {mean:.0%} on average, {most:.0%} at most")
        gone = () if groups is None else groups.removed_blocks(record.recipe.kept_counts(groups))
        if gone:
            parts.append("blocks taken out: " + ", ".join(gone))
        own = {c.criterion for c in record.recipe.groups.values() if c.criterion}
        kinds = [f"{c} ({kind})" for kind, c in sorted(record.recipe.criterion.items())]
        ranked = f"ranked {RANKED[record.recipe.ranking]}by "
        parts.append(ranked + ", ".join(kinds + [f"{c} (some groups)" for c in sorted(own)]))
    else:
        parts.append("no channels pruned" if record.recipe.prunes else "nothing pruned")
    if record.recipe.masks:
        masked = [c.sparsity for c in record.recipe.groups.values() if c.sparsity > 0]
        mean = sum(masked) / len(masked)
        parts.append(f"{len(masked)} groups masked, {mean:.0%} of weights on average")
    if record.recipe.factorises:
        factorised = sum(choice.rank_ratio > 0 for choice in record.recipe.groups.values())
        parts.append(f"low rank asked for in {factorised} groups")
    if record.recipe.order != "prune-tune-quantize":
        parts.append(f"order {record.recipe.order}")
    left = sum(row.kept != 0 for row in rows)
    named = ", ".join(
        f"{low[bits]} int{bits}" if bits <= INTEGER_BITS else f"{low[bits]} float16" for bits in sorted(low)
    )
    parts.append(f"of {left} groups {named}" if low else "float")
    parts.append(f"{record.train_steps} training steps")
    return "; ".join(parts)


def interval(bounds: tuple[float, float], digits: int = 3) -> str:
    """Return an interval as text."""
    return f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"


def duration(seconds: float) -> str:
    """Return seconds as text such as ``1 h 05 min`` or ``42 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def target_text(settings: dict[str, Any]) -> str:
    """Return the target in words: runtime, device, threads and batch."""
    target = settings.get("target")
    if not isinstance(target, dict):
        return str(target or "unknown")
    threads, batch = target.get("threads", "?"), target.get("batch", "?")
    text = f"{target.get('runtime', '?')} on {target.get('device', '?')}, threads {threads}, batch {batch}"
    text += f", {target['precision']}" if "precision" in target else ""
    text += f", {target['input_size']} pixels" if target.get("input_size") else ""
    return text + (", compiled" if target.get("compile") else "")


def host_text(host: dict[str, Any]) -> str:
    """Return the machine in words; says so where it was not recorded."""
    if not host:
        return "not recorded"
    parts = [str(host.get("processor") or "unknown processor")]
    if host.get("usable_cores"):
        parts.append(f"{host['usable_cores']} usable cores")
    if isinstance(host.get("memory_bytes"), int):
        parts.append(f"{host['memory_bytes'] / 1e9:.0f} GB memory")
    if host.get("flags"):
        parts.append("with " + " ".join(map(str, host["flags"])))
    if host.get("system"):
        parts.append(str(host["system"]))
    versions = host.get("versions")
    if isinstance(versions, dict):
        known = [name for name in ("onnxruntime", "openvino") if versions.get(name)]
        parts += [f"{name} {versions[name]}" for name in known]
    return ", ".join(parts)
