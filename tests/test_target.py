"""Targets: one word each, what a runtime can do, and what is refused before anything runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autoprune.config import make_config
from autoprune.errors import UsageError
from autoprune.target import (
    RUNTIMES,
    RuntimeFacts,
    Target,
    gpus,
    parse_target,
    recorded_target,
    target_word,
)


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprune.target.usable_cores", lambda: 64)


@pytest.mark.parametrize(
    ("word", "settings"),
    [
        ("onnxruntime", {}),
        (
            "torch:cuda:float16:compile",
            {"runtime": "torch", "device": "cuda", "precision": "float16", "compile": True},
        ),
        ("executorch", {"runtime": "executorch"}),
        ("tensorrt:float16", {"runtime": "tensorrt", "device": "cuda", "precision": "float16"}),
        ("onnxruntime:threads=2:batch=8", {"threads": 2, "batch": 8}),
        ("openvino:bfloat16", {"runtime": "openvino", "precision": "bfloat16"}),
        (
            "openvino:bfloat16:input_size=64",
            {"runtime": "openvino", "precision": "bfloat16", "input_size": 64},
        ),
    ],
)
def test_a_word_and_the_settings_stand_for_each_other(word: str, settings: dict[str, object]) -> None:
    target = Target.model_validate(settings)
    assert target.spec == word == target_word(settings)
    assert Target.model_validate(parse_target(word)) == target
    assert Target.model_validate(target.content()) == target


def test_short_names_of_precisions_are_understood() -> None:
    assert parse_target("openvino:bf16") == {"runtime": "openvino", "precision": "bfloat16"}
    assert Target(runtime="openvino", precision="bf16").precision == "bfloat16"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "word", ["openvino:", "openvino:fast", "openvino:threads=x", "openvino:threads=", ":cpu="]
)
def test_parts_that_mean_nothing_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match="is not understood"):
        parse_target(word)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runtime": "openvin"}, "did you mean 'openvino'"),
        (
            {"runtime": "onnxruntime", "precision": "bfloat16"},
            "does not compute in bfloat16 on cpu; allowed: float32",
        ),
        ({"runtime": "onnxruntime", "device": "cuda"}, "does not run on device 'cuda'; allowed: cpu"),
        ({"runtime": "openvino", "compile": True}, "targets that can: torch"),
        ({"runtime": "torch", "precision": "float16"}, "float16 on cpu; allowed: float32, bfloat16"),
        ({"runtime": "tensorrt", "device": "cpu"}, "does not run on device 'cpu'; allowed: cuda"),
        ({"threads": 65}, "allowed: 1 to 64"),
    ],
)
def test_what_a_runtime_cannot_do_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Target.model_validate(settings)


def test_an_absent_runtime_is_refused_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        RUNTIMES, "openvino", RuntimeFacts("no_such_module", "pip install this", "model.onnx", "")
    )
    config = make_config({"model": "a", "target": "onnxruntime,openvino"})
    with pytest.raises(UsageError, match="'openvino' is not installed here") as caught:
        config.check_installed()
    assert "pip install this" in str(caught.value.hint)


def test_several_targets_share_threads_and_batch_of_the_first() -> None:
    first, also = {"runtime": "onnxruntime", "threads": 2}, ["openvino:bf16", "openvino:batch=4"]
    config = make_config({"model": "a", "target": first, "also": also})
    assert [t.spec for t in config.targets] == [
        "onnxruntime:threads=2",
        "openvino:bfloat16:threads=2",
        "openvino:threads=2:batch=4",
    ]
    again = make_config({name: value for name, value in config.identity().items() if name != "study"})
    assert again.targets == config.targets


def test_settings_of_a_study_with_one_target_are_those_of_earlier_versions() -> None:
    content = make_config({"model": "a"}).identity()
    assert content["target"] == {"runtime": "onnxruntime", "device": "cpu", "threads": 1, "batch": 1}
    assert "also" not in content


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": "onnxruntime,onnxruntime"}, "is there twice"),
        ({"target": "onnxruntime,openvino:input_size=64"}, "images of one size"),
        ({"target": "onnxruntime:input_size=64", "image_size": 32}, "images of one size"),
    ],
)
def test_targets_that_do_not_go_together(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_config({"model": "a", **values})


def test_the_size_of_inputs_is_that_of_the_images() -> None:
    assert make_config({"model": "a", "target": "onnxruntime:input_size=64"}).pixels == 64
    assert make_config({"model": "a", "image_size": 32}).pixels == 32


def test_a_gpu_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == 0
    with pytest.raises(UsageError, match="'torch:cuda' runs on a GPU, and no NVIDIA GPU") as error:
        Target(runtime="torch", device="cuda").check_installed()
    assert "--target torch on the processor" in error.value.hint
    monkeypatch.setattr("autoprune.target.gpus", lambda: 1)
    Target(runtime="torch", device="cuda").check_installed()


def test_a_gpu_that_is_not_here_ends_a_search_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(tmp_path))
    command = [sys.executable, "-m", "autoprune", "search", "--model", "cifar_resnet20", "--data", "digits"]
    done = subprocess.run([*command, "--target", "torch:cuda"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no NVIDIA GPU can be used here" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_files_of_a_runtime_share_an_ending() -> None:
    assert [facts.dense_file for facts in RUNTIMES.values()] == [
        "dense.onnx",
        "dense.onnx",
        "dense.pt2",
        "dense.pte",
        "dense.engine",
    ]


@pytest.mark.parametrize(
    ("settings", "file"),
    [
        ({}, "model.onnx"),
        ({"target": "onnxruntime"}, "model.onnx"),  # as earlier versions wrote it
        ({"target": {"runtime": "torch", "threads": 9999}}, "model.pt2"),
    ],
)
def test_a_recorded_target_need_not_fit_this_machine(settings: dict[str, Any], file: str) -> None:
    assert recorded_target(settings).facts.model_file == file
