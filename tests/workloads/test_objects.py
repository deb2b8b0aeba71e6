"""Models and data of the user's own: from a Python file, and as objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autoprune.config import StudyConfig, make_config
from autoprune.errors import UsageError
from autoprune.workloads.head import probe
from autoprune.workloads.workload import TOP1, Metric, load_workload, workload_from_objects

_USER_FILE = """
from pathlib import Path
import torch
from torch import nn
Path({canary!r}).write_text("ran")

def net(num_classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))

def parts():
    y = torch.arange(120) % 3
    x = torch.randn(120, 3, 32, 32) + y.view(-1, 1, 1, 1)
    return (x[:90], y[:90]), (x[90:], y[90:])

def broken():
    raise KeyError("lost")

def number():
    return 3

def needy(path):
    return path
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(_USER_FILE.format(canary=str(tmp_path / "canary")))
    return path


def _user_config(path: Path, model: str = "net", data: str | None = None, **settings: Any) -> StudyConfig:
    return make_config({"model": f"{path}:{model}", "data": data or f"{path}:parts", **settings})


def test_a_users_file_is_not_run_unless_trusted(user_file: Path) -> None:
    for config in (_user_config(user_file), _user_config(user_file, data="digits")):
        with pytest.raises(UsageError, match="--trust-code") as raised:
            load_workload(config)
        assert raised.value.exit_code == 2
    with pytest.raises(UsageError, match="--trust-code"):
        load_workload(make_config({"model": "resnet18", "data": f"{user_file}:parts"}))
    assert not (user_file.parent / "canary").exists()


def test_a_users_model_and_data(user_file: Path) -> None:
    workload = load_workload(_user_config(user_file, trust_code=True), say=lambda line: None)
    assert (user_file.parent / "canary").exists()
    assert workload.data.classes == ("0", "1", "2") and len(workload.data.report) == 30
    assert probe(workload.model, (3, 32, 32)).shape == (2, 3)
    assert not workload.dense_trained and "trained first" in workload.notes[-1]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nett", "unknown function in .*did you mean 'net'"),
        ("broken", r"raised KeyError: 'lost' \(line \d+ of mine.py\)"),
        ("number", "returned a int; allowed: a torch.nn.Module"),
        ("needy", "needs the arguments path"),
    ],
)
def test_faults_in_a_users_model_are_named(user_file: Path, function: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_workload(_user_config(user_file, function, trust_code=True))


def _pair(count: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 8), torch.arange(count) % classes


_CONFIG = make_config({"model": "Linear", "data": "given"})


def test_objects_make_a_workload_and_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)).train()
    workload = workload_from_objects(model, (_pair(60), _pair(20)), config=_CONFIG)
    assert model.training and not workload.model.training and workload.model is not model
    # Its weights are random, and no better than chance: it has to be trained first, and has seen nothing.
    assert not workload.dense_trained and not workload.search_split_seen and workload.metric is TOP1
    assert "trained first" in workload.notes[0]
    assert workload.data.classes == ("0", "1", "2", "3", "4") and workload.data.input_shape == (8,)
    assert not workload_from_objects(model, _pair(60), config=_CONFIG, train_dense=True).dense_trained


def test_a_users_metric_and_loss_allow_other_targets() -> None:
    metric = Metric("closeness", "1", lambda outputs, targets: -float((outputs - targets).abs().mean()))
    data = (torch.randn(60, 8), torch.randn(60, 1))
    workload = workload_from_objects(
        nn.Linear(8, 1), data, metric=metric, loss=nn.functional.mse_loss, config=_CONFIG
    )
    assert workload.metric is metric and workload.data.classes == ()
    with pytest.raises(UsageError, match="no classification.*\n.*metric and loss"):
        workload_from_objects(nn.Linear(8, 1), data, config=_CONFIG)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(9, 3), r"does not take inputs of shape \(2, 8\)"),
        (nn.Linear(8, 2), "the data has 3 classes, the network 2 outputs"),
        (nn.LSTM(8, 3), "network returns tuple"),
        ("Linear", "model is a str"),
    ],
)
def test_objects_that_do_not_fit_are_refused(model: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        workload_from_objects(model, _pair(60), config=_CONFIG)


def test_top1() -> None:
    outputs = torch.eye(4)[[0, 1, 2, 2]]
    assert TOP1.score(outputs, torch.tensor([0, 1, 2, 3])) == 0.75
    assert TOP1.per_example is not None
    assert TOP1.per_example(outputs, torch.tensor([0, 1, 2, 3])).tolist() == [True, True, True, False]
