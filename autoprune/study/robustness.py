"""What was measured of robustness in a study, kept beside it so that it is measured once. Torch-free."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from autoprune.errors import StorageError
from autoprune.measure.record import Robustness
from autoprune.naming import StudyPaths
from autoprune.study.artifacts import MANIFEST, write_text_atomic
from autoprune.study.integrity import opened, sealed, set_aside
from autoprune.study.reading import read_json

# Another one for every change of what is measured, or how.
PROTOCOL = 1
_log = logging.getLogger(__name__)


class Entry(BaseModel):
    """One measurement.

    Attributes:
        model: SHA-256 of the model file.
        data: Fingerprint of the data.
        protocol: Number of the way of measuring.
        result: What was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    data: str
    protocol: int
    result: Robustness


class RobustnessCache:
    """Measurements by the content of the model file and of the data.

    Args:
        paths: Paths of the study.
    """

    def __init__(self, paths: StudyPaths) -> None:
        self._place = paths.robustness
        self._entries: list[Entry] = []
        self._fault = ""
        try:
            found = read_json(self._place)
            self._entries = [Entry.model_validate(opened(entry)) for entry in found]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, ValidationError) as error:
            self._fault = str(error)
            _log.warning("%s cannot be used and is measured again: %s", self._place, error)

    def get(self, model: str, data: str) -> Robustness | None:
        """Return what was measured of a model file on data; None if nothing was."""
        for entry in self._entries:
            if (entry.model, entry.data, entry.protocol) == (model, data, PROTOCOL):
                return entry.result
        return None

    def put(self, model: str, data: str, result: Robustness) -> None:
        """Keep a measurement, on disk too; a file that is damaged is set aside first.

        Raises:
            StorageError: If it cannot be written.
        """
        self._entries.append(Entry(model=model, data=data, protocol=PROTOCOL, result=result))
        if self._fault:
            set_aside(self._place, self._fault)
            self._fault = ""
        content = [sealed(entry.model_dump(mode="json")) for entry in self._entries]
        write_text_atomic(self._place, json.dumps(content, indent=1))


def content_of(folder: Path, name: str) -> str:
    """Return the SHA-256 of one file of an artifact, as its manifest has it.

    Raises:
        StorageError: If the manifest cannot be read or lacks the file.
    """
    try:
        digest = read_json(folder / MANIFEST)[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"artifact {str(folder)!r} is damaged: its manifest lacks {name}", "export or search it again"
        ) from error
    return str(digest)
