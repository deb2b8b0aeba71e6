"""Families of layers that share units, their ranges, and their rescaling in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.compress.flow.units import FIXED, Flow, Maker, Reader
from autoprune.compress.layers import BatchNorm, Conv, split_name
from autoprune.compress.unit_scaling import spread
from autoprune.space.groups import Axis


@dataclass(frozen=True)
class Family:
    """Makers and readers that share units.

    Attributes:
        makers: What makes them, at least one.
        readers: What reads them, at least one.
        units: Those that all of this may scale, made and read, ``(n,)``.
    """

    makers: tuple[Maker, ...]
    readers: tuple[Reader, ...]
    units: Tensor

    @property
    def name(self) -> str:
        """The layer that makes them first."""
        return split_name(self.makers[0].weight)[0]


def families(flow: Flow, belongs: Callable[[Sequence[Maker], Sequence[Reader]], bool]) -> list[Family]:
    """Return makers and readers by the units that they share, in the order in which they run.

    Args:
        flow: Units of a network.
        belongs: Whether makers and readers of a unit are of the wanted kind.
    """
    sides: dict[int, list[Maker | Reader]] = {}
    every: list[Maker | Reader] = [*flow.makers, *flow.readers]
    for side in every:
        for unit in torch.unique(side.units).tolist():
            sides.setdefault(unit, []).append(side)
    wanted: dict[int, list[Maker | Reader]] = {}
    for unit, own in sides.items():
        makers, readers = [s for s in own if isinstance(s, Maker)], [s for s in own if isinstance(s, Reader)]
        if unit != FIXED and makers and readers and belongs(makers, readers):
            wanted[unit] = own
    found: list[Family] = []
    while wanted:
        # Of layers that share units with layers that share units.
        units, waiting, members = set[int](), [next(iter(wanted))], dict[int, Maker | Reader]()
        while waiting:
            unit = waiting.pop()
            for side in wanted.pop(unit, ()):
                units.add(unit)
                if id(side) not in members:
                    members[id(side)] = side
                    waiting += torch.unique(side.units).tolist()
        found.append(
            Family(
                tuple(m for m in flow.makers if id(m) in members),
                tuple(r for r in flow.readers if id(r) in members),
                torch.tensor(sorted(units)),
            )
        )
    return found


@torch.no_grad()
def scale(model: nn.Module, family: Family, factors: Tensor) -> None:
    """Divide channels where they are made and multiply them where they are read, in place.

    Args:
        model: The network.
        family: Which layers.
        factors: By unit.
    """
    own = _own(family, factors)
    for maker in family.makers:
        each = 1.0 / own[maker.units]
        _multiply(model, maker.weight, "out", each)
        if maker.bias:
            _multiply(model, maker.bias, "out", each)
    for reader in family.readers:
        _multiply(model, reader.weight, "in", own[reader.units])


class Tables:
    """Largest magnitudes of the weights between channels, which is all that factors follow from.

    Args:
        model: A network; it is not changed.
        found: Families of its layers.
    """

    def __init__(self, model: nn.Module, found: Sequence[Family]) -> None:
        self._between: dict[str, Tensor] = {}
        self._gains: dict[str, Tensor] = {}
        sides: list[Maker | Reader] = []
        for family in found:
            sides += [*family.makers, *family.readers]
        for side in sides:
            module = _owner(model, side.weight)
            if isinstance(module, BatchNorm) and isinstance(side, Maker):
                assert module.running_var is not None  # noqa: S101
                spread_out = (module.running_var.double() + module.eps).sqrt()
                self._gains[side.weight] = module.weight.detach().double().abs() / spread_out
                self._between[side.layer] = _between(model, side.layer)
            elif isinstance(side, Reader) or side.kind == "layer":
                self._between[side.weight] = _between(model, side.weight)

    def ranges(self, side: Maker | Reader) -> Tensor:
        """Return the largest magnitude of the weights of each channel, ``(channels,)``.

        Those of a layer before a BatchNorm are as the BatchNorm leaves them.
        """
        if isinstance(side, Reader):
            return self._between[side.weight].amax(1).flatten()
        made = self._between[side.layer or side.weight].amax(2).flatten()
        return made * self._gains[side.weight] if side.kind == "batchnorm" else made

    def scale(self, family: Family, factors: Tensor) -> None:
        """Do what :func:`scale` does to the network."""
        for maker in family.makers:
            each = _own(family, factors)[maker.units]
            if maker.kind == "batchnorm":
                self._gains[maker.weight] /= each
            else:
                groups, rows, _ = self._between[maker.weight].shape
                self._between[maker.weight] /= each.reshape(groups, rows, 1)
        for reader in family.readers:
            groups, _, columns = self._between[reader.weight].shape
            self._between[reader.weight] *= _own(family, factors)[reader.units].reshape(groups, 1, columns)


def _multiply(model: nn.Module, name: str, axis: Axis, each: Tensor) -> None:
    """Multiply a parameter by a factor for each channel along an axis, in place."""
    module, parameter = _owner(model, name), model.get_parameter(name)
    if parameter.dim() > 1 and isinstance(module, Conv | nn.Linear):
        each = spread(module, axis, each)
    elif parameter.dim() > 1:  # a matrix (out, in) that is no layer's by itself
        each = each[:, None] if axis == "out" else each[None]
    parameter.mul_(each.to(parameter))


def _between(model: nn.Module, name: str) -> Tensor:
    """Return the largest magnitudes of a layer's weights over its taps, ``(groups, out, in)`` of each group."""
    module, weight = _owner(model, name), model.get_parameter(name).detach().double().abs()
    groups = module.groups if isinstance(module, Conv) else 1
    if isinstance(module, Conv) and module.transposed:
        weight = weight.transpose(0, 1)
    matrix = weight.flatten(2).amax(2) if weight.dim() > 2 else weight
    return matrix.reshape(groups, -1, matrix.shape[1]).clone()


def _own(family: Family, factors: Tensor) -> Tensor:
    """Return factors that are 1 for units of other families."""
    own = torch.ones_like(factors)
    own[family.units] = factors[family.units]
    return own


def _owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(split_name(parameter)[0])
