"""Measures how far latency can be trusted, a file against itself and against a slower one, and writes the page."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

import numpy as np  # noqa: E402
import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from searches import commit  # noqa: E402

from autoprune.measure import latency  # noqa: E402
from autoprune.measure.figures import NO_RUN  # noqa: E402
from autoprune.measure.host import describe_host  # noqa: E402
from autoprune.measure.latency import FINAL_PROTOCOL, SEARCH_PROTOCOL, LatencyProtocol  # noqa: E402
from autoprune.target import Target  # noqa: E402
from autoprune.yaml_io import read_yaml  # noqa: E402

PROTOCOLS = {"search": SEARCH_PROTOCOL, "final": FINAL_PROTOCOL}
NETWORKS = ("same", "slower")
# Runs whose load began outside of these shares of the timing, as after waiting for a lock, say nothing and are repeated.
HALF_WAY = (0.25, 0.75)
BURNER = "while True: pass"


@dataclass(frozen=True)
class Run:
    """One measurement.

    Attributes:
        network: ``same`` if the file is measured against itself, ``slower`` if one with more work is.
        protocol: Name of the protocol; ``reference`` for the long run.
        burners: Busy processes that begin half-way.
        number: Its number among those that are alike.
    """

    network: str
    protocol: str
    burners: int
    number: int


@dataclass
class Book:
    """The record: a file to which every run adds a line; runs that it holds are not run again."""

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.is_file():
            text = self.path.read_text(encoding="utf-8")
            # A line that a kill has cut is run again.
            whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
            self.lines = [json.loads(line) for line in whole]
            if "".join(whole) != text:
                self.path.write_text("".join(whole), encoding="utf-8")

    def add(self, line: dict[str, Any]) -> None:
        """Keep a line."""
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def runs(self) -> dict[Run, dict[str, Any]]:
        """Return the runs with what they found."""
        return {Run(**line["run"]): line for line in self.lines if "run" in line}

    def hosts(self) -> list[dict[str, Any]]:
        """Return the machine and the code, once for each time that the runs were continued."""
        return [line for line in self.lines if "host" in line]

    def timed_s(self, protocol: str) -> tuple[float, float]:
        """Return the seconds after which timing begins and ends in a quiet run."""
        quiet = [
            line["timed_s"]
            for run, line in self.runs().items()
            if run.protocol == protocol and not run.burners
        ]
        begun_s, ended_s = np.median(quiet, axis=0)
        return float(begun_s), float(ended_s)

    def timed_before_load(self, line: dict[str, Any]) -> float:
        """Return the share of a quiet run's timing that had passed when a run's load began; 1 if it never did."""
        begun_s, ended_s = self.timed_s(line["run"]["protocol"])
        if line["load_s"] is None:
            return 1.0
        return float((line["load_s"] - line["timed_s"][0]) / (ended_s - begun_s))


def values() -> dict[str, Any]:
    """Return what latency.yaml defines."""
    found: dict[str, Any] = read_yaml(HERE / "latency.yaml").values
    return found


def chain(path: Path, convolutions: int) -> Path:
    """Write a chain of equal convolutions."""
    given = values()["network"]
    channels, pixels = given["channels"], given["pixels"]
    generator = np.random.default_rng(0)
    shape = (channels, channels, 3, 3)
    weights, nodes = [], []
    for i in range(convolutions):
        weight = generator.normal(0.0, (2 / (9 * channels)) ** 0.5, shape).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"x{i + 1}"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, pixels, pixels])
        for name in ("x0", f"x{convolutions}")
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def planned(counts: dict[str, int]) -> Iterator[Run]:
    """Yield the runs, those of all kinds in turn, so that the hours of a day are in each of them alike."""
    burners = values()["burners"]
    for protocol, count in counts.items():
        for number in range(count):
            for network in NETWORKS:
                yield Run(network, protocol, 0, number)
                yield Run(network, protocol, burners[number % len(burners)], number)


@contextmanager
def load_after(seconds: float, burners: int) -> Iterator[list[float]]:
    """Start busy processes after some seconds, which end with the block; gives when they began."""
    began: list[float] = []
    busy: list[subprocess.Popen[bytes]] = []
    done = threading.Event()

    def begin() -> None:
        if not done.wait(seconds):
            began.append(time.monotonic())
            busy.extend(subprocess.Popen([sys.executable, "-c", BURNER]) for _ in range(burners))  # noqa: S603

    thread = threading.Thread(target=begin)
    if burners:
        thread.start()
    try:
        yield began
    finally:
        done.set()
        if burners:
            thread.join()
        for process in busy:
            process.kill()
            process.wait()


def measure(run: Run, protocol: LatencyProtocol, files: dict[str, Path], half_s: float) -> dict[str, Any]:
    """Measure once, by the product's own function, and return the line of the record."""
    given = values()["network"]
    shape = (given["channels"], given["pixels"], given["pixels"])
    kept: list[dict[str, Any]] = []

    def session(*arguments: Any) -> list[dict[str, Any]]:
        kept.extend(results := run_session(*arguments))
        return results

    run_session = latency.run_session
    begun_s = time.monotonic()
    with patch.object(latency, "run_session", session), load_after(half_s, run.burners) as began:
        found, _ = latency.measure_latency(
            files[run.network], files["same"], Target(threads=1), shape, protocol=protocol, run=NO_RUN
        )
    stamps = [stamp - begun_s for result in kept for stamp in result["timed_s"]]
    return {
        "run": asdict(run),
        "ratio": found.ratio,
        "interval": found.ratio_ci,
        "noisy": found.noisy,
        "latency_ms": found.latency_ms,
        "dense_ms": found.dense_ms,
        "timed_s": [stamps[0], stamps[-1]],
        "load_s": began[0] - begun_s if began else None,
        "seconds": time.monotonic() - begun_s,
        "ratios": [np.round(ratios, 5).tolist() for result in kept for ratios in result["ratios"][0]],
    }


def run_missing(book: Book, counts: dict[str, int], reference: bool) -> None:
    """Run what the record lacks."""
    given = values()
    todo = [run for run in planned(counts) if run not in book.runs()]
    long_run = Run("slower", "reference", 0, 0)
    if reference and long_run not in book.runs():
        todo.insert(0, long_run)
    if not todo:
        return
    book.add(
        {
            "host": describe_host(),
            "commit": commit(),
            "protocols": {k: asdict(v) for k, v in PROTOCOLS.items()},
        }
    )
    with tempfile.TemporaryDirectory(prefix="autoprune-latency-") as folder:
        own = given["network"]
        files = {
            "same": chain(Path(folder) / "dense.onnx", own["convolutions"]),
            "slower": chain(Path(folder) / "slower.onnx", own["convolutions"] + own["more"]),
        }
        for done, run in enumerate(todo):
            if run == long_run:
                protocol = replace(FINAL_PROTOCOL, **given["reference"], limit_s=600.0, repeats=0)
            else:
                protocol = PROTOCOLS[run.protocol]
            half_s = sum(book.timed_s(run.protocol)) / 2 if run.burners else 0.0
            for _ in range(5):
                line = measure(run, protocol, files, half_s)
                if not run.burners or HALF_WAY[0] <= book.timed_before_load(line) <= HALF_WAY[1]:
                    break
                print("the load began too early or too late: once more", file=sys.stderr, flush=True)
            else:
                sys.exit(
                    "the load began too early or too late five times in a row: this machine is too busy for the study"
                )
            book.add(line)
            low, high = line["interval"]
            print(f"{done + 1}/{len(todo)} {run.network}, {run.protocol}, {run.burners} burners: {line['ratio']:.4f} "
                  f"({low:.4f} to {high:.4f}), {line['seconds']:.1f} s", file=sys.stderr, flush=True)  # fmt: skip


def main() -> None:
    """Run what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "page"])
    parser.add_argument("--record", type=Path, default=HERE / "runs.jsonl", help="the record's file")
    parser.add_argument("--search", type=int, help="runs of each kind by the protocol of trials")
    parser.add_argument("--final", type=int, help="runs of each kind by the protocol of the final front")
    parser.add_argument("--no-reference", action="store_true", help="leave the long run out")
    given = parser.parse_args()
    book = Book(given.record)
    if given.what == "run":
        counts = {name: getattr(given, name) for name in PROTOCOLS if getattr(given, name) is not None}
        run_missing(book, {**values()["runs"], **counts}, not given.no_reference)
    else:
        from page import write

        write(book, values(), given.record.parent)


if __name__ == "__main__":
    main()
