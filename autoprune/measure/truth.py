"""Measuring a truth table: every operator in every format of a target, built, read back and timed against float."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.deploy.registry import make_runtime
from autoprune.deploy.runtime import Runtime
from autoprune.deploy.saturation import int8_bits
from autoprune.errors import ExportError, TrialError, UsageError
from autoprune.measure.cost import size_bytes
from autoprune.measure.figures import NO_RUN
from autoprune.measure.latency import LatencyProtocol, measure_front
from autoprune.measure.probes import (
    INT8,
    OPERATORS,
    Asked,
    Operator,
    examples,
    formats_for,
    in_format,
    narrowed,
    network_of,
)
from autoprune.measure.record import Executed, Latency
from autoprune.measure.truth_table import TruthEntry, TruthTable, WidthTime, machine_of, read_table
from autoprune.target import PRECISIONS, Target

PROTOCOLS = {
    "quick": LatencyProtocol(
        processes=2, sessions=3, rounds=3, block_s=0.005, warmup_s=0.03, limit_s=0.4, repeats=0
    ),
    "full": LatencyProtocol(
        processes=5, sessions=2, rounds=7, block_s=0.01, warmup_s=0.05, limit_s=1.0, repeats=1
    ),
}
_FLOAT = Asked("float")
Say = Callable[[str], None]
Keep = Callable[[TruthTable], object]


@dataclass(frozen=True)
class Built:
    """A probe that was built for a target.

    Attributes:
        asked: Its format.
        path: Its file.
        executed: What runs of it.
        target: Where it runs: in another precision than the others where that is what is asked for.
        refused: Why it is only stored so; empty where it was built as asked.
    """

    asked: Asked
    path: Path
    executed: Executed
    target: Target
    refused: str = ""


def measure_truth(
    target: Target,
    thoroughness: str = "quick",
    *,
    operators: Sequence[Operator] = OPERATORS,
    say: Say = lambda message: None,
    keep: Keep = lambda table: None,
) -> TruthTable:
    """Measure the truth table of a target on this machine.

    Args:
        target: The target.
        thoroughness: ``quick`` for about two minutes, ``full`` for narrower intervals in about four times as long.
        operators: What to measure; all if not given.
        say: Gets a line now and then.
        keep: Gets the table after each operator, so that what was measured outlasts an interruption.

    Returns:
        The table; operators that an earlier one of this target and machine had, and that were not measured now, are
        taken from there.
    """
    begun = time.perf_counter()
    before = read_table(target)
    table = TruthTable(
        target=target.spec,
        machine=machine_of(target),
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        thoroughness=thoroughness,
        entries=before.entries if before else (),
        widths=before.widths if before else (),
        noisy=before.noisy if before else (),
        earlier={e.operator: before.earlier.get(e.operator, before.measured) for e in before.entries}
        if before
        else {},
    )
    for number, operator in enumerate(operators):
        say(f"{operator.name} ({number + 1} of {len(operators)})")
        entries, noisy = _entries(operator, target, thoroughness, say)
        table = table.with_operator(operator.name, entries=entries)
        if operator.widths:
            widths = [*_widths(operator, target, PROTOCOLS[thoroughness], say)]
            table = table.with_operator(operator.name, widths=widths)
        have = {entry.operator for entry in table.entries}
        others = tuple(name for name in table.noisy if name != operator.name)
        table = table.model_copy(
            update={
                "seconds": time.perf_counter() - begun,
                "complete": have >= {each.name for each in OPERATORS},
                "noisy": (*others, *([operator.name] if noisy else [])),
                "earlier": {n: date for n, date in table.earlier.items() if n != operator.name},
            }
        )
        keep(table)
    return table


# -- formats ---------------------------------------------------------------------------------


def _entries(
    operator: Operator, target: Target, thoroughness: str, say: Say
) -> tuple[list[TruthEntry], bool]:
    """Return an operator in all formats, and whether its times were noisy; nothing where it could not be timed."""
    shape = operator.shape(operator.channels)
    with tempfile.TemporaryDirectory(prefix="autoprune-truth-") as folder:
        dense, built, refused = _all_built(operator, target, Path(folder), everything=thoroughness == "full")
        try:
            timed = _timed(built, dense, shape, PROTOCOLS[thoroughness])
        except TrialError as error:
            say(f"{operator.name} could not be timed: {error.reason}")
            return [], False
        found = [
            _entry(
                operator,
                each.asked,
                ran=each.executed.ran,
                # What no layer of the unchanged network runs in.
                real=set(each.executed.ran).isdisjoint(dense.executed.ran),
                ratio=latency.ratio,
                ratio_ci=latency.ratio_ci,
                size_ratio=size_bytes(each.path) / size_bytes(dense.path),
                refused=each.refused,
            )
            for each, latency in zip(built, timed, strict=True)
        ]
    return found + refused, any(latency.noisy for latency in timed)


def _all_built(
    operator: Operator, target: Target, folder: Path, *, everything: bool
) -> tuple[Built, list[Built], list[TruthEntry]]:
    """Return an operator's unchanged network, the network in each format, and the formats that the runtime refuses."""
    model, shape = network_of(operator, operator.channels), operator.shape(operator.channels)
    runtime = _prepared(target, model, shape)
    dense = _built(runtime, model, _FLOAT, folder, shape)
    built: list[Built] = []
    refused: list[TruthEntry] = []
    for asked in formats_for(operator, everything=everything):
        try:
            built.append(_built(runtime, model, asked, folder, shape))
        except ExportError as error:
            why = error.message.splitlines()[0]
            stored = _stored_only(runtime, model, asked, folder, shape)
            if stored is None:
                refused.append(_entry(operator, asked, refused=why))
            else:
                built.append(replace(stored, asked=asked, refused=why))
    for other in _other_precisions(target):
        asked = Asked(other.precision, 16, 16, "precision")
        try:
            built.append(_built(_prepared(other, model, shape), model, asked, folder, shape))
        except ExportError as error:
            refused.append(_entry(operator, asked, refused=error.message.splitlines()[0]))
    return dense, built, refused


def _entry(operator: Operator, asked: Asked, **found: Any) -> TruthEntry:
    return TruthEntry(
        operator=operator.name,
        kind=operator.kind,
        channels=operator.channels,
        format=asked.name,
        bits=asked.bits,
        activation_bits=asked.activation_bits,
        variant=asked.variant,
        sparsity=asked.sparsity,
        **found,
    )


def _stored_only(
    runtime: Runtime, model: nn.Module, asked: Asked, folder: Path, shape: Sequence[int]
) -> Built | None:
    """Build integers that a runtime does not compute with as they are deployed then: stored, with float arithmetic."""
    if asked.activation_bits == 32:
        return None
    try:
        return _built(runtime, model, replace(asked, activation_bits=32), folder, shape)
    except ExportError:
        return None


def _other_precisions(target: Target) -> list[Target]:
    """Return the targets that differ from one in what float layers compute in."""
    found = []
    for precision in PRECISIONS:
        try:
            other = Target.model_validate({**target.model_dump(), "precision": precision})
        except UsageError:  # the runtime does not compute in it
            continue
        found += [other] if precision != target.precision else []
    return found


def _prepared(target: Target, model: nn.Module, shape: Sequence[int]) -> Runtime:
    runtime = make_runtime(target)
    runtime.prepare(model, examples(shape, 2))
    return runtime


def _built(runtime: Runtime, model: nn.Module, asked: Asked, folder: Path, shape: Sequence[int]) -> Built:
    """Build a network in a format, in a folder of its own."""
    own = Path(tempfile.mkdtemp(dir=folder))
    network, formats = in_format(model, asked, int8_bits(runtime.target))
    path = own / runtime.target.facts.model_file
    return Built(
        asked, path, runtime.build(network, path, formats, [examples(shape)]).executed, runtime.target
    )


def _timed(
    built: Sequence[Built], dense: Built, shape: Sequence[int], protocol: LatencyProtocol
) -> list[Latency]:
    paths, targets = [each.path for each in built], {each.path: each.target for each in built}
    found = measure_front(
        paths, dense.path, dense.target, shape, protocol=protocol, run=NO_RUN, targets=targets
    )
    return [latency for latency, _ in found]


# -- widths ----------------------------------------------------------------------------------


def _widths(operator: Operator, target: Target, protocol: LatencyProtocol, say: Say) -> list[WidthTime]:
    """Return an operator's time at its widths in float and, where the runtime has it, in int8."""
    widest = max(operator.widths)
    shape = operator.shape(widest)
    found: list[WidthTime] = []
    with tempfile.TemporaryDirectory(prefix="autoprune-truth-") as name:
        runtime = _prepared(target, narrowed(operator, widest), shape)
        for asked in (_FLOAT, INT8):
            try:
                built = {
                    channels: _built(runtime, narrowed(operator, channels), asked, Path(name), shape)
                    for channels in operator.widths
                }
                timed = _timed(list(built.values()), built[widest], shape, protocol)
            except TrialError as error:
                say(f"widths of {operator.name} in {asked.name} could not be timed: {error.reason}")
                continue
            except ExportError:  # the table has why among its entries
                continue
            found += [
                WidthTime(
                    operator=operator.name,
                    kind=operator.kind,
                    format=asked.name,
                    channels=channels,
                    ratio=latency.ratio,
                    ratio_ci=latency.ratio_ci,
                )
                for channels, latency in zip(built, timed, strict=True)
            ]
    return found
