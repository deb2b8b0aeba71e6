"""Claims: what is known of the time that a choice of bits brings on a target, measured there or of its runtime."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from autoprune.deploy.known_formats import runs_in, runs_sparse
from autoprune.measure.record import Interval
from autoprune.measure.truth_table import Kind, TruthTable
from autoprune.space.quantization import INTEGER_BITS, Bits
from autoprune.target import Target

_FLOAT_BITS = 32
_UNCHANGED = (1.0, 1.0)


@dataclass(frozen=True)
class Claim:
    """What is known of layers of one kind in one format.

    Attributes:
        runs_in: What they run in.
        speeds: By operator the interval of its latency as a share of float's; empty where nothing was timed.
        refused: Why the runtime has no such format; empty where it has.
    """

    runs_in: str
    speeds: Mapping[str, Interval] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True)
class Choice:
    """A format that a space offers to layers of one kind.

    Attributes:
        kind: Kind of layers.
        bits: Bit-width of weights.
        activation_bits: Bit-width of inputs.
    """

    kind: Kind
    bits: Bits
    activation_bits: int


@dataclass(frozen=True)
class Judged:
    """A choice that brings no time.

    Attributes:
        choice: The choice.
        why: Why not.
        left_out: Whether it is left out of the search.
    """

    choice: Choice
    why: str
    left_out: bool


def without_time(
    choices: Sequence[Choice], target: Target, objectives: Collection[str], table: TruthTable | None
) -> Iterator[Judged]:
    """Yield the choices that bring no time."""
    kept: list[Claim] = []
    for choice in choices:
        claim = claim_of(choice, target, table)
        if claim is None:
            continue
        if claim.refused:
            yield Judged(choice, claim.refused, left_out=True)
        elif kept and not is_faster(claim, kept):
            yield Judged(choice, _why(claim, kept), left_out="size" not in objectives)
        else:
            kept.append(claim)


def claim_of(choice: Choice, target: Target, table: TruthTable | None) -> Claim | None:
    """Return what is known of a choice; None where nothing is.

    Integers of bits that were not measured are taken for those that run in what is known of them; where that is
    nothing, for those of the next more bits.
    """
    known = runs_in(target, choice.kind, choice.bits, choice.activation_bits)
    if choice.bits == _FLOAT_BITS:
        return Claim(known or target.precision)
    entries = [
        e
        for e in (table.entries if table else ())
        if (e.kind, e.activation_bits) == (choice.kind, choice.activation_bits)
        and not (e.variant or e.sparsity)
    ]
    own = [e for e in entries if e.bits == choice.bits]
    if not own and known:
        own = [e for e in entries if known in e.ran]
    elif not own:
        more = [e.bits for e in entries if choice.bits < e.bits <= INTEGER_BITS]
        own = [e for e in entries if more and e.bits == min(more)]
    timed = {e.operator: (e.ratio_ci if e.real else _UNCHANGED) for e in own if e.ratio_ci is not None}
    if timed:
        return Claim(" and ".join(sorted({word for e in own for word in e.ran})), timed)
    if own:
        return Claim("", refused=own[0].refused)
    return None if known is None else Claim(known)


def is_faster(claim: Claim, others: Sequence[Claim]) -> bool:
    """Whether a format runs otherwise than all others, each of which has more bits, and faster in some operator."""
    if any(claim.runs_in == other.runs_in for other in others):
        return False
    return not claim.speeds or any(
        high < min(other.speeds.get(operator, _UNCHANGED)[0] for other in others)
        for operator, (_, high) in claim.speeds.items()
    )


def _why(claim: Claim, others: Sequence[Claim]) -> str:
    if claim.runs_in == others[0].runs_in:
        return f"they run in {claim.runs_in} all the same"
    if any(claim.runs_in == other.runs_in for other in others):
        return f"they run in {claim.runs_in} as more bits do, no faster"
    return f"they run in {claim.runs_in}, no faster than more bits do"


def zeros_are_skipped(target: Target, table: TruthTable | None) -> bool | None:
    """Return whether zeros among single weights make any operator faster; None where nothing is known."""
    timed = [e for e in (table.entries if table else ()) if e.sparsity and e.verdict is not None]
    return any(e.is_credited for e in timed) if timed else runs_sparse(target)


def only_stores_integers(kind: Kind, target: Target, table: TruthTable | None) -> bool:
    """Return whether layers of a kind that are asked to run in int8 run in float all the same."""
    eight = claim_of(Choice(kind, 8, 8), target, table)
    whole = claim_of(Choice(kind, 32, 32), target, table)
    return eight is not None and whole is not None and not eight.refused and eight.runs_in == whole.runs_in
