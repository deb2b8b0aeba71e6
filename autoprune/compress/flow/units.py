"""Units of values: what is scaled with one factor, and who makes and reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autoprune.compress.layers import Conv

MakerKind = Literal["layer", "batchnorm", "layernorm"]
ReaderKind = Literal["conv", "linear"]
# Of elements that no factor may change, and of zeros, which any factor leaves as they are.
FIXED, ZERO = 0, -1
_UNITS = "_autoprune_units"


@dataclass(frozen=True)
class Maker:
    """What makes units: a layer, or a normalisation with weights of its own.

    Attributes:
        weight: Name of its weight, whose outputs are divided.
        bias: Name of its bias, which is divided too; empty if it has none.
        kind: ``layer`` for convolutions and linear layers.
        units: Unit of each output channel, ``(out,)``; 0 where none may be scaled.
        layer: Weight of the layer whose very outputs a BatchNorm reads; empty for others.
    """

    weight: str
    bias: str
    kind: MakerKind
    units: Tensor
    layer: str = ""


@dataclass(frozen=True)
class Reader:
    """A layer that reads units.

    Attributes:
        weight: Name of its weight, whose inputs are multiplied.
        kind: ``conv`` or ``linear``.
        units: Unit of each input channel, ``(in,)``; 0 where none may be scaled.
    """

    weight: str
    kind: ReaderKind
    units: Tensor


@dataclass(frozen=True)
class Flow:
    """The units of a network.

    Attributes:
        makers: In the order in which they run.
        readers: In the order in which they run.
        count: Units, the fixed one among them: every unit is below.
    """

    makers: tuple[Maker, ...]
    readers: tuple[Reader, ...]
    count: int


class Tape:
    """What has been seen so far.

    Args:
        model: The network whose parameters are known by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.convolutions = {
            f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Conv)
        }
        self.makers: dict[str, Maker] = {}
        self.readers: dict[str, Reader] = {}
        self._parents = [FIXED]
        # Parameters that are read otherwise than as the weight or bias of a known layer.
        self._elsewhere: set[str] = set()
        self._bias_of: dict[str, str] = {}

    def units(self, tensor: Tensor) -> Tensor | None:
        """Return the units of a value's elements, int64 of its shape; None where all are known to be fixed."""
        found: Tensor | None = getattr(tensor, _UNITS, None)
        return found

    def live(self, units: Tensor | None) -> Tensor | None:
        """Return units if any of them is not fixed by now."""
        if units is None or all(
            self._root(u) == FIXED for u in torch.unique(compact(units)).tolist() if u > 0
        ):
            return None
        return units

    def put(self, tensor: Tensor, units: Tensor | None) -> None:
        """Say what units a value has."""
        setattr(tensor, _UNITS, units)

    def fix(self, tensor: Tensor) -> None:
        """Let no factor change a value."""
        if (units := self.units(tensor)) is not None:
            self._fix_units(units)
            self.put(tensor, None)

    def join(self, some: Tensor, others: Tensor) -> None:
        """Make units one, element by element; zeros go with anything."""
        some, others = compact(some, others)
        present = (some != ZERO) & (others != ZERO)
        count = len(self._parents)
        for pair in torch.unique(some[present] * count + others[present]).tolist():
            first, second = sorted(self._root(unit) for unit in divmod(pair, count))
            self._parents[second] = first

    def make(self, weight: str, bias: str, kind: MakerKind, count: int, layer: str = "") -> Tensor:
        """Return the units that a weight makes, the same for every call, ``(count,)``."""
        if weight not in self.makers:
            begin = len(self._parents)
            self._parents += range(begin, begin + count)
            self.makers[weight] = Maker(weight, bias, kind, torch.arange(begin, begin + count), layer)
        known = self.makers[weight]
        if layer != known.layer:
            self.makers[weight] = replace(known, layer="")
        if (bias and self._bias_of.setdefault(bias, weight) != weight) or bias != known.bias:
            self._elsewhere |= {bias, known.bias} - {""}
        return known.units

    def read(self, weight: str, kind: ReaderKind, units: Tensor) -> None:
        """Note that a weight reads units, ``(in,)``."""
        if weight not in self.readers:
            self.readers[weight] = Reader(weight, kind, units)
            return
        known = self.readers[weight].units
        self.join(known, units)
        self.readers[weight] = Reader(weight, kind, torch.where(known == ZERO, units, known))

    def note_elsewhere(self, parameter: Tensor) -> None:
        """Note that a parameter is read otherwise."""
        if (name := self.names.get(id(parameter))) is not None:
            self._elsewhere.add(name)

    def flow(self) -> Flow:
        """Return the units, numbered by what they have become."""
        for maker in self.makers.values():
            if {maker.weight, maker.bias} & self._elsewhere:
                self._fix_units(maker.units)
        for reader in self.readers.values():
            if reader.weight in self._elsewhere:
                self._fix_units(reader.units)
        roots = torch.tensor([self._root(unit) for unit in range(len(self._parents))])
        # Channels of zeros have no unit.
        makers = tuple(replace(m, units=roots[m.units]) for m in self.makers.values())
        readers = tuple(replace(r, units=roots[r.units.clamp_min(FIXED)]) for r in self.readers.values())
        return Flow(makers, readers, len(self._parents))

    def _fix_units(self, units: Tensor) -> None:
        self.join(units, fixed(units.shape))

    def _root(self, unit: int) -> int:
        while self._parents[unit] != unit:
            self._parents[unit] = self._parents[self._parents[unit]]
            unit = self._parents[unit]
        return unit


@dataclass(frozen=True)
class Call:
    """One call of one of torch's functions.

    Attributes:
        tape: What has been seen so far.
        name: Name of the function, without what tells its forms apart.
        function: The function.
        args: Its arguments.
        kwargs: Its arguments by keyword.
        output: What it returned.
        before: Units of its first argument before the call, which may have changed it in place.
    """

    tape: Tape
    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    before: Tensor | None

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument, however it was given."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


# Puts units to what a call returned, and returns whether it knew how; what it did not know is fixed.
Rule = Callable[[Call], bool]


def fixed(shape: torch.Size) -> Tensor:
    """Return units of a value that no factor may change."""
    return torch.tensor(FIXED).expand(shape)


def compact(units: Tensor, *others: Tensor) -> Any:
    """Return tensors of one shape without the repetitions that all of them have by their strides."""
    found = (units, *others)
    for dim in range(units.dim()):
        if all(each.stride(dim) == 0 for each in found):
            found = tuple(each.narrow(dim, 0, 1) for each in found)
    return found if others else found[0]
