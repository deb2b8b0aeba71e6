"""Shapes of a network's layers as functions of what its groups keep, as plain data. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from autoprune.space.quantization import computed_in


class AxisUse(BaseModel):
    """How a group takes part in one axis of a layer.

    Attributes:
        group: Name of the group.
        share: Share of the axis' channels that one unit of the group owns, in ``(0, 1]``.
        units: Units of the whole group.
        part: Number of the part of the axis that the group's channels are. Groups of one part divide it between them,
            as heads and their width do; -1 for a part of its own.
        sets_bits: Whether any layer's bit-width is the group's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: str
    share: float
    units: int
    part: int = -1
    sets_bits: bool = True


class LayerShape(BaseModel):
    """One convolution or linear layer.

    Attributes:
        name: Name of the layer.
        group: The group whose bit-width the layer has.
        weights: Weights of the dense layer, the bias not among them.
        outputs: Channels that the dense layer makes.
        inputs: Channels that the dense layer reads.
        makes: Groups that own its outputs.
        reads: Groups that own its inputs.
        read_elements: Elements of its input for one example.
        block: The group with which the whole layer goes when all its units are removed; empty for none.
        places: Places of one example at which the layer's weights are used; 0 where that was not recorded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    group: str
    weights: int
    outputs: int
    inputs: int
    makes: tuple[AxisUse, ...]
    reads: tuple[AxisUse, ...]
    read_elements: int
    block: str = ""
    places: int = 0

    def macs(self, counts: Mapping[str, int]) -> float:
        """Return the multiply-accumulates of one example; see :meth:`output_share`.

        Where places were not recorded, as many as its inputs have are taken.
        """
        if self.is_gone(counts):
            return 0.0
        places = self.places or max(1, self.read_elements // self.inputs)
        return places * (self.weights * self.output_share(counts) * self.input_share(counts))

    def output_share(self, counts: Mapping[str, int]) -> float:
        """Return the share of its outputs that stays.

        Args:
            counts: Kept units by group; groups that are not named stay whole.
        """
        return self._share(self.makes, counts)

    def input_share(self, counts: Mapping[str, int]) -> float:
        """Return the share of its inputs that stays; see :meth:`output_share`."""
        return self._share(self.reads, counts)

    def converted_share(self, counts: Mapping[str, int], bits: Mapping[str, int], width: int) -> float:
        """Return the share of its dense inputs that comes from groups that are computed in another type.

        Args:
            counts: As in :meth:`output_share`.
            bits: Bit-width by group; 32 where not named.
            width: The layer's own.
        """
        parts = _parts(self.reads, counts)
        others = {
            _part(place, use)
            for place, use in enumerate(self.reads)
            if use.sets_bits and computed_in(bits.get(use.group, 32)) != computed_in(width)
        }
        return sum(parts[part][1] for part in others)

    def is_gone(self, counts: Mapping[str, int]) -> bool:
        """Return whether the layer goes with a removed block."""
        return bool(self.block) and counts.get(self.block, 1) == 0

    @staticmethod
    def _share(uses: tuple[AxisUse, ...], counts: Mapping[str, int]) -> float:
        return 1.0 - sum(whole - left for whole, left in _parts(uses, counts).values())


def _parts(uses: tuple[AxisUse, ...], counts: Mapping[str, int]) -> dict[int, tuple[float, float]]:
    """Return for each part of an axis its share, and the share of the axis that stays of it."""
    found: dict[int, tuple[float, float]] = {}
    for place, use in enumerate(uses):
        whole = use.share * use.units
        known, left = found.get(_part(place, use), (whole, 1.0))
        found[_part(place, use)] = (
            max(known, whole),
            left * counts.get(use.group, use.units) / use.units,
        )
    return {part: (whole, whole * left) for part, (whole, left) in found.items()}


def _part(place: int, use: AxisUse) -> int:
    return use.part if use.part >= 0 else -1 - place
