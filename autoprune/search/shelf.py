"""The shelf: what a driver keeps of its study on shared storage, so that it can be started again on any node."""

from __future__ import annotations

from pathlib import Path

from autoprune.config import StudyConfig
from autoprune.naming import StudyPaths
from autoprune.study.mirror import Mirror

_KEPT = "trial-"


class Shelf:
    """Keeps a study's folder in step with its mirror; does nothing where there is none.

    Args:
        mirror: Storage that all nodes reach; None keeps everything in the study's folder alone.
        paths: Where the study lies here.
    """

    def __init__(self, mirror: Mirror | None, paths: StudyPaths) -> None:
        self._mirror = mirror
        self._paths = paths

    @classmethod
    def of(cls, config: StudyConfig, paths: StudyPaths) -> Shelf:
        """Return the shelf of a study.

        Raises:
            UsageError: If the URL cannot be used.
            StorageError: If the storage cannot be written.
        """
        url = config.execution.artifacts
        mirror = None if url is None else Mirror(url, paths.name)
        if mirror is not None:
            mirror.check()
        return cls(mirror, paths)

    def restore(self) -> list[str]:
        """Bring back what this node lacks of the study; return the artifacts that were fetched."""
        if self._mirror is None or self._paths.settings.exists():
            return []
        self._mirror.restore(self._paths)
        names = self._mirror.names(_KEPT)
        for name in names:
            self._mirror.ensure(self._paths, name)
        return names

    def put(self, folder: Path) -> None:
        """Keep an artifact before the trial that it belongs to is acknowledged.

        Raises:
            StorageError: If the storage does not take it.
        """
        if self._mirror is not None:
            self._mirror.push(folder, folder.name)

    def tidy(self) -> None:
        """Keep the small files as they are now, and no artifact that the study's folder does not have any more."""
        if self._mirror is None:
            return
        self._mirror.push_files(self._paths)
        for name in self._mirror.names(_KEPT):
            if not (self._paths.artifacts / name).is_dir():
                self._mirror.remove(name)
