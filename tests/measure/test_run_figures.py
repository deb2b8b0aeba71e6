"""Memory, cold start and throughput: what a session measures, where a sweep ends, and why a figure is missing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from autoprune.errors import TrialError
from autoprune.measure import starts, throughput
from autoprune.measure.figures import FULL_RUN, MEMORY_RUN, RunProtocol, figure_jobs, gather, within
from autoprune.measure.latency import measure_front
from autoprune.measure.process import run_session, run_worker
from autoprune.measure.record import RunFigures
from autoprune.target import RUNTIMES, Target
from tests.measure.test_latency import QUICK, network

SHORT = RunProtocol(starts=3, passes=1, energy_rounds=1, limit_s=2.0, block_s=0.002, most_batch=4)


def base(path: Path, width: int = 8, **more: Any) -> dict[str, Any]:
    target = {"threads": 1, "device": "cpu", "batch": 1}
    return {
        "models": [str(path)], "dense": str(path), "target": target, "input_shape": [width], "seed": 0, **more
    }  # fmt: skip


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_session_measures_everything_of_candidate_and_dense_network(tmp_path: Path, runtime: str) -> None:
    if not RUNTIMES[runtime].installed:
        pytest.skip(f"{runtime} is not installed")
    one, dense = network(tmp_path / "a.onnx", 8), network(tmp_path / "b.onnx", 8)
    ((latency, figures),) = measure_front(
        [one], dense, Target(runtime=runtime), (8,), protocol=QUICK, run=SHORT
    )
    assert latency.samples >= QUICK.rounds
    assert figures.dense is not None
    for each in (figures, figures.dense):
        assert each.cold_start_ms is not None and each.cold_start_ms > 1e3 * latency.latency_ms / 1e6
        assert each.throughput_per_s is not None and each.throughput_per_s > 0
        assert each.throughput_batch in (1, 2, 4)
        assert each.memory_bytes is None or each.memory_bytes > 0
        assert (each.energy_mj is None) == ("energy_mj" in each.missing)
    assert figures.dense.dense is None


def test_a_file_with_a_fixed_batch_is_run_with_that_batch_alone(tmp_path: Path) -> None:
    path = network(tmp_path / "a.onnx", 8)
    proto = onnx.load(path)
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    onnx.save(proto, path)
    job = base(path, block_s=0.001, most_batch=64, most_run_s=1.0, least_gain=0.02, limit_s=1.0)
    assert [batch for batch, _ in throughput.sweep(str(path), job)[0]] == [3]
    assert starts.start_s(str(path), job) > 0


# -- throughput ------------------------------------------------------------------------------


class FakeSession:
    """Runs in a time that a law gives for each batch, without taking any."""

    fixed_batch = None

    def __init__(self, law: Callable[[int], float]) -> None:
        self.law = law

    def timer(self, inputs: NDArray[np.float32]) -> Callable[[], float]:
        return lambda: self.law(len(inputs))


def sweep(
    monkeypatch: pytest.MonkeyPatch, law: Callable[[int], float], early: bool = False, **more: Any
) -> dict[int, float]:
    monkeypatch.setattr(throughput, "open_session", lambda *_: FakeSession(law))
    settings = {"block_s": 0.0, "most_batch": 64, "most_run_s": 1e9, "least_gain": 0.02, "limit_s": 1e9}
    found, ended_early = throughput.sweep("m", base(Path("m"), **{**settings, **more}))
    assert ended_early == early
    return {batch: seconds[0] for batch, seconds in found}


def test_a_sweep_ends_where_two_doublings_in_a_row_gain_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def law(batch: int) -> float:
        return 1.0 if batch <= 4 else batch / 4

    assert list(sweep(monkeypatch, law)) == [1, 2, 4, 8, 16]


def test_a_dip_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 1.0, 2: 3.0, 4: 3.0, 8: 4.0}
    assert list(sweep(monkeypatch, lambda batch: seconds[batch], most_batch=8)) == [1, 2, 4, 8]


def test_a_sweep_ends_at_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(sweep(monkeypatch, lambda batch: 1.0)) == [1, 2, 4, 8, 16, 32, 64]
    # A run of twice as many is expected to take twice as long.
    assert list(sweep(monkeypatch, lambda batch: batch**0.5, most_run_s=3.9)) == [1, 2, 4]
    assert list(sweep(monkeypatch, lambda batch: 1.0, early=True, limit_s=-1.0)) == [1]
    assert list(sweep(monkeypatch, lambda batch: 1.0, limit_s=-1.0, most_batch=1)) == [1]
    peaks = iter(range(0, 10**12, 10**9))
    monkeypatch.setattr(throughput, "peak_bytes", lambda: next(peaks))
    monkeypatch.setattr(throughput, "available_bytes", lambda: 4 * 10**9)
    assert list(sweep(monkeypatch, lambda batch: 1.0)) == [1]
    monkeypatch.setattr(throughput, "available_bytes", lambda: 10**12)
    assert len(sweep(monkeypatch, lambda batch: 1.0)) == 7


def test_a_batch_that_fails_ends_a_sweep_unless_it_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def law(batch: int) -> float:
        if batch >= fails_at:
            raise RuntimeError("no memory")
        return 1.0

    fails_at = 4
    assert list(sweep(monkeypatch, law)) == [1, 2]
    fails_at = 1
    with pytest.raises(RuntimeError, match="no memory"):
        sweep(monkeypatch, law)


# -- cold start ------------------------------------------------------------------------------


def test_starts_are_equally_many_and_end_at_their_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def start(path: str, job: dict[str, Any]) -> float:
        seen.append(path)
        return float(len(seen))

    monkeypatch.setattr(starts, "start_s", start)
    job = base(tmp_path / "a", starts=5, least_starts=3, limit_s=100.0, too_long="")
    assert [len(each) for each in starts.cold_starts(job)["starts_s"]] == [5, 5]
    assert len(seen) == 11  # the first one warms the system's cache and does not count
    job["limit_s"] = 0.0
    assert [len(each) for each in starts.cold_starts(job)["starts_s"]] == [3, 3]
    seen.clear()
    with pytest.raises(RuntimeError, match="no time"):
        starts.cold_starts({**job, "too_long": "no time"})
    assert len(seen) == 1  # under a budget the first one tells that the least do not fit


def test_a_start_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match=r"bad\.onnx|protobuf"):
        starts.start_s(str(bad), base(bad))
    monkeypatch.setattr(starts, "load_runtime", lambda target: os._exit(3))
    with pytest.raises(RuntimeError, match="without a word"):
        starts.start_s(str(bad), base(bad))


# -- the session -----------------------------------------------------------------------------


def test_an_optional_job_may_fail_and_another_may_not(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"nothing")
    good = network(tmp_path / "a.onnx", 8)
    jobs = figure_jobs(SHORT, base(bad))
    wanted = [next(job for job in jobs if job["kind"] == "throughput"), {**base(good), "kind": "memory"}]
    failed, memory = run_session(wanted)
    assert "bad.onnx" in failed["failed"] or "Protobuf" in failed["failed"]
    assert "memory_bytes" in memory
    with pytest.raises(TrialError, match="the measurement failed"):
        run_session([{**wanted[0], "optional": False}])


def test_a_session_that_takes_too_long_leaves_no_process(tmp_path: Path) -> None:
    path = network(tmp_path / "a.onnx", 8)
    endless = base(path, kind="latency", sessions=1, rounds=10**9, block_s=0.001, warmup_s=0.0, limit_s=1e9,
                   repeats=0, noise_limit=1.0)  # fmt: skip
    lock = str(tmp_path / "lock")
    session = {"kind": "session", "target": {}, "jobs": [endless], "lock": lock}
    with pytest.raises(TrialError, match="took longer than 3 s"):
        run_worker(session, timeout_s=3.0)
    deadline = time.monotonic() + 5.0
    while (left := holders_of(path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def holders_of(path: Path) -> list[str]:
    """Return the processes that were started in the test's folder: they have its lock file or model open."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            environment = (process / "environ").read_text(errors="replace") if process.name.isdigit() else ""
            cmdline = (process / "cmdline").read_text(errors="replace") if environment else ""
        except OSError:
            continue
        if str(path.parent) in environment and "autoprune.measure.worker" in cmdline:
            found.append(process.name)
    return found


# -- what is made of the results -------------------------------------------------------------


def test_figures_are_medians_of_all_passes_and_each_has_the_dense_network_s() -> None:
    path = Path("m")
    jobs = figure_jobs(FULL_RUN, base(path))
    told: dict[str, dict[str, Any]] = {
        "starts": {"starts_s": [[0.1, 0.3, 0.2], [0.5, 0.4, 0.6]]},
        "energy": {"energies_mj": [[2.0, 4.0, 3.0], [9.0, 9.0, 9.0]], "source": "rapl"},
    }
    passes = iter(
        [
            {"runs_s": [[[1, [1.0]], [2, [1.0, 1.0]]], [[1, [0.5]]]]},
            {"runs_s": [[[1, [1.0]], [2, [1.0]], [4, [4.0]]], [[1, [0.5]]]]},
        ]
    )
    memory: Iterator[dict[str, Any]] = iter([{"memory_bytes": 7}, {"memory_bytes": None}])
    of_kind: dict[str, Iterator[dict[str, Any]]] = {"throughput": passes, "memory": memory}
    results = [told[job["kind"]] if job["kind"] in told else next(of_kind[job["kind"]]) for job in jobs]
    (figures,) = gather(FULL_RUN, jobs, results)
    dense = figures.dense
    assert dense is not None
    assert (figures.memory_bytes, dense.memory_bytes) == (7, None)
    assert [figures.cold_start_ms, dense.cold_start_ms] == pytest.approx([200.0, 500.0])
    assert (figures.throughput_per_s, figures.throughput_batch) == (2.0, 2)
    assert (dense.throughput_per_s, dense.throughput_batch) == (2.0, 1)
    assert figures.missing.keys() <= {"energy_mj"}
    assert dense.missing["memory_bytes"] == "this system does not tell it"


def test_what_was_not_read_has_a_reason_and_no_value() -> None:
    jobs = figure_jobs(FULL_RUN, base(Path("m")))
    results: list[dict[str, Any]] = [
        {"memory_bytes": 1} if job["kind"] == "memory" else {"failed": "it broke"} for job in jobs
    ]
    (figures,) = gather(FULL_RUN, jobs, results)
    assert (figures.cold_start_ms, figures.throughput_per_s, figures.energy_mj) == (None, None, None)
    assert figures.missing["cold_start_ms"] == figures.missing["throughput_per_s"] == "it broke"
    assert figures.flat()["not_measured"] == figures.missing
    early: dict[str, Any] = {"runs_s": [[[1, [1.0]]], [[1, [1.0]]]], "ended_early": [False, True]}
    results = [
        early if job["kind"] == "throughput" else result for job, result in zip(jobs, results, strict=True)
    ]
    (figures,) = gather(FULL_RUN, jobs, results)
    assert figures.throughput_per_s is None and "still gaining" in figures.missing["throughput_per_s"]
    latency = {**base(Path("m")), "kind": "latency"}
    jobs = [latency, *figure_jobs(MEMORY_RUN, base(Path("m")))]
    (figures,) = gather(MEMORY_RUN, jobs, [{}, {"memory_bytes": 1}])
    assert figures.dense is None and figures.memory_bytes == 1
    assert set(figures.missing.values()) == {"trials measure latency and memory alone"}


def test_a_protocol_fits_into_the_seconds_that_there_are() -> None:
    assert within(100.0) == replace(FULL_RUN, bounded=True)
    assert within(1.0).limit_s == 1.0 and within(1.0).starts == FULL_RUN.starts
    assert within(0.1).starts == 0 and "budget" in within(0.1).why_not


def test_names_are_those_that_scripts_rely_on() -> None:
    dense = RunFigures(memory_bytes=2, energy_mj=9.0, energy_source="rapl")
    flat = RunFigures(memory_bytes=1, throughput_per_s=5.0, throughput_batch=8, dense=dense).flat()
    assert (flat["memory_bytes"], flat["dense_memory_bytes"], flat["dense_energy_mj"]) == (1, 2, 9.0)
    assert (flat["throughput_per_s"], flat["throughput_batch"]) == (5.0, 8)
    assert (flat["cold_start_ms"], flat["energy_mj"], flat["dense_cold_start_ms"]) == (None, None, None)
    assert flat["not_measured"] == {
        "cold_start_ms": "it was not measured",
        "energy_mj": "it was not measured",
    }
