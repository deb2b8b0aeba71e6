"""Networks by name, weights from files, and classifiers fitted to the data."""

from __future__ import annotations

import functools
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from autoprune.config import make_config
from autoprune.errors import UsageError
from autoprune.naming import data_root
from autoprune.workloads import models
from autoprune.workloads.catalog import CIFAR_RESNETS, check_inputs, parse_model, torchvision_names
from autoprune.workloads.cifar_resnet import cifar_resnet
from autoprune.workloads.head import IMAGENETTE, find_head, fit_head, probe
from autoprune.workloads.models import load_network
from autoprune.workloads.weights import load_state
from autoprune.workloads.workload import TOP1, load_workload
from tests.workloads.conftest import MakeFolder, write_images

LETTERS = ("a", "b", "c")


def _network(
    name: str, weights: str | None = "none", side: int = 32, classes: tuple[str, ...] = LETTERS
) -> Any:
    return load_network(
        parse_model(name), weights, classes, (3, side, side), seed=0, trusted=True, say=lambda line: None
    )


def test_names_are_torchvisions_own() -> None:
    assert set(torchvision_names()) == set(torchvision.models.list_models(module=torchvision.models))


def test_names_are_checked_without_torch() -> None:
    code = (
        "import sys; from autoprune.config import make_config; from autoprune.workloads.catalog import check_inputs; "
        "check_inputs(make_config({'model': 'resnet50', 'data': 'digits'})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet51", "'resnet50'"), ("cifar_resnet21", "'cifar_resnet20'"), ("moblienet_v2", "'mobilenet_v2'")],
)
def test_unknown_models_get_near_matches_at_once(name: str, near: str) -> None:
    begun_s = time.monotonic()
    with pytest.raises(UsageError, match=f"unknown model {name!r}; did you mean .*{near}"):
        check_inputs(make_config({"model": name, "data": "digits"}))
    assert time.monotonic() - begun_s < 2.0


@pytest.mark.parametrize(("name", "params"), [("cifar_resnet20", 269_722), ("cifar_resnet56", 853_018)])
def test_cifar_resnets_have_the_sizes_of_the_paper(name: str, params: int) -> None:
    assert sum(p.numel() for p in cifar_resnet(name).parameters()) == params
    assert name in CIFAR_RESNETS


def test_shared_weights_reach_their_accuracy(shared: Path) -> None:
    """On 500 of the 10,000 test images, of which the network has 87.8 % right."""
    import zipfile
    from io import BytesIO

    from PIL import Image

    from autoprune.workloads.folders import fit

    loaded = _network(
        "cifar_resnet20", str(shared / "cifar_resnet20.safetensors"), classes=tuple("0123456789")
    )
    assert (
        loaded.trained and loaded.seen and loaded.source.startswith("file cifar_resnet20.safetensors sha256:")
    )
    with zipfile.ZipFile(shared / "cifar10-jpeg.zip") as archive:
        names = sorted(n for n in archive.namelist() if "test/" in n and n.endswith(".jpg"))[::20]
        classes = sorted({name.split("/")[-2] for name in names})
        pixels = [
            torch.from_numpy(fit(Image.open(BytesIO(archive.read(name))).convert("RGB"), 32, 32))
            for name in names
        ]
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
        torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
    )
    inputs = (torch.stack(pixels).float() / 255 - mean) / std
    targets = torch.tensor([classes.index(name.split("/")[-2]) for name in names])
    with torch.no_grad():
        accuracy = TOP1.score(loaded.model(inputs), targets)
    assert len(names) == 500 and 0.84 < accuracy < 0.92


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("resnet18", 32),
        ("googlenet", 32),
        ("vit_b_32", 64),
        ("squeezenet1_1", 32),
        ("mobilenet_v3_small", 32),
    ],
)
def test_torchvision_models_get_the_datas_classes(name: str, side: int) -> None:
    loaded = _network(name, side=side)
    assert probe(loaded.model, (3, side, side)).shape == (2, 3)
    assert loaded.trained is False and loaded.source == "random" and not loaded.seen
    assert isinstance(
        loaded.model.train()(torch.zeros(2, 3, side, side)), torch.Tensor
    )  # no auxiliary outputs


def test_random_weights_follow_from_the_seed() -> None:
    state = torch.get_rng_state()
    first, second = _network("cifar_resnet20").model, _network("cifar_resnet20").model
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_an_impossible_size_is_explained() -> None:
    with pytest.raises(UsageError, match=r"vit_b_16.*(3, 40, 40).*\n.*image_size=224"):
        _network("vit_b_16", side=40)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_a_restricted_classifier_equals_slicing(name: str) -> None:
    model = _network(name, classes=tuple(map(str, range(1000)))).model
    inputs = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        full = model(inputs)
        classes = sorted(IMAGENETTE)
        fitted = fit_head(model, classes, (3, 32, 32), of_imagenet=True)
        assert fitted.kept and "restricted from 1000" in fitted.note
        assert torch.allclose(
            model(inputs), full[:, [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]], atol=1e-6
        )


def test_a_replaced_classifier_is_named_and_counts_as_untrained(tmp_path: Path) -> None:
    path = tmp_path / "ten.safetensors"
    save_file(cifar_resnet("cifar_resnet20", 10).state_dict(), path)
    loaded = _network("cifar_resnet20", str(path))
    assert loaded.trained is False and not loaded.seen
    assert loaded.notes == ("classifier 'linear' replaced: 10 outputs, now the data's 3 classes",)
    assert probe(loaded.model, (3, 32, 32)).shape == (2, 3)
    assert torch.equal(loaded.model.state_dict()["conv1.weight"], load_state(path)["conv1.weight"])


def test_imagenets_weights_for_1000_other_classes_are_untrained() -> None:
    model = _network("resnet18", classes=tuple(map(str, range(1000)))).model
    assert not fit_head(model, [f"class{i}" for i in range(1000)], (3, 32, 32), of_imagenet=True).kept


def test_head_is_found_by_its_width() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Linear(4, 7), nn.Linear(7, 9))
    assert find_head(model, 7) == "1"
    with pytest.raises(UsageError, match="with 6 outputs"):
        find_head(model, 6)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Any]]:
    """Serve made-up weights of ResNet-18 in the place of torchvision's."""
    from torchvision.models import ResNet18_Weights

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    served = tmp_path / "served"
    served.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=served)
    ) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            torch.save(torchvision.models.resnet18(weights=None).state_dict(), served / "raw")
        import hashlib

        digest = hashlib.sha256((served / "raw").read_bytes()).hexdigest()[:8]
        (served / "raw").rename(served / f"resnet18-{digest}.pth")
        url = f"http://127.0.0.1:{running.server_address[1]}/resnet18-{digest}.pth"
        entry = ResNet18_Weights.DEFAULT
        monkeypatch.setattr(type(entry), "url", property(lambda self: url), raising=False)
        yield served, entry
        running.shutdown()


def test_pretrained_weights_for_imagenettes_classes(hub: tuple[Path, Any]) -> None:
    served, entry = hub
    for part in ("train", "val"):
        write_images(data_root() / "imagenette2-160" / part, sorted(IMAGENETTE), 4, side=80)
    workload = load_workload(make_config({"model": "resnet18"}), say=lambda line: None)
    state = load_state(next(served.glob("*.pth")))
    rows = [IMAGENETTE[name] for name in workload.data.classes]
    assert torch.equal(workload.model.state_dict()["fc.weight"], state["fc.weight"][rows])
    assert (
        workload.dense_trained
        and workload.search_split_seen
        and "ResNet18_Weights" in workload.weights_source
    )
    assert workload.data.input_shape == (3, 224, 224)
    assert any("restricted from 1000" in note for note in workload.notes)


def test_pretrained_weights_for_other_classes_are_trained_further(
    hub: tuple[Path, Any], make_folder: MakeFolder
) -> None:
    config = {"model": "resnet18", "data": f"imagefolder:{make_folder()}"}
    workload = load_workload(make_config({**config, "weights": "DEFAULT"}), say=lambda line: None)
    assert not workload.dense_trained and not workload.search_split_seen
    assert any("'fc' replaced" in note for note in workload.notes)
    assert load_workload(make_config(config), say=lambda line: None).weights_source == "random"


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UsageError) as raised:
        models._pretrained("resnet50", sorted(IMAGENETTE), (3, 224, 224), lambda line: None)
    for text in (
        "resnet50-11ad3fa6.pth",
        "no route to host",
        "--weights FILE",
        "--weights none",
        "--data digits",
    ):
        assert text in str(raised.value)
