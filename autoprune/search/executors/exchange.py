"""How artifacts pass between the driver's study folder and workers that may not see it."""

from __future__ import annotations

import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from autoprune.errors import WorkerError
from autoprune.naming import StudyPaths
from autoprune.search.events import WorkerState
from autoprune.search.executors.contract import Executor, Reference, Reply, Request
from autoprune.study.artifacts import MANIFEST, commit_folder, write_text_atomic
from autoprune.study.mirror import Mirror

_MARK = ".driver"


@dataclass(frozen=True)
class Mark:
    """A file in the study's folder by whose content a worker knows that it sees the driver's own.

    Attributes:
        path: The file.
        content: What the driver wrote into it.
    """

    path: Path
    content: str

    @classmethod
    def leave(cls, paths: StudyPaths) -> Mark:
        """Write a new mark into a study's folder."""
        mark = cls(paths.root.absolute() / _MARK, secrets.token_hex(16))
        write_text_atomic(mark.path, mark.content)
        return mark

    @property
    def is_seen(self) -> bool:
        """Whether this process sees the file as it was written."""
        try:
            return self.path.read_text(encoding="utf-8") == self.content
        except OSError:
            return False


@dataclass(frozen=True)
class Exchange:
    """How a worker reaches artifacts: in the driver's folder where it sees that, else through the mirror.

    Attributes:
        mark: The mark in the driver's folder.
        mirror: Storage that all nodes reach; None where there is none.
    """

    mark: Mark
    mirror: Mirror | None = None

    def check(self) -> None:
        """Refuse a node that reaches neither.

        Raises:
            WorkerError: If it does; names the node.
        """
        if not self.mark.is_seen and self.mirror is None:
            raise WorkerError(
                f"node {socket.gethostname()!r} does not see the study's folder {str(self.mark.path.parent)!r}",
                "let AUTOPRUNE_STUDIES be a folder that all nodes share, or give --artifacts DIR|URL",
            )

    def here(self, folder: Path | None) -> Path | None:
        """Return where an artifact of the driver's lies for this process, fetched if need be."""
        if folder is None or self.mark.is_seen or self.mirror is None:
            return folder
        place = _cache() / f"{self.mark.content}-{folder.name}"
        if not place.is_dir():
            self.mirror.pull(folder.name, place)
        return place

    def reference(self, reference: Reference) -> Reference:
        """Return the reference with the folder where it lies for this process."""
        return replace(reference, folder=self.here(reference.folder) or reference.folder)

    @contextmanager
    def request(self, request: Request) -> Iterator[Request]:
        """Return a request with the folders that this process has."""
        own, start = self.here(request.own), self.here(request.start)
        if self.mark.is_seen or self.mirror is None or request.folder is None:
            yield replace(request, own=own, start=start)
            return
        with tempfile.TemporaryDirectory(prefix="autoprune-trial-") as temporary:
            folder = Path(temporary) / "made"
            folder.mkdir()
            yield replace(request, folder=folder, own=own, start=start)

    def hand_over(self, done: Request, request: Request) -> None:
        """Bring what was made of a request to where the driver finds it.

        Args:
            done: The request with this process's folders.
            request: The request as the driver sent it.
        """
        if self.mirror is None or done.folder is None or done.folder == request.folder:
            return
        whole = done.folder.with_name("whole")
        commit_folder(done.folder, whole)
        self.mirror.push(whole, inbox(request, self.mark))


@cache
def _cache() -> Path:
    """Return a folder that this process alone has."""
    return Path(tempfile.mkdtemp(prefix="autoprune-artifacts-"))


_INBOX = "inbox-"


def inbox(request: Request, mark: Mark) -> str:
    """Return the name under which a request's artifact is handed over: of this run alone."""
    return f"{_INBOX}{mark.content[:16]}-{request.token}"


class MirroredExecutor:
    """An executor whose workers may not see the study's folder: artifacts pass through the mirror.

    Args:
        inner: Who has the workers.
        mirror: Storage that all nodes reach.
        mark: The driver's mark in the study's folder.
    """

    def __init__(self, inner: Executor, mirror: Mirror, mark: Mark) -> None:
        self._inner = inner
        self._mirror = mirror
        self._mark = mark
        self._there: set[tuple[str, int]] = set()
        for name in mirror.names(_INBOX):  # what workers of an earlier run handed over to nobody
            mirror.remove(name)

    @property
    def size(self) -> int:
        """Requests that run side by side."""
        return self._inner.size

    def adopt_dense(self, reference: Reference) -> None:
        """Put the dense artifact on the mirror and tell the workers."""
        self._put(reference.folder)
        self._inner.adopt_dense(reference)

    def next_token(self) -> int:
        """Return a number that no other request has."""
        return self._inner.next_token()

    def run(self, request: Request) -> Reply:
        """Put what a request needs on the mirror, let a worker do it, and fetch what it left there."""
        for folder in (request.own, request.start):
            self._put(folder)
        reply = self._inner.run(request)
        name = inbox(request, self._mark)
        if request.folder is not None and self._mirror.has(name):
            whole = request.folder / ".whole"
            self._mirror.pull(name, whole)
            for path in whole.iterdir():
                if path.name != MANIFEST:
                    path.rename(request.folder / path.name)
            shutil.rmtree(whole)
            self._mirror.remove(name)
        return reply

    def _put(self, folder: Path | None) -> None:
        if folder is None:
            return
        manifest = folder / MANIFEST
        version = (folder.name, manifest.stat().st_mtime_ns if manifest.is_file() else 0)
        if version not in self._there:
            self._mirror.push(folder, folder.name)
            self._there.add(version)

    def states(self) -> tuple[WorkerState, ...]:
        """Return what each worker does now."""
        return self._inner.states()

    def stop(self) -> None:
        """End all that runs at once."""
        self._inner.stop()

    def close(self) -> None:
        """Let all workers go; nothing of them is left running."""
        self._inner.close()
