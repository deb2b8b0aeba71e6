"""Folders of images, downloads, and what is said where they cannot be used."""

from __future__ import annotations

import functools
import hashlib
import http.server
import pickle
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from autoprune.config import StudyConfig, make_config
from autoprune.errors import UsageError
from autoprune.naming import cache_root, data_root
from autoprune.workloads import download, folders, sources
from autoprune.workloads.catalog import check_inputs
from autoprune.workloads.data import load_data
from autoprune.workloads.folders import fit, scan_folder
from autoprune.workloads.head import IMAGENETTE
from autoprune.workloads.splits import Split
from tests.workloads.conftest import MakeFolder, write_images


def _config(folder: Path, **settings: object) -> StudyConfig:
    return make_config({"model": "cifar_resnet20", "data": f"imagefolder:{folder}", **settings})


def _images(split: Split) -> int:
    return sum(len(target) for _, target in split.batches(16))


@pytest.mark.parametrize(
    ("parts", "report", "from_train"),
    [
        (("train", "test"), 40, True),
        (("train", "val"), 40, True),
        (("train", "val", "test"), 40, False),
        ((), 8, True),
    ],
)
def test_layouts(make_folder: MakeFolder, parts: tuple[str, ...], report: int, from_train: bool) -> None:
    data = load_data(_config(make_folder(parts)))
    assert data.classes == ("a", "b") and data.input_shape == (3, 32, 32)
    assert len(data.report) == _images(data.report.unseal()) == report
    assert data.search_from_train is from_train
    assert len(data.search) == (40 if not from_train else round(0.2 * (40 - (report if not parts else 0))))
    inputs, targets = next(data.search.batches(8))
    assert ((inputs.mean((1, 2, 3)) > 0).long() == targets).all()  # the bright class is the second


def test_images_are_decoded_once_and_then_read_from_the_cache(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder()
    first = [inputs for inputs, _ in load_data(_config(folder)).train.batches(16)]
    kept = list((cache_root() / "decoded").glob("*.npy"))
    assert kept
    monkeypatch.setattr(
        "autoprune.workloads.images.decode", lambda path: pytest.fail(f"{path} decoded again")
    )
    again = [inputs for inputs, _ in load_data(_config(folder)).train.batches(16)]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_a_damaged_cache_file_is_made_anew(make_folder: MakeFolder) -> None:
    folder = make_folder()
    before = next(load_data(_config(folder)).search.batches(8))[0]
    for path in (cache_root() / "decoded").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:200])
    assert (next(load_data(_config(folder)).search.batches(8))[0] == before).all()


def test_content_decides_on_the_fingerprint(make_folder: MakeFolder) -> None:
    folder = make_folder()
    before = load_data(_config(folder)).fingerprint
    assert load_data(_config(folder)).fingerprint == before
    (folder / "train" / "a" / "0000.png").unlink()
    assert load_data(_config(folder)).fingerprint != before


def test_large_images_are_resized_and_cut_like_torchvision_does(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    transform = torchvision.transforms.Compose(
        [torchvision.transforms.Resize(256), torchvision.transforms.CenterCrop(224)]
    )
    assert np.array_equal(fit(image, 224, 256), np.asarray(transform(image)).transpose(2, 0, 1))


def test_large_images_take_the_usual_size_and_the_one_asked_for(make_folder: MakeFolder) -> None:
    folder = make_folder(side=80, count=6, parts=(), classes=("a", "b", "c", "d"))
    assert load_data(_config(folder)).input_shape == (3, 224, 224)
    data = load_data(_config(folder, image_size=48))
    assert data.input_shape == (3, 48, 48) and next(data.train.batches(2))[0].shape == (2, 3, 48, 48)


def test_a_network_that_needs_larger_images_gets_them(make_folder: MakeFolder) -> None:
    assert load_data(_config(make_folder(), model="alexnet")).input_shape == (3, 64, 64)
    with pytest.raises(UsageError, match="image_size 32 is too small for this network; allowed: from 63"):
        load_data(_config(make_folder(), model="alexnet", image_size=32))


def _rename_images(folder: Path) -> None:
    for path in (folder / "train" / "a").iterdir():
        path.rename(path.with_suffix(".txt"))


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _keep_two_images(folder: Path) -> None:
    for path in sorted((folder / "train" / "a").iterdir())[2:]:
        path.unlink()


_IMAGE = Path("train", "a", "0007.png")
_SPOIL: dict[str, Callable[[Path], object]] = {
    "missing": shutil.rmtree,
    "empty": _empty,
    "no images": _rename_images,
    "one class": lambda folder: (folder / "train" / "b").rename(folder / "b"),
    "few": _keep_two_images,
    "no bytes": lambda folder: (folder / _IMAGE).write_bytes(b""),
    "truncated": lambda folder: (folder / _IMAGE).write_bytes((folder / _IMAGE).read_bytes()[:300]),
    "text": lambda folder: (folder / _IMAGE).write_text("not a picture"),
    "no train": lambda folder: (folder / "train").rename(folder / "training"),
    "other classes": lambda folder: (folder / "test" / "b").rename(folder / "test" / "c"),
}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "does not exist"),
        ("empty", "is empty; allowed: DIR/train/CLASS"),
        ("no images", "class 'a' .* holds no images"),
        ("one class", "one class only, 'a'"),
        ("few", "class 'a' .* has 2 images; at least 4"),
        ("no bytes", r"0007\.png' is empty"),
        ("truncated", r"0007\.png' cannot be decoded"),
        ("text", r"0007\.png' cannot be decoded: not an image"),
        ("no train", "lacks train"),
        ("other classes", "has classes that train lacks: c"),
    ],
)
def test_bad_folders_are_named_at_once(make_folder: MakeFolder, how: str, message: str) -> None:
    folder = make_folder()
    _SPOIL[how](folder)
    begun_s = time.monotonic()
    with pytest.raises(UsageError, match=message):
        check_inputs(_config(folder))
    assert time.monotonic() - begun_s < 2.0


def test_a_file_that_is_spoiled_later_is_named_when_it_is_read(make_folder: MakeFolder) -> None:
    folder = make_folder()
    data = load_data(_config(folder))
    (folder / "train" / "b" / "0003.png").write_bytes(b"gone bad")
    with pytest.raises(UsageError, match=r"0003\.png"):
        list(data.train.batches(8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("cifar-10", "did you mean 'cifar10'"),
        ("imagefolder:", "no folder"),
    ],
)
def test_unknown_data(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_inputs(make_config({"model": "resnet18", "data": name}))


def _nette(root: Path, count: int = 6) -> Path:
    for part in ("train", "val"):
        write_images(root / part, sorted(IMAGENETTE), count, side=40)
    return root


def test_imagenette_in_the_data_folder_is_found_without_being_named() -> None:
    _nette(data_root() / "imagenette2-160")
    config = make_config({"model": "resnet18", "weights": "none", "image_size": 32})
    data = load_data(config, say=lambda line: pytest.fail(line))
    assert data.name == "imagenette" and data.classes == tuple(sorted(IMAGENETTE)) and len(data.report) == 60


def test_imagenet_is_preferred_where_it_is_there() -> None:
    _nette(data_root() / "imagenette2-160")
    for part in ("train", "val"):
        write_images(data_root() / "imagenet" / part, ["n00000001", "n00000002"], 12)
    data = load_data(make_config({"model": "resnet18", "weights": "none"}))
    assert data.name == "imagenet" and data.classes == ("n00000001", "n00000002")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Serve a folder on this machine."""
    root = tmp_path / "served"
    root.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=root)
    ) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_imagenette_is_downloaded_checked_and_unpacked(
    server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, url = server
    archive = root / "imagenette2-320.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(_nette(tmp_path / "made"), arcname="imagenette2-320")
    monkeypatch.setattr(sources, "IMAGENETTE_URL", f"{url}/{archive.name}")
    config = make_config({"model": "resnet18", "weights": "none", "image_size": 32, "data": "imagenette"})
    said: list[str] = []
    with pytest.raises(UsageError, match="md5 is"):
        load_data(config, said.append)
    assert not list(data_root().glob("imagenette2*"))
    monkeypatch.setattr(sources, "IMAGENETTE_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(load_data(config, said.append).report) == 60
    assert any("of" in line and "MB" in line for line in said)
    archive.unlink()
    assert len(load_data(config, lambda line: pytest.fail(line)).report) == 60


@pytest.mark.parametrize(
    ("settings", "file"),
    [
        ({"model": "resnet50"}, "imagenette2-320.tgz"),
        ({"model": "resnet18", "data": "imagenette"}, "imagenette2-320.tgz"),
        ({"model": "cifar_resnet20"}, "cifar-10-python.tar.gz"),
        ({"model": "cifar_resnet20", "data": "cifar10"}, "cifar-10-python.tar.gz"),
    ],
)
def test_without_a_network_the_file_and_the_choices_are_named(
    settings: dict[str, str], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UsageError) as raised:
        load_data(make_config(settings), lambda line: None)
    text = str(raised.value)
    assert raised.value.exit_code == 2
    assert all(
        word in text for word in (file, "no route to host", "AUTOPRUNE_DATA", "imagefolder:DIR", "digits")
    )
    assert not list(data_root().glob("*"))


def test_a_look_up_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_TIMEOUT_S", -0.9)  # leaves a tenth of a second
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: time.sleep(3))
    begun_s = time.monotonic()
    with pytest.raises(UsageError, match="no answer"):
        download.fetch("http://x/f", tmp_path / "f", purpose="a test", offline="", say=lambda line: None)
    assert time.monotonic() - begun_s < 2.0


def test_cifar10_is_read_from_torchvisions_files(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torchvision.datasets.CIFAR10
    folder = data_root() / kind.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name: str) -> list[str]:
        pixels = random.integers(0, 256, (100, 3072), dtype=np.uint8)
        return write(name, {"data": pixels, "labels": [i % 10 for i in range(100)]})

    monkeypatch.setattr(kind, "train_list", [batch("data_batch_1"), batch("data_batch_2")])
    monkeypatch.setattr(kind, "test_list", [batch("test_batch")])
    meta = write("batches.meta", {"label_names": [f"class{i}" for i in range(10)]})
    monkeypatch.setattr(kind, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    data = load_data(make_config({"model": "cifar_resnet20", "data": "cifar10"}))
    assert len(data.report) == 100 and data.input_shape == (3, 32, 32)
    assert len(data.train) + len(data.calibration) + len(data.search) == 200
    (folder / "test_batch").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="cannot be read"):
        load_data(make_config({"model": "cifar_resnet20", "data": "cifar10"}))


def test_hidden_files_and_other_suffixes_are_left_out(make_folder: MakeFolder) -> None:
    folder = make_folder()
    before = len(scan_folder(folder).train.files)
    (folder / "train" / "a" / ".hidden.png").write_text("x")
    (folder / "train" / "a" / "notes.txt").write_text("x")
    (folder / "train" / ".cache").mkdir()
    assert len(scan_folder(folder).train.files) == before


def test_other_pixels_of_the_same_size_are_other_content(tmp_path: Path) -> None:
    prints = []
    for name, value in (("one", 10), ("two", 200)):
        for kind in ("a", "b"):
            folder = tmp_path / name / kind
            folder.mkdir(parents=True)
            for number in range(20):
                pixels = np.full((16, 16, 3), number, np.uint8)
                pixels[8, 8] = value
                Image.fromarray(pixels).save(folder / f"{number}.bmp")
        config = make_config(
            {"model": "resnet18", "data": f"imagefolder:{tmp_path / name}", "weights": "none"}
        )
        prints.append(load_data(config).fingerprint)
    assert prints[0] != prints[1]


def test_a_damaged_large_image_is_found_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("train", "val"):
        write_images(tmp_path / part, ["a", "b"], 20, side=80)
    monkeypatch.setattr(folders, "_check_sample", lambda part: {(80, 80), (81, 81)})
    config = make_config(
        {"model": "resnet18", "data": f"imagefolder:{tmp_path}", "weights": "none", "image_size": 96}
    )
    load_data(config)
    damaged = sorted((tmp_path / "val").rglob("*.*"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(UsageError, match=damaged.name):
        load_data(config)
