"""Data packed for nodes that lack it: a list of files with hashes, one archive, unpacked whole into a node's cache.

What is unpacked is decided by the list, which comes from the driver, never by the archive.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import shutil
import socket
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from autoprune.disk import file_digest
from autoprune.errors import StorageError, UsageError
from autoprune.naming import cache_root, data_root, inner_parts
from autoprune.workloads.catalog import FOLDER_PREFIX, Spec, parse_data
from autoprune.workloads.folders import scan_folder
from autoprune.workloads.sources import folder_of

DEFAULT_LIMIT_BYTES = 2_000_000_000
# Folder of a pack that holds the images of a folder of any name.
_IMAGES = "images"
_BLOCK = 1 << 20


class PackedFile(BaseModel):
    """One file of a data set.

    Attributes:
        name: Its path inside of the pack.
        size: Its bytes.
        sha256: Its content.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("name")
    @classmethod
    def _inside(cls, name: str) -> str:
        return "/".join(inner_parts(name))


class DataPack(BaseModel):
    """The files of a data set.

    Attributes:
        data: Name of the data set, or ``imagefolder:`` with nothing after it.
        fingerprint: Content hash of the data and its splits; the pack's name everywhere.
        files: The files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$")]
    files: tuple[PackedFile, ...]

    @property
    def name(self) -> str:
        """Name of the pack in the mirror and in a node's cache."""
        return f"data-{self.fingerprint[:32]}"

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def pack_data(data: str, fingerprint: str, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> DataPack | None:
    """List the files of a data set with their sizes and hashes.

    Args:
        data: Name of a data set, or ``imagefolder:DIR``.
        fingerprint: Content hash of the data and its splits.
        limit_bytes: Most bytes of all files.

    Returns:
        The pack; None where every node has the data in a package (``digits``).

    Raises:
        UsageError: If the data's files are not known or not here, or have more bytes than allowed.
    """
    spec = parse_data(data)
    if spec.kind == "digits":
        return None
    if spec.kind == "code":
        raise UsageError(
            f"data {data!r} cannot be shipped: what the function reads is not known",
            "put what it reads where every node finds it, such as a shared folder",
        )
    found = list(_files(spec))
    size = sum(path.stat().st_size for _, path in found)
    if size > limit_bytes:
        raise UsageError(
            f"data {data!r} has {size / 1e9:.2f} GB, above the {limit_bytes / 1e9:.2f} GB that may be shipped to nodes",
            "put it into the folder that AUTOPRUNE_DATA names on every node, or on shared storage under one path, "
            "or raise the limit",
        )
    files = tuple(
        PackedFile(name=name, size=path.stat().st_size, sha256=file_digest(path)) for name, path in found
    )
    return DataPack(
        data=FOLDER_PREFIX if spec.kind == "folder" else spec.name, fingerprint=fingerprint, files=files
    )


def _files(spec: Spec) -> Iterator[tuple[str, Path]]:
    """Yield the files of a data set, each with its name in a pack; hidden ones are left out."""
    folder = folder_of(spec, data_root())
    if folder is None:
        raise UsageError(f"data {spec.name!r} is not on this machine, so that it cannot be shipped")
    top = _IMAGES if spec.kind == "folder" else folder.name
    if spec.kind == "cifar10":
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                yield f"{top}/{path.name}", path
        return
    scanned = scan_folder(folder)
    for part in (scanned.train, scanned.search, scanned.report):
        for path in [part.root / name for name in part.files] if part is not None else []:
            yield f"{top}/{path.relative_to(folder).as_posix()}", path


def write_archive(pack: DataPack, data: str, place: Path | IO[bytes]) -> None:
    """Write the files of a pack into one archive.

    Args:
        pack: What :func:`pack_data` returned.
        data: The data that it was called with.
        place: The archive, or an open file.
    """
    paths = dict(_files(parse_data(data)))
    missing = [file.name for file in pack.files if file.name not in paths]
    if missing:
        raise UsageError(f"data {data!r} changed while it was packed: {missing[0]} is gone", "run again")
    try:
        target = {"name": place} if isinstance(place, Path) else {"fileobj": place}
        with tarfile.open(mode="w", format=tarfile.PAX_FORMAT, **target) as tar:
            for file in pack.files:
                member = tarfile.TarInfo(file.name)
                member.size, member.mode = file.size, 0o644
                with paths[file.name].open("rb") as content:
                    tar.addfile(member, content)
    except OSError as error:
        raise StorageError(
            f"data {data!r} cannot be packed: {error}", "free space, then run again"
        ) from error


def archive_bytes(pack: DataPack, data: str) -> bytes:
    """Return the archive of a pack as bytes; see :func:`write_archive`."""
    result = io.BytesIO()
    write_archive(pack, data, result)
    return result.getvalue()


def unpacked_folder(fingerprint: str) -> Path:
    """Return where a node keeps the unpacked data of this fingerprint."""
    return cache_root() / "shipped" / f"data-{fingerprint[:32]}"


def unpacked_word(pack: DataPack) -> str:
    """Return the data's specification on a node that unpacked it."""
    if pack.data == FOLDER_PREFIX:
        return f"{FOLDER_PREFIX}{unpacked_folder(pack.fingerprint) / _IMAGES}"
    return pack.data


def unpack(pack: DataPack, archive: bytes | Path) -> Path:
    """Unpack an archive into the node's cache, under the data's fingerprint; all files or none.

    Only files of the pack's list are written, each checked by its hash: no links, no other names, no more bytes.

    Returns:
        The folder that takes the place of :func:`autoprune.naming.data_root`.

    Raises:
        StorageError: If the archive is damaged or holds something else, or the cache cannot be written; names both.
    """
    place = unpacked_folder(pack.fingerprint)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Several workers of a node may come at once; one unpacks.
        with _alone(place.with_name(f".{place.name}.lock")):
            if place.is_dir():
                return place
            folder = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=place.parent))
            try:
                _extract(pack, archive, folder)
                folder.chmod(0o755)
                folder.replace(place)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise StorageError(
            f"node {socket.gethostname()}: the data {pack.name} cannot be unpacked into {str(place)!r}: {error}",
            "free space there or name another folder with AUTOPRUNE_CACHE; if the archive is damaged, ship it again",
        ) from error
    return place


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _extract(pack: DataPack, archive: bytes | Path, folder: Path) -> None:
    wanted = {file.name: file for file in pack.files}
    with (
        io.BytesIO(archive) if isinstance(archive, bytes) else archive.open("rb") as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        for member in tar:
            file = wanted.pop(member.name, None)
            if file is None or not member.isreg() or member.size != file.size:
                raise tarfile.TarError(f"the archive holds {member.name[:80]!r}, which is not in its list")
            content = tar.extractfile(member)
            if content is None:  # not of a regular file
                continue
            path = folder.joinpath(*inner_parts(file.name))
            path.parent.mkdir(parents=True, exist_ok=True)
            if _copied(content, path) != file.sha256:
                raise tarfile.TarError(f"{file.name!r} differs from its hash")
    if wanted:
        raise tarfile.TarError(f"the archive lacks {next(iter(wanted))!r}")


def _copied(content: IO[bytes], path: Path) -> str:
    """Write a file and return the hash of what was written."""
    hasher = hashlib.sha256()
    with path.open("xb") as file:
        while block := content.read(_BLOCK):
            hasher.update(block)
            file.write(block)
    return hasher.hexdigest()
