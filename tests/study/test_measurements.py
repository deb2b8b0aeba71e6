"""Measurements that were made elsewhere: read back whole, refused where they are of something else."""

from __future__ import annotations

import json
import shutil
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from autoprune.config import make_config
from autoprune.errors import StorageError, UsageError
from autoprune.naming import StudyPaths
from autoprune.space.recipe import Recipe, uniform_recipe
from autoprune.study.decode import Plan
from autoprune.study.elsewhere import record_on, seen_by, seen_on, targets_of
from autoprune.study.measurements import read_measurements
from autoprune.study.store import StudyStore
from tests.search.fakes import make_groups, make_measurement

GROUPS = make_groups()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StudyStore:
    """Trials: 0 dense, 1 of search fidelity, 2 the same in its final form, 3 failed. Only read."""
    config = make_config(
        {"model": "m", "data": "d", "study": "own", "target": "onnxruntime,torch,onnxruntime:threads=2"}
    )
    store = StudyStore.create_or_resume(config, StudyPaths(tmp_path_factory.mktemp("studies") / "own"))
    recipe = uniform_recipe(GROUPS, 0.5, 8)
    for each, origin in ((Recipe(), "dense"), (recipe, "tpe")):
        trial = store.ask()
        store.begin(trial, Plan(each, origin))
        measured = make_measurement(each, GROUPS)
        there = measured.model_copy(update={"size_bytes": 77})
        own = measured.model_copy(update={"elsewhere": {"torch": there} if origin == "tpe" else {}})
        store.complete(trial, own, train_steps=0, duration_s=1.0)
    final = make_measurement(recipe, GROUPS, report=True)
    store.add_final(store.record(1), final, recipe=recipe, train_steps=9, duration_s=1.0, label="")
    lost = store.ask()
    store.begin(lost, Plan(recipe, "tpe"))
    store.fail(lost, "nan", "the loss became NaN", duration_s=1.0)
    return store


def entry(trial: object = 1, **more: object) -> dict[str, Any]:
    return {
        "study": "own", "trial": trial, "target": "onnxruntime", "model_sha256": "0" * 64,
        "metric": "accuracy", "accuracy": 0.7, "accuracy_ci": [0.6, 0.8], "examples": 100, "latency_ms": 2.0,
        "latency_p95_ms": 2.5, "dense_latency_ms": 8.0, "latency_ratio": 0.25, "latency_ratio_ci": [0.2, 0.3],
        "latency_noisy": True, "samples": 40, "size_bytes": 1000, "size_ratio": 0.5, "memory_bytes": 5,
        "dense_memory_bytes": 9, "throughput_batch": 4, "energy_source": "rapl", "more": "left out",
        "not_measured": {"energy_mj": "no counter"}, **more,
    }  # fmt: skip


def read(store: StudyStore, content: object, tmp_path: Path) -> dict[int, Any]:
    file = tmp_path / "measured.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_measurements(file, store)


def test_every_figure_takes_its_place(store: StudyStore, tmp_path: Path) -> None:
    found = read(store, entry(), tmp_path)
    assert set(found) == {0, 1}
    own, before = found[1], store.record(1).measurement
    assert before is not None
    score = own.report
    assert (score.name, score.value, score.ci, score.examples) == ("accuracy", 0.7, (0.6, 0.8), 100)
    assert own.search == score, "a study without a final measurement ranks by the search split"
    timed = own.latency
    assert (timed.latency_ms, timed.latency_p95_ms, timed.dense_ms, timed.ratio) == (2.0, 2.5, 8.0, 0.25)
    assert (timed.ratio_ci, timed.samples, timed.noisy) == ((0.2, 0.3), 40, True)
    assert (own.size_bytes, own.size_ratio, own.elsewhere) == (1000, 0.5, {})
    figures = own.figures
    assert (figures.memory_bytes, figures.throughput_batch, figures.energy_source) == (5, 4, "rapl")
    assert figures.why("energy_mj") == "no counter"
    assert figures.dense.memory_bytes == 9
    # What a measurement does not tell stays.
    assert (own.executed, own.macs, own.params) == (before.executed, before.macs, before.params)


def test_the_dense_network_is_as_the_candidate_s_session_had_it(store: StudyStore, tmp_path: Path) -> None:
    dense, before = read(store, entry(), tmp_path)[0], store.record(0).measurement
    assert before is not None
    assert (dense.latency.latency_ms, dense.latency.dense_ms, dense.latency.ratio) == (8.0, 8.0, 1.0)
    assert (dense.latency.ratio_ci, dense.latency.samples, dense.latency.noisy) == ((1.0, 1.0), 40, True)
    assert dense.latency.latency_p95_ms is None
    assert dense.figures.memory_bytes == 9
    assert (dense.search, dense.size_bytes) == (before.search, before.size_bytes)
    # Of several sessions the first one's, and its own measurement wherever it lies in the file.
    later = read(store, [entry(), entry(2, dense_latency_ms=9.0)], tmp_path)
    assert later[0].latency.latency_ms == 8.0
    for entries in ([entry(), entry(0, latency_ms=7.0)], [entry(0, latency_ms=7.0), entry()]):
        assert read(store, entries, tmp_path)[0].latency.latency_ms == 7.0


def test_a_final_trial_keeps_what_it_had_on_the_search_split(store: StudyStore, tmp_path: Path) -> None:
    before = store.record(2).measurement
    found = read(store, entry(2), tmp_path)[2]
    assert before is not None
    assert found.search == before.search != found.report
    assert found.report.value == 0.7


def test_a_metric_has_its_own_name_and_little_is_enough(store: StudyStore, tmp_path: Path) -> None:
    less = entry(metric="f1", f1=0.4, f1_ci=[0.3, 0.5])
    for name in ("samples", "latency_noisy", "latency_p95_ms", "not_measured", "energy_source"):
        del less[name]
    found = read(store, less, tmp_path)[1]
    assert (found.report.name, found.report.value, found.report.ci) == ("f1", 0.4, (0.3, 0.5))
    assert (found.latency.samples, found.latency.noisy, found.latency.latency_p95_ms) == (1, False, None)
    assert found.figures.missing == {} and found.figures.energy_source is None
    unnamed = entry()
    del unnamed["metric"]
    assert read(store, unnamed, tmp_path)[1].report.name == "accuracy"


def test_lists_and_lines_are_read_and_numbered(store: StudyStore, tmp_path: Path) -> None:
    both = [entry(1), entry(2)]
    lines = "\n\n".join(map(json.dumps, both)) + "\n"
    assert read(store, lines, tmp_path) == read(store, both, tmp_path)
    with pytest.raises(UsageError, match="line 2 is no JSON"):
        read(store, json.dumps(both[0]) + "\n\n{", tmp_path)
    with pytest.raises(
        UsageError, match=r"measured\.json', measurement 2 is of trial 9 of study 'own', not of"
    ):
        read(store, [entry(), entry(9)], tmp_path)
    with pytest.raises(UsageError, match="measurement 3 is another one of trial 1") as caught:
        read(store, [entry(), entry(2), entry()], tmp_path)
    assert caught.value.hint == "keep one of each trial"
    with pytest.raises(UsageError, match="measurement 2 is no object but list"):
        read(store, [entry(), []], tmp_path)
    with pytest.raises(UsageError, match=r"holds no measurement\n.*autoprune measure"):
        read(store, [], tmp_path)
    with pytest.raises(UsageError, match="line 1 is no JSON"):
        read(store, "[" * 100_000, tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trial": 3}, "is of trial 3 of study 'own', not of a measured trial of 'own'"),
        ({"study": "other"}, "of study 'other', not of a measured trial of 'own'"),
        ({"target": "torch"}, "is of target 'torch', the front of 'onnxruntime'.*\n.*give --target torch,"),
        ({"trial": -1}, "trial = -1"),
        ({"model_sha256": "0" * 63}, "model_sha256"),
        ({"model_sha256": "0" * 64 + "0"}, "model_sha256"),
        ({"examples": 0}, "examples = 0"),
        ({"samples": 0}, "samples = 0"),
        ({"size_bytes": 0}, "size_bytes = 0"),
        ({"size_ratio": 0.0}, "size_ratio = 0"),
        ({"latency_ms": 0.0}, "latency_ms = 0"),
        ({"dense_latency_ms": float("inf")}, "dense_latency_ms"),
        ({"accuracy": float("nan")}, "value"),
        ({"accuracy_ci": [0.1]}, "value_ci"),
        ({"accuracy_ci": [0.1, float("inf")]}, "value_ci"),
        ({"memory_bytes": "much"}, "memory_bytes"),
    ],
)
def test_what_cannot_be_taken_is_named(
    store: StudyStore, changes: dict[str, object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        read(store, entry(**changes), tmp_path)


def test_files_that_cannot_be_read_are_told(store: StudyStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone' cannot be read: .*No such file"):
        read_measurements(tmp_path / "gone", store)
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="binary' cannot be read"):
        read_measurements(tmp_path / "binary", store)
    # A sparse file takes no place.
    with (tmp_path / "large").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(UsageError, match="has 67,108,865 bytes; allowed: up to 67,108,864"):
        read_measurements(tmp_path / "large", store)


def test_a_kept_artifact_tells_another_model_file(
    store: StudyStore, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = store.paths.artifact(1)
    folder.mkdir(parents=True)
    request.addfinalizer(partial(shutil.rmtree, folder))
    own, beside = sha256(b"own").hexdigest(), sha256(b"beside").hexdigest()
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"model.onnx": own, "targets/torch/model.pt2": beside}), encoding="utf-8")
    assert 1 in read(store, entry(model_sha256=own), tmp_path)
    for other in ("0" * 64, beside):
        with pytest.raises(
            UsageError, match="measurement 1 is of another model file than that of trial 1"
        ) as caught:
            read(store, entry(model_sha256=other), tmp_path)
        assert "autoprune export own --trial 1 --to DIR" in caught.value.hint
    on_torch = seen_on(store, "torch")
    # The dense network was not measured there, so that nothing can be told of it.
    assert set(read(on_torch, entry(model_sha256=beside, target="torch"), tmp_path)) == {1}
    with pytest.raises(UsageError, match="another model file"):
        read(on_torch, entry(model_sha256=own, target="torch"), tmp_path)
    for content in ("{", "[]"):
        manifest.write_text(content, encoding="utf-8")
        with pytest.raises(StorageError, match=r"manifest\.json' cannot be read.*\n.*search it again"):
            read(store, entry(model_sha256=own), tmp_path)


def test_a_study_is_seen_on_each_of_its_targets(store: StudyStore) -> None:
    words = ("onnxruntime", "torch", "onnxruntime:threads=2")
    assert targets_of(store.settings()) == words
    assert seen_on(store, "onnxruntime") is store
    seen = seen_on(store, "torch")
    assert targets_of(seen.settings()) == words
    assert seen.settings()["target"]["runtime"] == "torch"
    assert seen_on(store, "onnxruntime:threads=2").settings()["target"]["threads"] == 2
    assert (seen.paths.root, seen.paths.target, store.paths.target) == (store.paths.root, "torch", "")
    # Only trial 1 was measured there.
    assert [r.measurement is not None for r in seen.records()] == [False, True, False, False]
    found = seen.record(1).measurement
    assert found is not None and found.size_bytes == 77
    assert record_on(store.record(3), "torch").measurement is None
    with pytest.raises(UsageError, match="unknown target 'openvino'") as caught:
        seen_on(store, "openvino")
    assert "study 'own' was measured on these" in caught.value.hint
    assert targets_of({}) == ("onnxruntime",)


def test_a_study_is_seen_by_other_figures(store: StudyStore) -> None:
    other = make_measurement(Recipe(), GROUPS)
    seen = seen_by(store, {1: other})
    assert [r.measurement for r in seen.records()] == [None, other, None, None]
    assert (seen.settings(), seen.paths) == (store.settings(), store.paths)
