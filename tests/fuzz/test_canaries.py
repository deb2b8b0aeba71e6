"""Files made to run code or to reach out of their folder: refused, and nothing of it happens."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tests.fuzz import material
from tests.fuzz.files import correct, pt2
from tests.fuzz.sandbox import Sandbox

WEIGHTS = "tests.fuzz.calls.weights"
PROGRAM = "tests.fuzz.calls.program"
MEASURE = "tests.fuzz.calls.measure"


class Evil:
    """A pickle that makes a file when it is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("canary",))


def evil_torch() -> bytes:
    """Return a torch file whose pickle runs code."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": Evil()}, protocol=2))
        archive.writestr("archive/version", "3\n")
    return made.getvalue()


def header(content: object, length: int | None = None, data: bytes = b"\0" * 16) -> bytes:
    """Return a safetensors file with a header of any content and length."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    """Return what a header says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


WEIGHT_FILES: dict[str, tuple[str, bytes]] = {
    "pickle": ("w.pt", pickle.dumps({"w": Evil()})),
    "pickle named safetensors": ("w.safetensors", pickle.dumps({"w": Evil()})),
    "pickle in a torch file": ("w.pth", evil_torch()),
    "pickle of a checkpoint": ("w.ckpt", pickle.dumps({"state_dict": {"w": Evil()}})),
    "pickle of bin": ("w.bin", pickle.dumps(Evil(), protocol=0)),
    "header beyond the file": ("w.safetensors", header({}, 2**62)),
    "header of all lengths": ("w.safetensors", header({}, 2**64 - 1)),
    "header of 200 MB": ("w.safetensors", header({}, 200_000_000)),
    "offsets beyond the file": ("w.safetensors", header({"w": entry(0, 2**40, [2**38])})),
    "offsets that fall": ("w.safetensors", header({"w": entry(16, 0, [4])})),
    "offsets below zero": ("w.safetensors", header({"w": entry(-16, 0, [4])})),
    "tensors that overlap": ("w.safetensors", header({"a": entry(0, 16, [4]), "b": entry(8, 16, [2])})),
    "shape that overflows": ("w.safetensors", header({"w": entry(0, 16, [2**63, 2**63])})),
    "shape that is not the bytes": ("w.safetensors", header({"w": entry(0, 16, [5])})),
    "dtype of none": ("w.safetensors", header({"w": entry(0, 16, [4], "PICKLE")})),
    "nested header": ("w.safetensors", header(b"[" * 100_000)),
    "names twice": ("w.safetensors", header(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}')),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_weights(sandbox: Sandbox, name: str) -> None:
    file, content = WEIGHT_FILES[name]
    (sandbox.work / file).write_bytes(content)
    outcome = sandbox.check(case={"call": WEIGHTS, "arguments": [file]}, codes=(2,))
    assert outcome.code == 2 and file in outcome.err
    if "pickle" in name:
        assert "safetensors" in outcome.err


def with_external(location: str) -> bytes:
    """Return a network whose weights lie in another file."""
    model = material.network()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(192 * 4 * 4))):
        pair = tensor.external_data.add()
        pair.key, pair.value = key, value
    return bytes(model.SerializeToString())


def with_node(domain: str, kind: str) -> bytes:
    """Return a network with an operator that is not the standard's."""
    model = material.network()
    model.graph.node.insert(0, helper.make_node(kind, ["images"], ["flat"], "odd", domain=domain))
    del model.graph.node[1]
    model.opset_import.append(helper.make_opsetid(domain, 1))
    return bytes(model.SerializeToString())


def with_recursion() -> bytes:
    """Return a network with a function that calls itself."""
    model = material.network()
    call = helper.make_node("loop", ["x"], ["y"], domain="own")
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model.functions.append(helper.make_function("own", "loop", ["x"], ["y"], [call], imports))
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node[0].CopyFrom(helper.make_node("loop", ["images"], ["flat"], "odd", domain="own"))
    return bytes(model.SerializeToString())


NETWORKS: dict[str, Callable[[], bytes]] = {
    "weights in /etc/passwd": lambda: with_external("/etc/passwd"),
    "weights above the folder": lambda: with_external("../../outside/kept"),
    "weights through a link": lambda: with_external("link"),
    "weights of a device": lambda: with_external("/dev/zero"),
    "operator of another domain": lambda: with_node("evil.domain", "Run"),
    "python operator": lambda: with_node("ai.onnx.contrib", "PyOp"),
    "function that calls itself": with_recursion,
    "pickle": lambda: pickle.dumps(Evil()),
    "empty": lambda: b"",
    "two gigabytes claimed": lambda: b"\x3a\xff\xff\xff\xff\x07" + b"\0" * 100,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(sandbox: Sandbox, name: str) -> None:
    folder = sandbox.work / "artifact"
    (folder / "model.onnx").write_bytes(NETWORKS[name]())
    if "link" in name:
        (sandbox.root / "outside" / "bytes").write_bytes(b"\0" * 4096)
        (folder / "link").symlink_to("../../outside/bytes")
    correct(folder / "manifest.json", folder / "model.onnx")
    outcome = sandbox.check(case={"call": MEASURE, "arguments": ["artifact"]}, codes=(2, 4, 5))
    assert outcome.code in (2, 4, 5), outcome
    assert "model.onnx" in outcome.err


def repacked(member: str, content: bytes, *, deflate: bool = False) -> bytes:
    """Return a .pt2 file with one member more, or another one in its place."""
    made = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(pt2())) as before, zipfile.ZipFile(made, "w", kind) as after:
        for name in before.namelist():
            if not name.endswith(member):
                after.writestr(name, before.read(name))
        root = before.namelist()[0].partition("/")[0]
        found = [name for name in before.namelist() if name.endswith(member)]
        after.writestr(found[0] if found else f"{root}/{member}", content)
    return made.getvalue()


def pickled_weight() -> bytes:
    """Return a .pt2 file whose weights are said to be pickles."""
    with zipfile.ZipFile(io.BytesIO(pt2())) as archive:
        name = next(n for n in archive.namelist() if n.endswith("model_weights_config.json"))
        content = json.loads(archive.read(name))
    for each in content["config"].values():
        each["use_pickle"] = True
    return repacked("model_weights_config.json", json.dumps(content).encode())


def calling(target: str) -> bytes:
    """Return a .pt2 file whose first node calls something else."""
    with zipfile.ZipFile(io.BytesIO(pt2())) as archive:
        name = next(n for n in archive.namelist() if n.endswith("models/model.json"))
        content = json.loads(archive.read(name))
    content["graph_module"]["graph"]["nodes"][0]["target"] = target
    return repacked("models/model.json", json.dumps(content).encode())


PROGRAMS: dict[str, Callable[[], bytes]] = {
    "pickle": lambda: pickle.dumps(Evil()),
    "torch file": evil_torch,
    "weights as pickles": pickled_weight,
    "calls os.system": lambda: calling("os.system"),
    "calls builtins": lambda: calling("builtins.eval"),
    "calls an attribute": lambda: calling("torch.ops.aten.__class__.__init__"),
    "calls a file": lambda: calling("torch.ops.aten.from_file.default"),
    "json of 300 MB in a small file": lambda: repacked("models/model.json", b" " * 300_000_000, deflate=True),
    "deep json": lambda: repacked("models/model.json", b"[" * 100_000),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(sandbox: Sandbox, name: str) -> None:
    (sandbox.work / "model.pt2").write_bytes(PROGRAMS[name]())
    outcome = sandbox.check(case={"call": PROGRAM, "arguments": ["model.pt2"]}, codes=(2,))
    assert outcome.code == 2 and "model.pt2" in outcome.err


def test_pickles_in_a_program_that_is_read_are_left_alone(sandbox: Sandbox) -> None:
    evil = repacked("sample_inputs/model.pt", pickle.dumps(Evil()))
    (sandbox.work / "model.pt2").write_bytes(evil)
    sandbox.check(case={"call": PROGRAM, "arguments": ["model.pt2"]}, codes=(0,))


@pytest.mark.parametrize(
    "name", ["../../outside/kept", "/etc/passwd", "/dev/zero", "link", "a\0b", "fifo", "", ".", "../fifo"]
)
def test_manifests_name_files_of_their_own_folder_alone(sandbox: Sandbox, name: str) -> None:
    folder = sandbox.work / "artifact"
    (folder / "link").symlink_to("/etc/passwd")
    os.mkfifo(folder / "fifo")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps({**manifest, name: "0" * 64}), encoding="utf-8")
    outcome = sandbox.check(case={"words": ["measure", "artifact", "--data", "digits"]}, codes=(4,))
    assert outcome.code == 4 and "names" in outcome.err, outcome


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [canary]",
        "model: !!python/object/apply:os.mkdir [canary]",
        "model: !!python/name:os.system",
        "model: !<tag:yaml.org,2002:python/object/apply:os.mkdir> [canary]",
        "? !!python/object/new:os.mkdir [canary]\n: 1",
        "model: !include /etc/passwd",
        "_target_: os.mkdir",
        "model: {_component_: os.mkdir}",
        "%TAG ! tag:yaml.org,2002:python/object/apply:\n---\nmodel: !os.mkdir [canary]",
    ],
)
@pytest.mark.parametrize("kind", ["settings", "space", "recipe"])
def test_tags_make_nothing(sandbox: Sandbox, kind: str, text: str) -> None:
    (sandbox.work / "x.yaml").write_text(text, encoding="utf-8")
    outcome = sandbox.check(case={"call": f"tests.fuzz.calls.{kind}", "arguments": ["x.yaml"]}, codes=(2,))
    assert outcome.code == 2 and "x.yaml" in outcome.err


@pytest.mark.parametrize(
    "words",
    [
        ["search", "--model", "m.py:build", "--data", "digits"],
        ["search", "--model", "cifar_resnet20", "--data", "m.py:build"],
        ["compress", "--model", "m.py:build", "--data", "digits", "--to", "new"],
        ["groups", "--model", "./m.py:build", "--data", "digits"],
        ["profile", "--model", "m.py:build", "--data", "digits"],
        ["sensitivity", "--model", "m.py:build", "--data", "digits"],
        ["tickets", "--model", "m.py:build", "--data", "digits", "--to", "new"],
        ["search", "-c", "evil.yaml"],
        ["measure", "artifact", "--data", "m.py:build"],
    ],
    ids=" ".join,
)
def test_code_is_not_run_without_trust(sandbox: Sandbox, words: list[str]) -> None:
    (sandbox.work / "evil.yaml").write_text("model: m.py:build\ndata: digits\n", encoding="utf-8")
    case = {"words": words, "stops": []}  # everything would really be done
    outcome = sandbox.check(case=case, codes=(2,))
    assert outcome.code == 2 and "--trust-code" in outcome.err


def test_what_an_artifact_or_a_study_names_as_code_is_not_run(sandbox: Sandbox) -> None:
    folder = sandbox.work / "artifact"
    content = material.recipe_content()
    content["settings"] |= {"data": "m.py:build", "model": "m.py:build", "trust_code": True}
    (folder / "recipe.json").write_text(json.dumps(content), encoding="utf-8")
    correct(folder / "manifest.json", folder / "recipe.json")
    outcome = sandbox.check(case={"words": ["measure", "artifact"], "stops": []}, codes=(2,))
    assert outcome.code == 2 and "--trust-code" in outcome.err
    settings = sandbox.work / "studies" / "s" / "settings.yaml"
    lines = settings.read_text(encoding="utf-8").replace('data: "digits"', 'data: "m.py:build"')
    settings.write_text(lines + "trust_code: true\n", encoding="utf-8")
    sandbox.check(
        case={"words": ["front", "s", "--robustness"], "stops": []}, may_write=["studies/s"], codes=(2, 4)
    )


def test_a_canary_would_be_seen(sandbox: Sandbox) -> None:
    case = {"call": "tests.fuzz.test_canaries.load_blindly", "arguments": ["w.pt"]}
    (sandbox.work / "w.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(AssertionError, match="canary"):
        sandbox.check(case=case)


def load_blindly(path: str) -> int:
    """Do what autoprune must never do."""
    pickle.loads(Path(path).read_bytes())
    return 0


def test_onnx_files_are_what_they_are_said_to_be() -> None:
    onnx.checker.check_model(material.network())
