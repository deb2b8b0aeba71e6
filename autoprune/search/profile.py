"""Profile: what every choice for every group costs and buys, measured before the first proposal. Plain data."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from autoprune.space.quantization import INTEGER_BITS
from autoprune.space.shapes import LayerShape
from autoprune.study.artifacts import write_text_atomic
from autoprune.study.integrity import seal, set_aside, unseal

_log = logging.getLogger(__name__)


class CutLoss(BaseModel):
    """How far the outputs move when one group alone is cut and recovered in closed form.

    Attributes:
        group: Name of the group.
        kept: Units that stay.
        criterion: How units were ranked.
        growth: Divergence of the outputs from the dense network's, in nats, under BatchNorm statistics from
            as few images; or growth of the task's loss, see :class:`Profile`.
        measured: Whether the network was run; else it is the gradient's estimate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: str
    kept: int
    criterion: str
    growth: float
    measured: bool


class Timed(BaseModel):
    """One exported network that was timed as a whole.

    Attributes:
        kept: Kept units by group; groups that are not named are whole.
        bits: Bit-width by group; 32 where not named.
        latency_ratio: Latency of the whole against the dense network's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kept: dict[str, int]
    bits: dict[str, int]
    latency_ratio: float


class Design(Timed):
    """One that was timed layer by layer too.

    Attributes:
        layer_s: Seconds of each layer in one inference.
        size_bytes: Bytes of the file.
    """

    layer_s: dict[str, float]
    size_bytes: int


class Profile(BaseModel):
    """All that was measured.

    Attributes:
        measure: What growths are of: the ``divergence`` of outputs from the dense network's, or the task's ``loss``.
        dense_loss: Loss of the dense network on the same examples; 0 for a divergence.
        examples: Examples of the search split that losses are taken over.
        cuts: Loss for groups, widths and criteria.
        int8: Growth of the loss for each group whose layers compute in 8 bits; only measured ones.
        fewer_bits: The same by group and bit-width for weights of fewer bits, whose layers compute in 8.
        designs: Exported networks; the dense one first.
        shapes: Layers as functions of what groups keep.
        seconds: Time that measuring took in all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    measure: Literal["divergence", "loss"] = "loss"
    dense_loss: float
    examples: int
    cuts: tuple[CutLoss, ...] = ()
    int8: dict[str, float] = {}
    fewer_bits: dict[str, dict[int, float]] = {}
    designs: tuple[Design, ...] = ()
    shapes: tuple[LayerShape, ...] = ()
    seconds: float = 0.0

    def rounding(self, group: str, bits: int) -> float:
        """Return the growth of the loss by a group's bit-width, as measured or from the next known one.

        A bit less makes steps twice as large, and the squares of what they change four times.
        """
        known = {**self.fewer_bits.get(group, {}), **({8: self.int8[group]} if group in self.int8 else {})}
        if bits > INTEGER_BITS or not known:
            return 0.0
        nearest = min(known, key=lambda width: (abs(width - bits), width))
        return known[nearest] * 4.0 ** (nearest - bits)


def read_profile(place: Path) -> Profile | None:
    """Return a profile that was written before; None if there is none, or it is damaged, which the log says."""
    try:
        return Profile.model_validate(unseal(place.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        _log.warning("the profile %s cannot be used: %s", place, error)
        return None


def write_profile(place: Path, profile: Profile) -> None:
    """Write a profile with its checksum; a damaged one that is there is set aside.

    Raises:
        StorageError: If it cannot be written.
    """
    if place.exists() and read_profile(place) is None:
        set_aside(place, "it is not what was written")
    write_text_atomic(place, seal(profile.model_dump(mode="json")))
