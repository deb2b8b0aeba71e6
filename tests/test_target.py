"""Targets: what each runtime is told to do, and what is refused before anything runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autoprune.errors import UsageError
from autoprune.target import RUNTIMES, RuntimeFacts, Target, gpus, parse_target, recorded_target


@pytest.mark.parametrize(
    ("word", "runtime", "device", "precision", "compiles"),
    [
        ("torch", "torch", "cpu", "float32", False),
        ("torch:bf16", "torch", "cpu", "bfloat16", False),
        ("torch:cuda:f16:compile", "torch", "cuda", "float16", True),
        ("executorch", "executorch", "cpu", "float32", False),
        ("tensorrt", "tensorrt", "cuda", "float32", False),
        ("tensorrt:f16", "tensorrt", "cuda", "float16", False),
    ],
)
def test_a_word_says_a_target_and_is_said_by_it(
    word: str, runtime: str, device: str, precision: str, compiles: bool
) -> None:
    target = Target.model_validate(parse_target(word))
    assert (target.runtime, target.device, target.precision, target.compile) == (
        runtime,
        device,
        precision,
        compiles,
    )
    assert Target.model_validate(parse_target(target.spec)) == target


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("torch:f16", "does not compute in float16 on cpu; allowed: float32, bfloat16"),
        ("executorch:bf16", "does not compute in bfloat16 on cpu; allowed: float32"),
        ("executorch:cuda", "does not run on device 'cuda'; allowed: cpu"),
        ("onnxruntime:compile", "targets that can: torch"),
    ],
)
def test_what_a_runtime_cannot_do_is_refused(word: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Target.model_validate(parse_target(word))


def test_a_runtime_that_is_not_here_is_refused_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = RuntimeFacts("no_such_module", "pip install 'autoprune[executorch]'", "model.pte")
    monkeypatch.setitem(RUNTIMES, "executorch", facts)
    with pytest.raises(UsageError, match="not installed here") as error:
        Target(runtime="executorch").check_installed()
    assert error.value.hint == "install it: pip install 'autoprune[executorch]'"


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
