"""The files that a user is handed by others, and what reads each of them."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.fuzz import hostile
from tests.fuzz.sandbox import Sandbox

_FRONT = {"words": ["front", "s", "--json"]}
_REPORT = {"words": ["report", "s"]}
_EXPORT = {"words": ["export", "s", "--trial", "1", "--to", "new"]}


@dataclass(frozen=True)
class Surface:
    """One kind of file.

    Attributes:
        place: Where it lies below the working folder.
        cases: What reads it; one of them is drawn.
        form: ``yaml``, ``json``, ``lines`` of JSON, or ``raw``.
        may_write: What may be written then.
        make: A right file, where none lies there.
    """

    place: str
    cases: tuple[dict[str, Any], ...]
    form: str = "raw"
    may_write: tuple[str, ...] = ()
    make: Callable[[], bytes] | None = field(default=None, repr=False)


def _call(name: str, path: str) -> dict[str, Any]:
    return {"call": f"tests.fuzz.calls.{name}", "arguments": [path]}


def _of_study(place: str, *cases: dict[str, Any], form: str = "json", make: Any = None) -> Surface:
    return Surface(f"studies/s/{place}", cases, form, ("studies/s", "new", ".unfinished-", "."), make)


def _of_artifact(place: str, form: str = "raw") -> Surface:
    return Surface(f"artifact/{place}", (_call("measure", "artifact"),), form)


def _json(content: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(content).encode()


@lru_cache(maxsize=1)
def pt2() -> bytes:
    """Return a .pt2 file of one linear layer."""
    import torch
    from torch import nn

    from autoprune.deploy.layered import export, layered
    from autoprune.deploy.pt2 import write_pt2

    torch.manual_seed(0)
    images = torch.zeros(2, 3, 8, 8)
    network = layered(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval(), images, 1)
    program, _ = export(network.graph, images, 1)
    return write_pt2(program, {})


@lru_cache(maxsize=1)
def torch_file() -> bytes:
    """Return weights as torch saves them."""
    import torch

    place = io.BytesIO()
    torch.save({"w": torch.zeros(192, 4), "b": torch.zeros(4)}, place)
    return place.getvalue()


SURFACES: dict[str, Surface] = {
    "settings": Surface("settings.yaml", (_call("settings", "settings.yaml"),), "yaml"),
    "space": Surface("space.yaml", (_call("space", "space.yaml"),), "yaml"),
    "recipe": Surface("recipe.yaml", (_call("recipe", "recipe.yaml"),), "yaml"),
    "recipe.json": Surface("artifact/recipe.json", (_call("recipe", "artifact/recipe.json"),), "json"),
    "measurements": Surface(
        "measured.json", ({"words": ["front", "s", "--measurements", "measured.json"]},), "json", ("studies/s",)
    ),
    "safetensors": Surface("weights.safetensors", (_call("weights", "weights.safetensors"),)),
    "torch weights": Surface("w.pt", (_call("weights", "w.pt"),), make=torch_file),
    "pt2": Surface("model.pt2", (_call("program", "model.pt2"),), "pt2", make=pt2),
    "artifact's network": _of_artifact("model.onnx"),
    "artifact's dense network": _of_artifact("dense.onnx"),
    "artifact's recipe": _of_artifact("recipe.json", "json"),
    "artifact's manifest": _of_artifact("manifest.json", "json"),
    "study's settings": _of_study("settings.yaml", _FRONT, _FRONT, _REPORT, _EXPORT, {"words": ["studies"]}, _call("resume", "s"), form="lines"),
    "study's screens": _of_study("screens.jsonl", _REPORT, _call("resume", "s"), form="lines"),
    "study's environment": _of_study("env.json", _REPORT, _EXPORT),
    "study's manifest": _of_study("artifacts/trial-00001/manifest.json", _EXPORT),
    "study's recipe": _of_study("artifacts/trial-00001/recipe.json", _EXPORT),
    "study's robustness": _of_study("robustness.json", _call("robustness", "s"), make=_json([])),
    "study's profile": _of_study("profile.json", _call("resume", "s"), make=_json({"groups": {}})),
}  # fmt: skip


def run(sandbox: Sandbox, name: str, seed: int) -> None:
    """Read one hostile file of a kind.

    Args:
        sandbox: Where.
        name: Of the kind.
        seed: Draws the faults.
    """
    surface = SURFACES[name]
    random_ = random.Random(f"{name} {seed}")
    place = sandbox.work / surface.place
    right = place.read_bytes() if place.is_file() else surface.make() if surface.make else b""
    content = faulty(random_, right, surface.form)
    check(sandbox, surface, content, random_.choice(surface.cases), f"{name}, seed {seed}", random_)


def check(
    sandbox: Sandbox,
    surface: Surface,
    content: bytes,
    case: dict[str, Any],
    what: str,
    random_: random.Random | None = None,
) -> None:
    """Put a file in its place, read it, and put the right one back."""
    place = sandbox.work / surface.place
    before = {place: place.read_bytes() if place.is_file() else None}
    place.write_bytes(content)
    manifest = place.parent / "manifest.json"
    if manifest.is_file() and place != manifest and (random_ is None or random_.random() < 0.8):
        before[manifest] = manifest.read_bytes()
        correct(manifest, place)
    try:
        sandbox.check(case=case, may_write=surface.may_write)
    except AssertionError as error:
        raise AssertionError(f"{what}: {content[:1500]!r} ({len(content)} bytes): {error}") from None
    finally:
        for path, raw in before.items():
            if raw is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(raw)


def correct(manifest: Path, changed: Path) -> None:
    """Let a manifest say of a changed file what is true: whoever changed the file can do that too."""
    from hashlib import sha256

    content = json.loads(manifest.read_bytes())
    content[changed.name] = sha256(changed.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content), encoding="utf-8")


def faulty(random_: random.Random, raw: bytes, form: str) -> bytes:
    """Return a file with faults: in its bytes, or in what it says."""
    if form == "pt2":
        return faulty_pt2(random_, raw)
    if form == "raw" or random_.random() < 0.4:
        return hostile.mutated(random_, raw)
    if form == "yaml":
        content: Any = YAML(typ="safe", pure=True).load(raw.decode())
        # JSON is YAML, and writes what YAML writers refuse.
        return hostile.as_json(_several(random_, content))
    if form == "json":
        return hostile.as_json(_several(random_, json.loads(raw)))
    lines = raw.decode().splitlines()
    index = random_.randrange(len(lines))
    before, colon, value = ("", "", lines[index]) if lines[index][:1] == "{" else lines[index].partition(": ")
    if before.startswith("#") or not value:
        return hostile.mutated(random_, raw)
    lines[index] = before + colon + json.dumps(_several(random_, json.loads(value)))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _several(random_: random.Random, content: Any) -> Any:
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        content = hostile.changed(random_, content)
    return content


def faulty_pt2(random_: random.Random, raw: bytes) -> bytes:
    """Return a .pt2 file with faults: in the archive, in one member's bytes, or in what a member says."""
    if random_.random() < 0.25:
        return hostile.mutated(random_, raw)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as before, zipfile.ZipFile(made, "w") as after:
        names = before.namelist()
        chosen = random_.choice([n for n in names if n.endswith((".json",))] * 4 + names)
        for name in names:
            content = before.read(name)
            if name == chosen:
                is_json = name.endswith(".json") and random_.random() < 0.8
                content = faulty(random_, content, "json" if is_json else "raw")
            after.writestr(name, content)
    return made.getvalue()
