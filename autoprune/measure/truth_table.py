"""TruthTable: which operator runs faster here in which format, width and sparsity, and where it is kept. Torch-free."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from autoprune.measure.host import describe_host
from autoprune.measure.record import Interval
from autoprune.naming import cache_root
from autoprune.target import Target

Verdict = Literal["faster", "slower", "no difference"]
Kind = Literal["conv", "linear"]
Variant = Literal["", "dynamic", "bfloat16", "precision"]
_FORMAT = 1
# Steps of channel counts that kernels may be made for.
_STEPS = (16, 8, 4, 2)
# Where counts between two multiples save less than this share of what they would in proportion, they buy nothing.
_BUYS = 1 / 3
_log = logging.getLogger(__name__)


class TruthEntry(BaseModel):
    """One operator in one format, against the same network in the target's own precision.

    Attributes:
        operator: The operator, such as ``conv 3x3``.
        kind: The kind of groups whose layers it stands for.
        format: What was asked for, such as ``int8``, ``4 bit weights`` or ``sparse 0.9``.
        bits: Bit-width of the weights.
        activation_bits: Bit-width of the inputs.
        variant: ``dynamic`` where inputs get their range at each inference, ``bfloat16`` where 16 bits are stored so,
            ``precision`` where all of the target computes in another one; empty for what a recipe's bits alone mean.
        sparsity: Share of single weights that are zero.
        channels: Channels of every layer.
        ran: Count of layers by what they run in.
        real: Whether every layer runs in something else than without the format; else it is stored so alone.
        ratio: Median of paired latency ratios against the unchanged network; below 1 is faster. None where none was
            timed.
        ratio_ci: Its 95 % interval.
        size_ratio: Bytes of the file as a share of the unchanged network's.
        refused: Why the runtime has no such format; empty where it has. Integers that it does not compute with are then
            timed as they are stored, with float arithmetic, if it stores them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    operator: str
    kind: Kind
    format: str
    bits: int
    activation_bits: int
    variant: Variant = ""
    sparsity: float = 0.0
    channels: int
    ran: dict[str, int] = {}
    real: bool = False
    ratio: float | None = None
    ratio_ci: Interval | None = None
    size_ratio: float | None = None
    refused: str = ""

    @property
    def verdict(self) -> Verdict | None:
        """What the interval says; None where nothing was timed."""
        if self.ratio_ci is None:
            return None
        return "faster" if self.ratio_ci[1] < 1 else "slower" if self.ratio_ci[0] > 1 else "no difference"

    @property
    def is_credited(self) -> bool:
        """Whether it is faster because it runs otherwise; an interval alone may be lucky."""
        return self.real and self.verdict == "faster"


class WidthTime(BaseModel):
    """The time of an operator at one number of channels.

    Attributes:
        operator: The operator.
        kind: The kind of groups whose layers it stands for.
        format: What it runs in.
        channels: Channels of every layer.
        ratio: Median of paired latency ratios against the widest network in that format.
        ratio_ci: Its 95 % interval.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    operator: str
    kind: Kind
    format: str
    channels: int
    ratio: float
    ratio_ci: Interval


class TruthTable(BaseModel):
    """What ``autoprune doctor --measure`` found of one target on one machine.

    Attributes:
        target: The target as one word; see :attr:`autoprune.target.Target.spec`.
        machine: Processor, its instructions, runtime and version.
        measured: Date, ISO 8601.
        thoroughness: ``quick`` or ``full``.
        seconds: Seconds that it took.
        complete: Whether every operator was measured.
        entries: Operators in their formats.
        widths: Operators at several numbers of channels.
        noisy: Operators whose times were noisy.
        earlier: Operators that were not measured again then, with the date of what the table holds of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    machine: dict[str, Any]
    measured: str
    thoroughness: str = "quick"
    seconds: float = 0.0
    complete: bool = False
    entries: tuple[TruthEntry, ...] = ()
    widths: tuple[WidthTime, ...] = ()
    noisy: tuple[str, ...] = ()
    earlier: dict[str, str] = {}

    def with_operator(
        self, operator: str, entries: Sequence[TruthEntry] = (), widths: Sequence[WidthTime] = ()
    ) -> TruthTable:
        """Return the table with what was measured of an operator in the place of what it held of that."""
        own = tuple(e for e in self.entries if e.operator != operator or not entries)
        times = tuple(w for w in self.widths if w.operator != operator or not widths)
        return self.model_copy(update={"entries": (*own, *entries), "widths": (*times, *widths)})

    def same_as(self, entry: TruthEntry) -> TruthEntry | None:
        """Return the entry of more bits that runs as another one does, beside which its bits are storage alone."""
        alike = [
            e
            for e in self.entries
            if (e.operator, e.ran, e.sparsity) == (entry.operator, entry.ran, entry.sparsity)
            and e.bits > entry.bits
        ]
        return max(alike, key=lambda e: e.bits, default=None) if entry.real else None

    def steps(self) -> dict[tuple[str, str], int]:
        """Return by operator and format the largest step of channels that costs nothing; see :func:`step_of`."""
        by_place: dict[tuple[str, str], dict[int, float]] = {}
        for each in self.widths:
            by_place.setdefault((each.operator, each.format), {})[each.channels] = each.ratio
        return {place: step_of(times) for place, times in by_place.items()}

    @property
    def width(self) -> int | None:
        """The step of channels for all groups: what costs nothing in any convolution, of linear layers without one.

        None where no widths were measured.
        """
        kinds = {each.operator: each.kind for each in self.widths}
        for kind in ("conv", "linear"):
            found = [step for (operator, _), step in self.steps().items() if kinds[operator] == kind]
            if found:
                return min(found)
        return None


def step_of(times: dict[int, float]) -> int:
    """Return the largest step of channels, of 16, 8, 4 and 2, that costs nothing; 1 where every channel has its price.

    A step costs nothing where counts between its multiples are hardly faster than the next multiple: all taken together
    they save less than a third of what they would in proportion.

    Args:
        times: Time by number of channels, in any unit; a step is judged where multiples above such counts are there.
    """
    for step in _STEPS:
        saved = proportional = 0.0
        for channels, time in times.items():
            above = -(-channels // step) * step
            if above != channels and above in times:
                saved += max(0.0, 1.0 - time / times[above])
                proportional += 1.0 - channels / above
        if proportional > 0 and saved < _BUYS * proportional:
            return step
    return 1


def machine_of(target: Target) -> dict[str, Any]:
    """Return what a table depends on besides the target."""
    host = describe_host()
    runtime = target.runtime
    found = {
        "processor": host["processor"],
        "flags": host["flags"],
        "runtime": runtime,
        "version": host["versions"].get(runtime),
    }
    if target.device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def table_path(target: Target) -> Path:
    """Return the file of a target's table on this machine; probes have the same sizes whatever the target's are."""
    content = [
        _FORMAT,
        target.model_copy(update={"input_size": None}).model_dump(mode="json"),
        machine_of(target),
    ]
    return _folder() / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]}.json"


def read_table(target: Target) -> TruthTable | None:
    """Return the table that was measured of a target on this machine; None if there is none that can be read."""
    return _read(table_path(target))


def tables_here() -> list[TruthTable]:
    """Return the tables of this machine, of whatever targets, by name."""
    host = describe_host()
    found = [table for path in sorted(_folder().glob("*.json")) if (table := _read(path)) is not None]
    here = [
        table
        for table in found
        if (table.machine.get("processor"), table.machine.get("flags")) == (host["processor"], host["flags"])
        and table.machine.get("version") == host["versions"].get(str(table.machine.get("runtime")))
    ]
    return sorted(here, key=lambda table: table.target)


def write_table(table: TruthTable, target: Target) -> Path:
    """Keep a table for later, in one step, and return its file.

    Raises:
        OSError: If it cannot be written.
    """
    path = table_path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(table.model_dump_json(indent=1), encoding="utf-8")
    temporary.replace(path)
    return path


def _folder() -> Path:
    return cache_root() / "truth"


def _read(path: Path) -> TruthTable | None:
    if not path.is_file():
        return None
    try:
        return TruthTable.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, ValueError, OSError) as error:
        _log.warning(
            "the truth table in %s cannot be read and is ignored: %s", path, str(error).splitlines()[0]
        )
        return None
