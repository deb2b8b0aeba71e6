"""A worker on another node ends with the driver's network and data, or says what differs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from autoprune.compress.surgery import prune
from autoprune.config import StudyConfig, make_config
from autoprune.errors import UsageError
from autoprune.search.bench import as_groups_say, discover
from autoprune.space.groups import Groups
from autoprune.workloads import models
from autoprune.workloads.catalog import Spec
from autoprune.workloads.data import load_data
from autoprune.workloads.download import Say
from autoprune.workloads.models import load_network, rebuild_network
from autoprune.workloads.packing import archive_bytes, pack_data
from autoprune.workloads.pickling import picklable
from autoprune.workloads.shipment import Shipment, ship, shipped_data_word
from autoprune.workloads.shipping import load_shipped
from autoprune.workloads.weights import apply_state, state_digest
from autoprune.workloads.workload import TOP1, Metric, Workload, load_workload, workload_from_objects
from tests.workloads.conftest import MakeFolder, write_images

SILENT: Say = lambda _: None  # noqa: E731 - a name for a value
NET = '''
import torch
from torch import nn


class Net(nn.Module):
    """Its forward pass holds a number of channels, so that it is rewritten as a graph."""

    def __init__(self, classes):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, stride=4), nn.BatchNorm2d(6)
        self.second, self.head = nn.Conv2d(6, 8, 3), nn.Linear(8, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = self.second(x.view(-1, 6, x.shape[2], x.shape[3]))
        return self.head(x.mean((2, 3)))


def make(num_classes):
    return Net(num_classes)
'''


class Net(nn.Module):
    """A network of the user's own, which is rewritten as a graph too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3)
        self.second = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)).view(-1, 6, 6, 6)
        y: Tensor = self.second(x).mean((2, 3))
        return y


@dataclass
class Driver:
    """What a driver has after its discovery and training."""

    config: StudyConfig
    workload: Workload
    groups: Groups
    given: Workload | None = None


def trained(workload: Workload) -> Workload:
    """Stand in for training: every tensor changes, those of BatchNorm too."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in workload.model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.05 * torch.rand(value.shape, generator=generator))
            else:
                value.add_(3)
    return replace(workload, dense_trained=True, weights_source="trained here")


def drive(config: StudyConfig, groups: Groups | None = None) -> Driver:
    workload = load_workload(config, SILENT)
    if groups is None:
        workload, groups = discover(workload)
    else:
        workload = as_groups_say(workload, groups)
    return Driver(config, trained(workload), groups)


def worker_of(driver: Driver, shipment: Shipment, **means: Any) -> Workload:
    return load_shipped(shipment, prepare=partial(as_groups_say, groups=driver.groups), say=SILENT, **means)


def check_same(driver: Driver, theirs: Workload) -> None:
    """Both have one network and one data, and cutting the network gives the same."""
    ours = driver.workload
    assert state_digest(theirs.model) == state_digest(ours.model)
    inputs = next(ours.data.search.batches(4, limit=4))[0]
    assert torch.equal(next(theirs.data.search.batches(4, limit=4))[0], inputs)
    with torch.no_grad():
        assert torch.equal(theirs.model(inputs), ours.model(inputs))
        plan = {g.name: tuple(range(0, g.size, 2)) for g in driver.groups.prunable}
        cut = [prune(model, driver.groups, plan)(inputs) for model in (theirs.model, ours.model)]
    assert torch.equal(*cut)
    assert theirs.data.fingerprint == ours.data.fingerprint
    assert torch.equal(
        theirs.data.train.training_batch(3, 4, 1)[0], ours.data.train.training_batch(3, 4, 1)[0]
    )
    assert theirs.dense_trained
    told = ("name", "weights_source", "search_split_seen", "notes", "loss", "training_step")
    assert [getattr(theirs, key) for key in told] == [getattr(ours, key) for key in told]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "here" / "net.py"
    path.parent.mkdir()
    path.write_text(NET)
    return path


@pytest.fixture(scope="module")
def groups_of_net(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    """The groups of the network in ``NET``, found once: that takes seconds."""
    path = tmp_path_factory.mktemp("net") / "net.py"
    path.write_text(NET)
    config = make_config({"model": f"{path}:make", "data": "digits", "trust_code": True})
    groups = drive(config).groups
    assert groups.rewritten
    return groups


@pytest.fixture
def rewritten(code: Path, groups_of_net: Groups) -> Driver:
    config = make_config({"model": f"{code}:make", "data": "digits", "trust_code": True})
    return drive(config, groups_of_net)


# -- the same network ------------------------------------------------------------------------


def test_a_network_by_name_is_the_drivers() -> None:
    config = make_config({"model": "resnet18", "data": "digits", "weights": "none"})
    # Groups of the network itself change nothing of it.
    driver = drive(config, Groups(groups=(), input_shape=(3, 32, 32)))
    sent = ship(driver.workload, config).model_dump_json()
    check_same(driver, worker_of(driver, Shipment.model_validate_json(sent)))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "cifar_resnet20"])
def test_a_network_by_name_is_the_drivers_after_its_discovery(model: str) -> None:
    config = make_config({"model": model, "data": "digits", "weights": "none"})
    driver = drive(config)
    assert driver.groups.rewritten == (model == "cifar_resnet20")
    check_same(driver, worker_of(driver, ship(driver.workload, config)))


WORKER = """
import sys
from functools import partial
from pathlib import Path
import torch
from autoprune.compress.surgery import prune
from autoprune.search.bench import as_groups_say
from autoprune.space.groups import Groups
from autoprune.workloads.shipping import Shipment, load_shipped
from autoprune.workloads.weights import state_digest
place = Path(sys.argv[1])
groups = Groups.model_validate_json((place / "groups.json").read_text())
shipment = Shipment.model_validate_json((place / "shipment.json").read_text())
workload = load_shipped(
    shipment, prepare=partial(as_groups_say, groups=groups), weights=place / "weights.safetensors"
)
plan = {g.name: tuple(range(0, g.size, 2)) for g in groups.prunable}
inputs = next(workload.data.search.batches(4, limit=4))[0]
with torch.no_grad():
    outputs = [model(inputs) for model in (workload.model, prune(workload.model, groups, plan))]
torch.save(outputs, place / "outputs.pt")
print(state_digest(workload.model), workload.data.fingerprint)
"""


def test_a_network_written_as_a_graph_is_the_drivers_in_another_process_and_folder(
    rewritten: Driver, code: Path, tmp_path: Path
) -> None:
    place, node = tmp_path / "sent", tmp_path / "node"
    place.mkdir()
    node.mkdir()
    shipment = ship(rewritten.workload, rewritten.config, folder=place)
    assert shipment.weights == b""
    (place / "shipment.json").write_text(shipment.model_dump_json())
    (place / "groups.json").write_text(rewritten.groups.model_dump_json())
    # The node has no copy of the user's file.
    code.unlink()
    environment = {**os.environ, "AUTOPRUNE_CACHE": str(node / "cache"), "AUTOPRUNE_DATA": str(node / "data")}
    found = subprocess.run(
        [sys.executable, "-c", WORKER, str(place)],
        capture_output=True, text=True, timeout=240, cwd=node, env=environment, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    ours = rewritten.workload
    assert found.stdout.split() == [state_digest(ours.model), ours.data.fingerprint]
    inputs = next(ours.data.search.batches(4, limit=4))[0]
    plan = {g.name: tuple(range(0, g.size, 2)) for g in rewritten.groups.prunable}
    with torch.no_grad():
        whole, cut = ours.model(inputs), prune(ours.model, rewritten.groups, plan)(inputs)
    theirs = torch.load(place / "outputs.pt")
    assert torch.equal(theirs[0], whole)
    assert torch.equal(theirs[1], cut)
    assert not torch.equal(whole, cut)


def own_workload(**given: Any) -> tuple[StudyConfig, Workload]:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(120, 1, 8, 8, generator=generator), torch.arange(120) % 4
    config = make_config({"model": "Net", "data": "given"})
    data = given.pop("data", (TensorDataset(images, labels), TensorDataset(images[:40], labels[:40])))
    return config, workload_from_objects(given.pop("model", Net()), data, config=config, **given)


def test_a_network_of_the_users_own_is_the_drivers() -> None:
    config, given = own_workload(loss=F.multi_margin_loss)
    workload, groups = discover(given)
    assert groups.rewritten
    driver = Driver(config, trained(workload), groups, given)
    list(given.data.search.batches(4))  # what is kept of examples does not travel
    shipment = ship(driver.workload, config, given=given)
    assert len(shipment.pickled) < len(picklable(replace(given, model=nn.Identity()))) + 10_000
    theirs = worker_of(driver, Shipment.model_validate_json(shipment.model_dump_json()))
    check_same(driver, theirs)
    assert theirs.metric == given.metric
    assert theirs.data.report.unseal().fingerprint == given.data.report.fingerprint


def test_googlenet_is_rebuilt_as_its_own_weights_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision builds some networks in another way where it gives them its weights."""
    import torchvision

    torch.manual_seed(0)
    state = torchvision.models.get_model("googlenet", weights=None, init_weights=False).state_dict()
    kind = torchvision.models.GoogLeNet_Weights
    monkeypatch.setattr(kind, "get_state_dict", lambda *_, **__: state)
    monkeypatch.setattr(models, "fetch", lambda *_, **__: None)
    monkeypatch.setattr(models, "load_state", lambda _: {})
    spec, classes = Spec("torchvision", "googlenet"), ("n01440764", "n02102040")
    driver = load_network(spec, "DEFAULT", classes, (3, 64, 64), seed=0, trusted=False, say=SILENT).model
    monkeypatch.undo()
    worker = rebuild_network(spec, "DEFAULT", classes, (3, 64, 64), seed=0, trusted=False)
    apply_state(worker, dict(driver.state_dict()), "sent")
    inputs = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(worker(inputs), driver(inputs))
        setattr(worker, "transform_input", False)  # noqa: B010 - torch types attributes as modules
        assert not torch.equal(worker(inputs), driver(inputs))


def test_weights_of_a_network_whose_modules_have_versions_are_taken() -> None:
    import torchvision

    model = torchvision.models.get_model("mnasnet0_5", weights=None, num_classes=4)
    apply_state(model, {name: value.clone() for name, value in model.state_dict().items()}, "sent")


# -- what differs is named -------------------------------------------------------------------


def refused(driver: Driver, shipment: Shipment, **means: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        worker_of(driver, shipment, **means)
    assert caught.value.message.startswith(f"node {socket.gethostname()}: ")
    return caught.value


def test_weights_that_were_damaged_are_refused(rewritten: Driver, tmp_path: Path) -> None:
    shipment = ship(rewritten.workload, rewritten.config)
    broken = shipment.weights[:-1] + bytes([shipment.weights[-1] ^ 1])
    assert "weights are damaged" in str(refused(rewritten, shipment.model_copy(update={"weights": broken})))
    assert "weights are damaged" in str(refused(rewritten, shipment.model_copy(update={"weights": b""})))
    path = tmp_path / "w.safetensors"
    assert repr(str(path)) in str(refused(rewritten, shipment, weights=path))
    path.write_bytes(broken)
    assert repr(str(path)) in str(refused(rewritten, shipment, weights=path))


def test_another_network_is_refused(rewritten: Driver) -> None:
    shipment = ship(rewritten.workload, rewritten.config)
    other = shipment.model_copy(update={"network": "0" * 64})
    assert "its tensors have the digest" in str(refused(rewritten, other))
    outputs = tuple(value + 1.0 for value in shipment.outputs)
    error = refused(rewritten, shipment.model_copy(update={"outputs": outputs}))
    assert "computes other outputs" in str(error)
    resnet = shipment.model_copy(update={"model": "cifar_resnet20", "code": ()})
    with pytest.raises(
        UsageError, match="the network is not the driver's: weights that were shipped do not fit"
    ):
        load_shipped(resnet, say=SILENT)


def test_another_file_of_code_is_refused(rewritten: Driver, code: Path) -> None:
    shipment = ship(rewritten.workload, rewritten.config)
    code.write_text(NET + "\n# changed")
    error = refused(rewritten, shipment)
    assert repr(str(code)) in error.message
    assert "copy the driver's file" in error.hint


@pytest.fixture
def folder(make_folder: MakeFolder) -> Driver:
    config = make_config(
        {"model": "cifar_resnet20", "data": f"imagefolder:{make_folder()}", "weights": "none"}
    )
    return drive(config, Groups(groups=(), input_shape=(3, 32, 32)))


def test_data_that_a_node_lacks_or_has_otherwise_is_named(folder: Driver, tmp_path: Path) -> None:
    shipment = ship(folder.workload, folder.config)
    check_same(folder, worker_of(folder, shipment))
    root = tmp_path / "images"
    root.rename(tmp_path / "moved")
    error = refused(folder, shipment)
    assert str(root) in error.message
    assert "is not there" in error.message
    assert "AUTOPRUNE_DATA" in error.hint
    shutil.copytree(tmp_path / "moved", root)
    next(root.rglob("*.png")).unlink()
    error = refused(folder, shipment)
    assert f"the data in {str(root)!r} differs from the driver's" in error.message
    # The node's data folder counts too.
    (tmp_path / "data").mkdir()
    shutil.copytree(tmp_path / "moved", tmp_path / "data" / "images")
    check_same(folder, worker_of(folder, shipment))


def test_data_are_shipped_where_the_node_lacks_them_alone(folder: Driver, tmp_path: Path) -> None:
    word = shipped_data_word(folder.config)
    pack = pack_data(word, folder.workload.data.fingerprint)
    assert pack is not None
    archive = archive_bytes(pack, word)
    shipment = ship(folder.workload, folder.config, pack=pack)
    worker_of(folder, shipment, archive=lambda: pytest.fail("the node has the data"))
    shutil.rmtree(tmp_path / "images")
    asked = []

    def bring() -> bytes:
        asked.append(1)
        return archive

    for _ in range(2):
        check_same(folder, worker_of(folder, shipment, archive=bring))
    assert asked == [1]


def test_a_relative_folder_means_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images", ("a", "b"), 20)
    monkeypatch.chdir(tmp_path)
    config = make_config({"model": "cifar_resnet20", "data": "imagefolder:images"})
    assert shipped_data_word(config) == f"imagefolder:{tmp_path}/images"
    assert shipped_data_word(make_config({"model": "resnet18"})) == "imagenette"


def test_data_set_lacking_by_name_is_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_images(tmp_path / "data" / "imagenette2-320" / part, ("n01440764", "n02102040"), 20)
    config = make_config({"model": "cifar_resnet20", "data": "imagenette", "weights": "none"})
    driver = drive(config, Groups(groups=(), input_shape=(3, 32, 32)))
    shipment = ship(driver.workload, config)
    monkeypatch.setenv("AUTOPRUNE_DATA", str(tmp_path / "elsewhere"))
    monkeypatch.setattr("autoprune.workloads.sources.fetch", lambda *_, **__: pytest.fail("downloads"))
    assert str(tmp_path / "elsewhere") in refused(driver, shipment).message


# -- what cannot be pickled ------------------------------------------------------------------


class Locked(Dataset[tuple[Tensor, int]]):
    """A data set that keeps a lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.targets = [i % 2 for i in range(60)]

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(1, 8, 8), self.targets[index]


def local_network() -> nn.Module:
    class Local(Net):
        pass

    return Local()


def locked_network() -> nn.Module:
    net = Net()
    net.second.guard = threading.Lock()  # type: ignore[assignment]
    return net


@pytest.mark.parametrize(
    ("part", "given", "says"),
    [
        ("loss", lambda out, target: F.cross_entropy(out, target), "the loss, .*<lambda>"),
        ("training_step", lambda net, batch: net(batch[0]).sum(), "the training step, .*<lambda>"),
        ("metric", Metric("m", "fraction", lambda *_: 0.5), "the metric's score, .*<lambda>"),
        ("metric", Metric("m", "fraction", TOP1.score, lambda *_: torch.ones(1)), "per_example, .*<lambda>"),
        ("data", Locked(), "the train data, a Locked"),
        ("model", local_network, "own class, .*Local"),
        ("model", locked_network, "attribute 'second.guard', a lock"),
    ],
)
def test_what_cannot_be_sent_is_named_with_what_to_do(part: str, given: Any, says: str) -> None:
    if part == "model":
        config, workload = own_workload()
        workload = replace(workload, model=given())
    else:
        config, workload = own_workload(**{part: given})
    with pytest.raises(UsageError, match=f"{says}.*, cannot be sent to workers: ") as caught:
        ship(workload, config, given=workload)
    assert "top level of a module" in caught.value.hint


def test_another_way_of_pickling_may_take_more() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    config, workload = own_workload(loss=lambda out, target: 2.0 * F.cross_entropy(out, target))
    shipment = ship(workload, config, given=workload, dumps=cloudpickle.dumps)
    theirs = load_shipped(shipment, say=SILENT)
    outputs, targets = torch.randn(3, 4), torch.arange(3)
    assert theirs.loss(outputs, targets).item() == pytest.approx(
        2.0 * F.cross_entropy(outputs, targets).item()
    )


def test_settings_come_back_as_they_were() -> None:
    values = {"model": "cifar_resnet20", "data": "digits", "weights": "none", "target": "onnxruntime:threads=1",
              "also": ["torch"], "limits": {"min_accuracy": 0.5}, "objectives": "accuracy,size"}  # fmt: skip
    config = make_config(values)
    driver = drive(config, Groups(groups=(), input_shape=(3, 32, 32)))
    sent = Shipment.model_validate_json(ship(driver.workload, config).model_dump_json())
    assert sent.config == config
    assert load_data(sent.config).fingerprint == sent.data_fingerprint
