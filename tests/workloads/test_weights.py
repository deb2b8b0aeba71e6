"""Weights from files: what is loaded, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from autoprune.config import make_config
from autoprune.errors import UsageError
from autoprune.workloads.catalog import check_inputs
from autoprune.workloads.cifar_resnet import cifar_resnet
from autoprune.workloads.weights import apply_state, load_state
from autoprune.workloads.workload import load_workload


class _Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "code ran")


@pytest.mark.parametrize("form", ["torch", "plain", "legacy"])
def test_code_in_a_weights_file_is_refused_and_never_runs(form: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "weights.pt"
    content = {"conv1.weight": torch.zeros(1), "x": _Canary(canary)}
    if form == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    config = make_config({"model": "cifar_resnet20", "data": "digits", "weights": str(path)})
    with pytest.raises(UsageError, match="safetensors") as raised:
        load_workload(config)
    assert raised.value.exit_code == 2 and not canary.exists()
    torch.load(path, weights_only=False) if form != "plain" else pickle.loads(path.read_bytes())
    assert canary.exists()  # the file would have run its code


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "module."])
def test_torch_files_in_their_usual_forms(wrap: str, tmp_path: Path) -> None:
    state = cifar_resnet("cifar_resnet20").state_dict()
    prefixed = {f"module.{name}": value for name, value in state.items()}
    content: Any = {"plain": state, "module.": prefixed}.get(wrap, {wrap: state, "epoch": 3})
    torch.save(content, tmp_path / "w.pth")
    loaded = load_state(tmp_path / "w.pth")
    assert set(loaded) == set(state) and torch.equal(loaded["conv1.weight"], state["conv1.weight"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x80\x04rubbish"])
def test_damaged_weights_are_refused(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="weights"):
        load_state(path)


def test_weights_that_do_not_fit_name_the_layer() -> None:
    model, state = cifar_resnet("cifar_resnet20"), cifar_resnet("cifar_resnet20").state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(8, 16, 3, 3)
    del state["bn1.weight"]
    state["extra"] = torch.zeros(1)
    before = model.state_dict()["conv1.weight"].clone()
    with pytest.raises(UsageError) as raised:
        apply_state(model, state, "'w'")
    for text in (
        "layer 'layer1.0.conv1'",
        "(8, 16, 3, 3)",
        "(16, 16, 3, 3)",
        "missing: bn1.weight",
        "not in the network: extra",
    ):
        assert text in raised.value.message
    assert torch.equal(model.state_dict()["conv1.weight"], before)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="not finite in a"):
        load_state(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("nothing.pt", "no such file"),
        ("DEFAULT", "torchvision's own"),
        (".", "is a folder"),
        (__file__, "suffix '.py'"),
    ],
)
def test_weights_are_checked_by_name(weights: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_inputs(make_config({"model": "cifar_resnet20", "data": "digits", "weights": weights}))
