"""Screens: recipes that were looked at without exporting them, one JSON line each beside the study's database.

They are no trials: their latency and size are predictions, so no front and no sampler's record may hold them. A line
that a killed run left half written, or that is not what was written, is left out; what it told is cheap to find again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, ValidationError

from autoprune.errors import StorageError
from autoprune.naming import StudyPaths
from autoprune.space.recipe import Recipe
from autoprune.study.database import storage_faults
from autoprune.study.integrity import seal, unseal
from autoprune.study.place import Place
from autoprune.study.reading import read_bytes

_log = logging.getLogger(__name__)


class Screen(BaseModel):
    """One recipe that was screened.

    Attributes:
        recipe: The whole candidate.
        arm: Who proposed it.
        label: For people; empty for proposals.
        weights: What the sampler over the solver's weights chose for it; empty for other arms.
        lost: Capability lost against the dense network on the same examples, after closed-form recovery alone.
        size_ratio: Predicted bytes as a share of the dense file.
        latency_ratio: Predicted latency as a share of the dense network's.
        duration_s: Seconds that it took.
        proposal_s: Seconds that choosing it took.
        ended_s: Seconds of the study that were spent when it ended.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe
    arm: str
    label: str = ""
    weights: dict[str, float] = {}
    lost: float
    size_ratio: float
    latency_ratio: float
    duration_s: float
    proposal_s: float = 0.0
    ended_s: float = 0.0


def append_screens(paths: StudyPaths, screens: Sequence[Screen]) -> None:
    """Add screens to the study's."""
    with storage_faults(Place(paths)), paths.screens.open("a+b") as file:
        torn = file.tell() > 0 and _last_byte(paths) != b"\n"
        text = "".join(seal(screen.model_dump(mode="json")) + "\n" for screen in screens)
        file.write((b"\n" if torn else b"") + text.encode())


def read_screens(paths: StudyPaths) -> list[Screen]:
    """Return the study's screens in the order in which they were made; none where there are none."""
    try:
        lines = read_bytes(paths.screens).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{str(paths.screens)!r} cannot be read: {error}", "take the file away") from error
    found, damaged = [], 0
    for line in lines:
        try:
            found.append(Screen.model_validate(unseal(line.decode())))
        except (ValueError, ValidationError):
            damaged += line != b""
    if damaged:
        _log.warning("%s: %d of its lines are damaged or half written and left out", paths.screens, damaged)
    return found


def _last_byte(paths: StudyPaths) -> bytes:
    with paths.screens.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1)
