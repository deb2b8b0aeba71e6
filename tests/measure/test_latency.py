"""The measuring process: what it returns, that it waits its turn, that its failures have a reason."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from autoprune.errors import TrialError
from autoprune.measure.latency import LatencyProtocol, measure_front, measure_latency
from autoprune.measure.lock import is_locked, lock_machine
from autoprune.measure.process import run_worker
from autoprune.measure.worker import measure
from autoprune.target import Target

QUICK = LatencyProtocol(
    processes=2, sessions=1, rounds=5, block_s=0.001, warmup_s=0.01, limit_s=1.0, repeats=0
)


def network(path: Path, width: int) -> Path:
    """Write a chain of matrix products."""
    weights = [numpy_helper.from_array(np.ones((width, width), dtype=np.float32), f"w{i}") for i in range(3)]
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(3)]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", width]) for n in ("x0", "x3")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(proto, path)
    return path


def test_candidate_and_dense_are_measured_together(tmp_path: Path) -> None:
    one, dense = network(tmp_path / "a.onnx", 8), network(tmp_path / "b.onnx", 8)
    latency, figures = measure_latency(one, dense, Target(), (8,), protocol=QUICK)
    assert latency.ratio > 0
    assert latency.ratio_ci[0] <= latency.ratio <= latency.ratio_ci[1]
    assert latency.latency_ms > 0
    assert latency.dense_ms > 0
    assert latency.samples >= QUICK.rounds
    assert figures.memory_bytes is None or figures.memory_bytes >= 0


@pytest.mark.parametrize(("limit_s", "sessions"), [(-1.0, 3), (60.0, 5)])
def test_three_sessions_are_run_at_least_and_more_while_there_is_time(
    tmp_path: Path, limit_s: float, sessions: int
) -> None:
    path = str(network(tmp_path / "a.onnx", 8))
    job = {
        "models": [path], "dense": path, "target": Target().model_dump(mode="json"), "input_shape": [8],
        "sessions": 5, "rounds": 4, "block_s": 0.0, "warmup_s": 0.0, "limit_s": limit_s,
        "repeats": 0, "noise_limit": 0.0, "seed": 0,
    }  # fmt: skip
    begun_s = time.monotonic()
    found = measure(job)
    assert [len(ratios) for ratios in found["ratios"][0]] == [3 if limit_s < 0 else 4] * sessions
    assert begun_s <= found["timed_s"][0] <= found["timed_s"][1] <= time.monotonic()


def test_a_front_is_measured_in_one_session(tmp_path: Path) -> None:
    paths = [network(tmp_path / f"{i}.onnx", 8) for i in range(3)]
    measured = measure_front(paths, paths[0], Target(), (8,), protocol=QUICK)
    assert len(measured) == 3
    assert len({latency.dense_ms for latency, _ in measured}) == 1


def test_a_file_that_is_no_model_fails_with_a_reason(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"nothing")
    with pytest.raises(TrialError, match="the measurement failed") as caught:
        measure_latency(bad, bad, Target(), (8,), protocol=QUICK)
    assert caught.value.kind == "latency"


def test_the_process_loads_no_torch() -> None:
    code = "import autoprune.measure.worker, sys; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_it_waits_while_another_measurement_holds_the_lock(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = network(tmp_path / "a.onnx", 8)
    lock = tmp_path / "lock"
    job = {
        "kind": "latency", "models": [str(path)], "dense": str(path), "target": {}, "input_shape": [8],
        "sessions": 1, "rounds": 7, "block_s": 0.001, "warmup_s": 0.01,
        "limit_s": 1.0, "repeats": 0, "noise_limit": 1.0, "seed": 0,
        "lock": str(lock),
    }  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        with lock_machine(str(lock)):
            assert is_locked(str(lock))
            waiting = pool.submit(run_worker, job, 60.0)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=3.0)
        assert len(waiting.result(timeout=60)["ratios"][0][0]) == 7
    assert "waiting for another measurement" in caplog.text
    assert not is_locked(str(lock))
