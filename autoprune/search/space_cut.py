"""The cut of a search space to what is real on its target: choices that only save bytes get no credit for time."""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from autoprune.config import StudyConfig
from autoprune.measure.truth_table import Kind, TruthTable, read_table
from autoprune.search.format_claims import (
    Choice,
    Judged,
    only_stores_integers,
    without_time,
    zeros_are_skipped,
)
from autoprune.space.groups import Groups
from autoprune.space.quantization import INTEGER_BITS, Bits
from autoprune.space.search_space import SearchSpace
from autoprune.space.space_parts import Override
from autoprune.study.store import StudyStore
from autoprune.target import Target

_KINDS: tuple[Kind, ...] = ("conv", "linear")
_NOTE = "space_cut"
USUAL_INPUTS = 8


class SpaceCut(BaseModel):
    """What a study does otherwise than its search space says, decided once before the first trial.

    Attributes:
        width: Step of kept channel counts; None for the space's.
        bits: Bit-widths of the groups that lost some, by group.
        activation_bits: Those that stay; None for all.
        without_zeros: Whether single weights are not masked.
        in_float: Groups whose integers are only stored as such, so that no prediction gives them another time.
        lines: One line for each kind of choice that brings no time, for people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int | None = None
    bits: dict[str, tuple[Bits, ...]] = {}
    activation_bits: tuple[int, ...] | None = None
    without_zeros: bool = False
    in_float: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()

    def applied(self, space: SearchSpace, groups: Groups) -> SearchSpace:
        """Return a space without what is left out; the very same one where that is nothing."""
        update: dict[str, object] = {}
        if self.width is not None:
            space = space.with_width(self.width)
        if self.activation_bits is not None:
            update["activation_bits"] = self.activation_bits
        if self.without_zeros:
            update["sparsities"] = (0.0,)
            update["overrides"] = tuple(o.model_copy(update={"sparsities": None}) for o in space.overrides)
        space = space.model_copy(update=update) if update else space
        return self._with_bits(space, groups) if self.bits else space

    def _with_bits(self, space: SearchSpace, groups: Groups) -> SearchSpace:
        wanted = {g.name: self.bits.get(g.name, space.bits_of(g)) for g in groups.groups if g.producers}
        any_bits = {bits for choices in wanted.values() for bits in choices}
        left = tuple(bits for bits in space.bits if bits in any_bits) or space.bits
        # The last override that matches a group wins.
        fewer = space.model_copy(update={"bits": left})
        own = tuple(
            Override(groups=glob.escape(g.name), bits=wanted[g.name])
            for g in groups.groups
            if g.name in wanted and fewer.bits_of(g) != tuple(sorted(wanted[g.name]))
        )
        return fewer.model_copy(update={"overrides": (*fewer.overrides, *own)})


def study_cut(store: StudyStore, space: SearchSpace, groups: Groups, config: StudyConfig) -> SpaceCut:
    """Return the cut of a study: decided when it begins and kept, so that a run that goes on searches the same space.

    Studies that earlier versions began are not cut.
    """
    kept = store.notes().get(_NOTE)
    if kept is not None:
        return SpaceCut.model_validate_json(kept)
    if store.records():
        return SpaceCut()
    cut = cut_space(space, groups, config.target, config.objectives, read_table(config.target))
    store.note(_NOTE, cut.model_dump_json())
    return cut


def settled(space: SearchSpace, target: Target) -> SearchSpace:
    """Return a space whose width is a number: where that is left to the target, what was measured of it."""
    width, _ = _width(space, target, read_table(target) if space.has_automatic_width else None)
    return space if width is None else space.with_width(width)


def cut_lines(notes: Mapping[str, str]) -> tuple[str, ...]:
    """Return what a study's notes say of its cut."""
    kept = notes.get(_NOTE)
    return () if kept is None else SpaceCut.model_validate_json(kept).lines


def cut_space(
    space: SearchSpace, groups: Groups, target: Target, objectives: Collection[str], table: TruthTable | None
) -> SpaceCut:
    """Decide what of a space is worth a search on a target.

    A format brings time where it runs otherwise and faster than all choices of more bits that the space holds for that
    kind of layers: by the intervals of any operator of the kind in the table, else by what is known of the runtime.
    What brings none is left out, unless the size of the file is an objective; what the runtime refuses is left out
    always. Of each kind the choice of most bits stays.

    Args:
        space: What may be tried.
        groups: Groups of the model.
        target: Where the search decides.
        objectives: What the front trades.
        table: What was measured of the target on this machine, if anything was.
    """
    judged = [
        each
        for kind in _kinds(groups)
        for each in without_time(_choices(space, groups, kind), target, objectives, table)
    ]
    out = {each.choice for each in judged if each.left_out}
    lines = [*_lines(judged)]
    zeros = zeros_are_skipped(target, table)
    masked = any(space.every_sparsity) and zeros is False
    without_zeros = masked and "size" not in objectives and 0.0 in space.sparsities
    if masked:
        what = "left out: sparsities above 0" if without_zeros else "sparsities above 0 save bytes, not time"
        lines.append(f"{what}: zeros among single weights are multiplied like all others")
    if lines:
        lines.append(
            f"measured here on {table.measured[:10]}"
            if table
            else f"known of {target.runtime}; {_hint(target)}"
        )
    width, told = _width(space, target, table)
    return SpaceCut(
        width=width,
        bits=_bits_left(space, groups, out),
        activation_bits=_inputs_left(space, groups, out),
        without_zeros=without_zeros,
        in_float=tuple(
            g.name for g in groups.groups if g.producers and only_stores_integers(g.type, target, table)
        ),
        lines=(*lines, *told),
    )


# -- what is judged --------------------------------------------------------------------------


def _kinds(groups: Groups) -> list[Kind]:
    present = {g.type for g in groups.groups if g.producers}
    return [kind for kind in _KINDS if kind in present]


def _choices(space: SearchSpace, groups: Groups, kind: Kind) -> list[Choice]:
    """Return what a space offers to one kind of layers, the most bits first."""
    bits = {b for g in groups.groups if g.type == kind and g.producers for b in space.bits_of(g)}
    pairs = {(b, a if b <= INTEGER_BITS else 32) for b in bits for a in space.activation_bits}
    return [Choice(kind, b, a) for b, a in sorted(pairs, reverse=True)]


# -- what is made of it ----------------------------------------------------------------------


def _bits_left(space: SearchSpace, groups: Groups, out: Collection[Choice]) -> dict[str, tuple[Bits, ...]]:
    found = {}
    for group in groups.groups:
        if not group.producers:
            continue
        before = space.bits_of(group)
        after = tuple(
            b
            for b in before
            if any(
                Choice(group.type, b, a if b <= INTEGER_BITS else 32) not in out
                for a in space.activation_bits
            )
        )
        if after and after != before:
            found[group.name] = after
    return found


def _inputs_left(space: SearchSpace, groups: Groups, out: Collection[Choice]) -> tuple[int, ...] | None:
    """Return the bits of inputs that some integer weights are still searched with; None where all are."""
    offered = {c for kind in _kinds(groups) for c in _choices(space, groups, kind) if c.bits <= INTEGER_BITS}
    left = tuple(a for a in space.activation_bits if any(c.activation_bits == a for c in offered - set(out)))
    return left if left and left != space.activation_bits else None


def _lines(judged: Sequence[Judged]) -> Iterator[str]:
    """Yield one line for each reason, with all choices that it holds for."""
    alike: dict[tuple[str, bool, int], dict[Kind, tuple[int, ...]]] = {}
    for each in judged:
        choice = each.choice
        inputs = choice.activation_bits if choice.bits <= INTEGER_BITS else USUAL_INPUTS
        of_kind = alike.setdefault((each.why, each.left_out, inputs), {})
        of_kind[choice.kind] = (choice.bits, *of_kind.get(choice.kind, ()))
    for (why, left_out, inputs), by_kind in alike.items():
        for bits in dict.fromkeys(by_kind.values()):
            kinds = " and ".join(kind for kind, own in by_kind.items() if own == bits)
            what = f"bits {', '.join(map(str, bits))} of {kinds} layers"
            what += f" with inputs of {inputs} bits" if inputs != USUAL_INPUTS else ""
            yield f"left out: {what}: {why}" if left_out else f"{what} save bytes, not time: {why}"


def _hint(target: Target) -> str:
    # Tables are of one target, its threads and batch included; probes have sizes of their own.
    word = target.model_copy(update={"input_size": None}).spec
    return f"`autoprune doctor --measure --target {word}` would tell what is true of this machine"


def _width(space: SearchSpace, target: Target, table: TruthTable | None) -> tuple[int | None, list[str]]:
    if not space.has_automatic_width:
        return None, []
    if table is None or table.width is None:
        return space.width, [f"width {space.width}: nothing was measured of this target; {_hint(target)}"]
    return table.width, [
        f"width {table.width}: counts between its multiples are no faster here ({table.measured[:10]})"
    ]
