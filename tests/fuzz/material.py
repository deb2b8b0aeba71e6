"""What cases begin with: a study with artifacts, an exported network, and files that are right."""

from __future__ import annotations

import gc
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.numpy import save

from autoprune.config import make_config
from autoprune.naming import StudyPaths
from autoprune.study.artifacts import artifact_folder, commit_folder
from autoprune.study.decode import Plan
from autoprune.study.records import TrialRecord
from autoprune.study.store import StudyStore
from tests.report.studies import make_study

STUDY = "s"
SETTINGS = {"model": "cifar_resnet20", "data": "digits", "study": STUDY, "budget": "5m"}
RECIPE = "groups: {layer1.0.conv1: {ratio: 0.5, bits: 8}}\nwidth: 8\nrecovery: {finetune_steps: 10}\n"
SPACE = "description: mine\nratios: [0.0, 0.25, 0.5]\nbits: [8, 32]\nwidth: 8\ncriteria: {conv: [l2]}\n"
CODE = "from pathlib import Path\nPath('canary').write_text('run')\ndef build(**kwargs):\n    return None\n"


def build(place: Path) -> None:
    """Fill a folder with what a case begins with."""
    (place / "images").mkdir(parents=True)
    for name in ("cat", "dog"):
        (place / "images" / name).mkdir()
        for index in range(12):
            image = Image.new("RGB", (8, 8), (index, 40 if name == "cat" else 200, 0))
            image.save(place / "images" / name / f"{index}.png")
    (place / "m.py").write_text(CODE, encoding="utf-8")
    (place / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (place / "space.yaml").write_text(SPACE, encoding="utf-8")
    settings = "model: cifar_resnet20\ndata: digits\nbudget: 5m\ntarget: {threads: 1}\n"
    (place / "settings.yaml").write_text(settings, encoding="utf-8")
    (place / "weights.safetensors").write_bytes(weights())
    (place / "empty").mkdir()
    (place / "link").symlink_to("../outside")
    write_artifact(place / "artifact")
    write_study(place / "studies" / STUDY)
    (place / "measured.json").write_text(json.dumps(measured(place)), encoding="utf-8")


def weights() -> bytes:
    """Return a file of weights of one linear layer."""
    generator = np.random.default_rng(0)
    return save({"w": generator.normal(size=(192, 4)).astype(np.float32), "b": np.zeros(4, np.float32)})


def network() -> onnx.ModelProto:
    """Return a network of one linear layer for images of 8 x 8 pixels."""
    weight = np.random.default_rng(0).normal(size=(192, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"], "flatten"),
        helper.make_node("MatMul", ["flat", "w"], ["outputs"], "fc"),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 8, 8])
    outputs = helper.make_tensor_value_info("outputs", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph(nodes, "g", [images], [outputs], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def recipe_content() -> dict[str, Any]:
    """Return the recipe.json of an artifact."""
    config = make_config({**SETTINGS, "target": {"runtime": "onnxruntime"}})
    return {
        "recipe": {"groups": {"stem": {"ratio": 0.5, "bits": 8}}, "width": 8},
        "kept": {"stem": [0, 1]},
        "ranks": {},
        "left_whole": {},
        "ranges": {"stem": [0.0, 1.0]},
        "train_steps": 10,
        "metric": "accuracy",
        "data_fingerprint": "0" * 64,
        "settings": config.identity(),
        "study": STUDY,
        "trial": 1,
    }


def write_artifact(place: Path, files: dict[str, bytes] | None = None) -> None:
    """Write an exported artifact; ``files`` replace its own. Its manifest is right."""
    raw = network().SerializeToString()
    content = {
        "model.onnx": raw,
        "dense.onnx": raw,
        "weights.safetensors": weights(),
        "recipe.json": json.dumps(recipe_content()).encode(),
        **(files or {}),
    }
    folder = place.with_name(f".{place.name}")
    folder.mkdir(parents=True)
    for name, raw in content.items():
        (folder / name).write_bytes(raw)
    commit_folder(folder, place)


def write_study(root: Path) -> None:
    """Write a study of some 10 trials, two of which have artifacts."""
    root.mkdir(parents=True)
    before = os.environ.get("AUTOPRUNE_STUDIES")
    os.environ["AUTOPRUNE_STUDIES"] = str(root.parent)
    try:
        paths = StudyPaths.of(root.name)
        fake = make_study(root)
        store = StudyStore.create_or_resume(make_config(SETTINGS), paths)
        for record in fake.records():
            if record.number < 6 or (record.parent is not None and record.parent < 6):
                add(store, record)
        for key, value in fake.notes().items():
            store.note(key, value)
        store.set_spent(100.0)
        for number in (0, 1):
            write_artifact(artifact_folder(paths, store.record(number)))
        store.release()
        del store
        settle(paths.database)
    finally:
        if before is None:
            del os.environ["AUTOPRUNE_STUDIES"]
        else:
            os.environ["AUTOPRUNE_STUDIES"] = before
    line = {
        "recipe": {},
        "arm": "solver",
        "lost": 0.1,
        "size_ratio": 0.3,
        "latency_ratio": 0.5,
        "duration_s": 1.0,
    }
    paths.screens.write_text(json.dumps(line) + "\n", encoding="utf-8")


def settle(database: Path) -> bytes:
    """Bring all of a database into its one file, and return that file's content."""
    gc.collect()
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    for ending in ("-wal", "-shm"):
        database.with_name(database.name + ending).unlink(missing_ok=True)
    return database.read_bytes()


def add(store: StudyStore, record: TrialRecord) -> None:
    """Record a trial."""
    recipe = record.recipe
    if record.fidelity == "final":
        assert record.measurement is not None and record.parent is not None and recipe is not None
        store.add_final(
            store.record(record.parent), record.measurement, recipe=recipe, train_steps=record.train_steps,
            duration_s=1.0, label=record.label,
        )  # fmt: skip
        return
    trial = store.ask()
    if recipe is not None:
        store.begin(trial, Plan(recipe, record.origin, record.label))
    if record.measurement is None:
        store.fail(trial, record.failure_kind, record.failure_reason, duration_s=1.0)
        return
    store.complete(trial, record.measurement, train_steps=record.train_steps, duration_s=1.0)


def measured(place: Path) -> dict[str, Any]:
    """Return what ``autoprune measure --json`` prints of the study's trial 1."""
    manifest = json.loads(
        (place / "studies" / STUDY / "artifacts" / "trial-00001" / "manifest.json").read_text()
    )
    return {
        "artifact": "artifact", "study": STUDY, "trial": 1, "target": "onnxruntime",
        "model_sha256": manifest["model.onnx"], "data": "digits", "same_data": True, "metric": "accuracy",
        "accuracy": 0.9, "accuracy_ci": [0.88, 0.92], "examples": 1000, "latency_ms": 2.0, "latency_p95_ms": None,
        "dense_latency_ms": 4.0, "latency_ratio": 0.5, "latency_ratio_ci": [0.48, 0.52], "latency_noisy": False,
        "samples": 100, "size_bytes": 1000, "size_ratio": 0.5, "memory_bytes": 1000, "not_measured": {},
    }  # fmt: skip
