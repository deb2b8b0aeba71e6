"""The shelf: what a driver keeps of its study on shared storage, so that it can be started again on any node."""

from __future__ import annotations

import math
import time
from pathlib import Path

from autoprune.config import StudyConfig
from autoprune.naming import StudyPaths
from autoprune.study.mirror import Mirror

_KEPT = "trial-"
_EVERY_S = 60.0


class Shelf:
    """Keeps a study's folder in step with its mirror; does nothing where there is none.

    Args:
        mirror: Storage that all nodes reach; None keeps everything in the study's folder alone.
        paths: Where the study lies here.
    """

    def __init__(self, mirror: Mirror | None, paths: StudyPaths) -> None:
        self._mirror = mirror
        self._paths = paths
        # Artifacts on the storage that this run knows of: no other driver's are ever removed.
        self._known: set[str] = set()
        self._tidied_s = -math.inf

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
        """Bring back what this node lacks of the study; return the artifacts that were fetched.

        Whoever drove the study last, here or elsewhere, left the small files as they were after their last trial.
        """
        if self._mirror is None:
            return []
        own = {path.name for path in self._paths.artifacts.glob(f"{_KEPT}*")}
        names = [name for name in self._mirror.names(_KEPT) if name not in own]
        for name in names:
            self._mirror.ensure(self._paths, name)
        # Settings last: a folder without them is none of a study, so that a restore that was cut off begins anew.
        for name in sorted(self._mirror.files(), key=lambda name: name == self._paths.settings.name):
            self._mirror.pull_file(name, self._paths.root / name)
        self._known = own | set(names)
        return names

    def put(self, folder: Path) -> None:
        """Keep an artifact before the trial that it belongs to is acknowledged.

        Raises:
            StorageError: If the storage does not take it.
        """
        if self._mirror is not None:
            self._mirror.push(folder, folder.name)
            self._known.add(folder.name)

    def tidy(self, *, at_once: bool = False) -> None:
        """Keep the small files as they are now, and no artifact that this run discarded; at most once a minute."""
        now_s = time.monotonic()
        if self._mirror is None or (not at_once and now_s - self._tidied_s < _EVERY_S):
            return
        self._tidied_s = now_s
        self._mirror.push_files(self._paths)
        for name in sorted(self._known):
            if not (self._paths.artifacts / name).is_dir():
                self._mirror.remove(name)
                self._known.discard(name)

    def forget(self) -> None:
        """Keep nothing of a study that is begun anew; :meth:`restore` brought it here, where it is set aside."""
        if self._mirror is not None:
            for name in self._mirror.names(_KEPT):
                self._mirror.remove(name)
            self._known.clear()
