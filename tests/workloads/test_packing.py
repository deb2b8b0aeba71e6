"""Data packed for other nodes: what arrives is what was listed, whatever the archive holds."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from autoprune.config import make_config
from autoprune.errors import StorageError, UsageError
from autoprune.naming import data_root
from autoprune.workloads.data import load_data
from autoprune.workloads.packing import (
    DataPack,
    PackedFile,
    archive_bytes,
    pack_data,
    unpack,
    unpacked_folder,
    unpacked_word,
    write_archive,
)
from tests.workloads.conftest import MakeFolder, write_images

PRINT = "0123456789abcdef" * 4


@pytest.fixture
def packed(make_folder: MakeFolder) -> tuple[DataPack, bytes]:
    word = f"imagefolder:{make_folder(count=5)}"
    pack = pack_data(word, PRINT)
    assert pack is not None
    return pack, archive_bytes(pack, word)


def test_a_folder_arrives_with_the_same_fingerprint(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder(parts=("train", "val", "test"))
    (root / "train" / "a" / ".hidden.png").write_bytes(b"x")
    (root / "notes.txt").write_bytes(b"not part of the data")
    config = make_config({"model": "cifar_resnet20", "data": f"imagefolder:{root}"})
    fingerprint = load_data(config).fingerprint
    pack = pack_data(str(config.data), fingerprint)
    assert pack is not None
    assert len(pack.files) == 120
    write_archive(pack, str(config.data), tmp_path / "data.tar")
    place = unpack(DataPack.model_validate_json(pack.model_dump_json()), tmp_path / "data.tar")
    assert place == unpacked_folder(fingerprint)
    assert len([p for p in place.rglob("*") if p.is_file()]) == 120
    there = config.model_copy(update={"data": unpacked_word(pack)})
    assert load_data(there, root=place).fingerprint == fingerprint


def test_a_data_set_by_name_takes_the_place_of_the_data_folder() -> None:
    for part in ("train", "val"):
        write_images(data_root() / "imagenette2-320" / part, ("n01440764", "n02102040"), 20)
    config = make_config({"model": "cifar_resnet20", "data": "imagenette"})
    fingerprint = load_data(config).fingerprint
    pack = pack_data("imagenette", fingerprint)
    assert pack is not None
    place = unpack(pack, archive_bytes(pack, "imagenette"))
    assert (
        load_data(config.model_copy(update={"data": unpacked_word(pack)}), root=place).fingerprint
        == fingerprint
    )


def test_embedded_data_needs_no_pack() -> None:
    assert pack_data("digits", PRINT) is None


def test_data_that_cannot_be_shipped_says_why(make_folder: MakeFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="what the function reads is not known"):
        pack_data("data.py:make", PRINT)
    with pytest.raises(UsageError, match="is not on this machine"):
        pack_data("imagenet", PRINT)
    word = f"imagefolder:{make_folder()}"
    with pytest.raises(UsageError, match=r"above the 0\.00 GB") as caught:
        pack_data(word, PRINT, limit_bytes=1000)
    assert "AUTOPRUNE_DATA" in caught.value.hint
    pack = pack_data(word, PRINT)
    assert pack is not None
    next((tmp_path / "images").rglob("*.png")).unlink()
    with pytest.raises(UsageError, match="changed while it was packed"):
        archive_bytes(pack, word)


def entry(tar: tarfile.TarFile, name: str, content: bytes = b"x", **kind: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in kind.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def hostile(act: Callable[[tarfile.TarFile, str], None]) -> Callable[[DataPack, bytes], bytes]:
    """Return the archive with another member in front."""

    def make(pack: DataPack, archive: bytes) -> bytes:
        result = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(archive)) as old, tarfile.open(fileobj=result, mode="w") as new:
            act(new, pack.files[0].name)
            for member in old:
                new.addfile(member, old.extractfile(member))
        return result.getvalue()

    return make


ATTACKS: dict[str, Callable[[DataPack, bytes], bytes]] = {
    "a parent": hostile(lambda tar, _: entry(tar, "../outside")),
    "an absolute path": hostile(lambda tar, _: entry(tar, "/tmp/outside")),
    "another name": hostile(lambda tar, _: entry(tar, "images/other.png")),
    "a link": hostile(lambda tar, n: entry(tar, n, b"", type=tarfile.SYMTYPE, linkname="/etc/hostname")),
    "a hard link": hostile(lambda tar, n: entry(tar, n, b"", type=tarfile.LNKTYPE, linkname="/etc/hostname")),
    "a device": hostile(lambda tar, n: entry(tar, n, b"", type=tarfile.CHRTYPE)),
    "a folder": hostile(lambda tar, n: entry(tar, n, b"", type=tarfile.DIRTYPE)),
    "one twice": hostile(lambda tar, n: entry(tar, n)),
    "a flipped bit": lambda _, archive: archive[:600] + bytes([archive[600] ^ 1]) + archive[601:],
    "half": lambda _, archive: archive[: len(archive) // 2],
    "nothing": lambda *_: b"",
    "no archive": lambda *_: b"PK" * 4000,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_archive_that_holds_something_else_is_refused(
    packed: tuple[DataPack, bytes], attack: str, tmp_path: Path
) -> None:
    pack, archive = packed
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(StorageError, match=r"node .* cannot be unpacked") as caught:
        unpack(pack, ATTACKS[attack](pack, archive))
    assert "AUTOPRUNE_CACHE" in caught.value.hint
    after = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert [p.name for p in after] == [f".{pack.name}.lock"]
    unpack(pack, archive)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "a//b", "a\\b", "a\nb"])
def test_a_list_that_leads_outside_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is refused"):
        PackedFile(name=name, size=1, sha256="0" * 64)


def _unpack(pack: DataPack, archive: bytes, results: Any) -> None:
    try:
        results.put(str(unpack(pack, archive)))
    except Exception as error:  # told to the test
        results.put(repr(error))


def test_workers_of_one_node_may_unpack_at_once(packed: tuple[DataPack, bytes]) -> None:
    context = get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_unpack, args=(*packed, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    place = unpacked_folder(packed[0].fingerprint)
    assert [results.get(timeout=60) for _ in workers] == [str(place)] * 4
    for worker in workers:
        worker.join()
    assert len([p for p in place.rglob("*") if p.is_file()]) == len(packed[0].files)


def test_a_full_disk_is_named(packed: tuple[DataPack, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("autoprune.workloads.packing._copied", full)
        with pytest.raises(StorageError, match="No space left on device"):
            unpack(*packed)
    assert not unpacked_folder(packed[0].fingerprint).exists()
