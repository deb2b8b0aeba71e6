"""Files of torch: what they hold, that they are read as torch reads them, and that nothing in them is run."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.deploy.layered import export, layered
from autoprune.deploy.layers import call_in
from autoprune.deploy.pt2 import write_pt2
from autoprune.deploy.sessions.pt2 import read_pt2
from autoprune.deploy.sessions.torch import folded
from autoprune.errors import UsageError
from tests.deploy.networks import LAYERS, residual

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))


class Odd(nn.Module):
    """A network of operators with arguments of many kinds; its sizes follow the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.reshape(n, c * h * w // 8, 8)
        x = torch.cat([self.token.expand(n, -1, -1), x], dim=1)
        one, two = torch.chunk(self.twice(self.twice(x)), 2, dim=-1)
        x = one * torch.softmax(two, dim=-1, dtype=torch.float32)
        top, _ = torch.max(x, dim=1)
        mask = torch.arange(4) < 3
        return torch.where(mask, top, torch.full((n, 4), -1.0)).clamp(-2, 2).to(torch.float32)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return residual()


@pytest.fixture(scope="module")
def raw(model: nn.Module) -> bytes:
    return written(model)


def written(model: nn.Module) -> bytes:
    network = layered(model.eval(), IMAGES[:2], 1)
    program, batch = export(network.graph, IMAGES[:2], 1)
    assert batch is None
    return write_pt2(program, {})


def changed(
    raw: bytes, ending: str, change: Callable[[bytes], bytes], extra: dict[str, bytes] | None = None
) -> bytes:
    """Return a file with one part, and perhaps further ones, changed."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as before, zipfile.ZipFile(made, "w") as after:
        for name in before.namelist():
            content = before.read(name)
            after.writestr(name, change(content) if name.endswith(ending) else content)
        for name, content in (extra or {}).items():
            after.writestr(f"archive/{name}", content)
    return made.getvalue()


def in_json(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        parsed = json.loads(content)
        change(parsed)
        return json.dumps(parsed).encode()

    return edit


@pytest.mark.parametrize("make", [residual, Odd])
def test_a_file_is_read_as_torch_reads_it(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    raw = written(model)
    own = read_pt2(raw)
    torchs = torch.export.load(io.BytesIO(raw)).module()
    assert own.batch is None
    for images in (IMAGES, IMAGES[:1]):
        with torch.no_grad():
            outputs = own.module(images)
            assert torch.equal(outputs, torchs(images))
            assert torch.equal(outputs, folded(read_pt2(raw).module)(images))
            assert torch.allclose(outputs, model(images), atol=1e-5)


def test_equal_networks_make_equal_files_without_paths_code_or_pickles(raw: bytes, model: nn.Module) -> None:
    assert raw == written(model)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    [graph] = [json.loads(c) for name, c in contents.items() if name.endswith("models/model.json")]
    assert graph["guards_code"] == []
    assert [c for name, c in contents.items() if name.endswith("sample_inputs/model.pt")] == [b""]
    assert not any(b".py" in content for content in contents.values())
    assert not any(b'use_pickle": true' in content for content in contents.values())


def test_nodes_know_their_calls_of_layers(raw: bytes) -> None:
    nodes = read_pt2(raw).module.graph.nodes
    assert [n.meta["custom"]["layer"] for n in nodes if n.meta.get("custom")] == LAYERS
    twice = [
        n.meta["custom"]["layer"] for n in read_pt2(written(Odd())).module.graph.nodes if n.meta.get("custom")
    ]
    assert twice == ["twice", "twice#2"]


def test_a_call_is_the_innermost_module_that_is_a_layer() -> None:
    outer = {"a": ("", object), "b": ("graph.layer:layer1/0/conv1", object)}
    assert call_in(outer) == "layer1.0.conv1"
    assert call_in({**outer, "b@2": ("graph.layer:head@2", object)}) == "head@2#3"
    assert call_in({"a": ("graph", object)}) == call_in(None) == ""


class _Shell:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_nothing_in_a_file_is_run(raw: bytes, tmp_path: Path) -> None:
    """Example inputs are pickles, guards are Python code, and sizes are expressions that torch evaluates."""
    mark = tmp_path / "run"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    bad = changed(raw, "sample_inputs/model.pt", lambda content: pickle.dumps(_Shell(mark)))

    def edit(model: Any) -> None:
        model["guards_code"] = [code]
        for value in model["graph_module"]["graph"]["tensor_values"].values():
            for size in value["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = code
        graph = model["graph_module"]
        for spec in graph["signature"]["input_specs"]:  # names of inputs become arguments of a function
            if "user_input" in spec:
                given = spec["user_input"]["arg"]["as_tensor"]
                before, given["name"] = given["name"], f"x={code}"
        graph["graph"]["tensor_values"][f"x={code}"] = graph["graph"]["tensor_values"].pop(before)
        for node in graph["graph"]["nodes"]:
            for each in node["inputs"]:
                if each["arg"].get("as_tensor", {}).get("name") == before:
                    each["arg"]["as_tensor"]["name"] = f"x={code}"

    bad = changed(bad, "models/model.json", in_json(edit))
    module = read_pt2(bad).module
    assert module(IMAGES).shape == (6, 10)
    assert not mark.exists()


def _target(name: str) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        model["graph_module"]["graph"]["nodes"][0]["target"] = name

    return edit


def _argument(value: dict[str, Any]) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        model["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = value

    return edit


def _attribute(name: str) -> tuple[str, Callable[[Any], None], str]:
    return ("model.json", _target(name), "which is no operator of ATen")


def _keyword(model: Any) -> None:
    arguments = model["graph_module"]["graph"]["nodes"][0]["inputs"]
    arguments[-1] |= {"kind": 2, "name": "stride=print(1), padding"}


def _as_pickle(config: Any) -> None:
    next(iter(config["config"].values()))["use_pickle"] = True


def _elsewhere(config: Any) -> None:
    next(iter(config["config"].values()))["path_name"] = "../../sample_inputs/model.pt"


def _beyond(config: Any) -> None:
    next(iter(config["config"].values()))["tensor_meta"]["sizes"][0] = {"as_int": 10**6}


def _newer(model: Any) -> None:
    model["schema_version"]["major"] = 99


def _mutating(model: Any) -> None:
    model["graph_module"]["signature"]["output_specs"].insert(0, {"buffer_mutation": {}})


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("model.json", _target("torch.os.system"), "it calls 'torch.os.system'; allowed: operators of ATen"),
        ("model.json", _target("torch.ops.aten.from_file.default"), "allowed: operators of ATen"),
        ("model.json", _target("torch.ops.prim.Print.default"), "allowed: operators of ATen"),
        ("model.json", _target("builtins.eval"), "allowed: operators of ATen"),
        ("model.json", _target("torch.ops.aten.no_such.default"), "which is no operator of ATen"),
        # Attributes of Python's, by which anything could be reached.
        _attribute("torch.ops.aten.__dict__.update"),
        _attribute("torch.ops.aten.__class__.mro"),
        _attribute("torch.ops.aten.__init__.__getattribute__"),
        ("model.json", _keyword, "an argument that it does not have"),
        ("model.json", _argument({"as_custom_obj": {"name": "x", "class_fqn": "y"}}), "kind 'as_custom_obj'"),
        ("model.json", _argument({"as_tensor": {"name": "nobody"}}), "KeyError"),
        ("model.json", _newer, "its schema has version 99; allowed: 8"),
        ("model.json", _mutating, "buffer_mutation"),
        ("model_weights_config.json", _as_pickle, "stored as a pickle, which may run code"),
        ("model_weights_config.json", _elsewhere, "allowed: raw tensors"),
        ("model_weights_config.json", _beyond, "cannot be read as a .pt2 file"),
    ],
)
def test_files_that_hold_anything_else_are_refused(
    raw: bytes, part: str, change: Callable[[Any], None], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        read_pt2(changed(raw, part, in_json(change)))
    assert said in caught.value.message


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04 cut off"])
def test_what_is_no_file_of_torch_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"model\.pt2' cannot be read as a \.pt2 file"):
        read_pt2(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_pt2(tmp_path / "absent.pt2")
