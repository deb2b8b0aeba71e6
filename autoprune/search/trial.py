"""One trial: compress, deploy, measure. The whole flow on one page."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from autoprune.deploy.runtime import Artifact, Runtime
from autoprune.errors import AutopruneError, ExportError, StorageError, TrialError, WorkerError, first_line
from autoprune.faults import reached
from autoprune.measure.capability import score
from autoprune.measure.cost import count_macs, count_params, size_bytes
from autoprune.measure.latency import SEARCH_PROTOCOL, measure_latency
from autoprune.measure.record import Capability, Latency, Measurement, RunFigures
from autoprune.search.bench import Bench
from autoprune.search.outcome import Outcome
from autoprune.space.recipe import Recipe
from autoprune.workloads.splits import Split
from autoprune.workloads.workload import Metric

_EVALUATION_BATCH = 100


def run_trial(
    bench: Bench,
    recipe: Recipe,
    folder: Path,
    deadline: Callable[[], bool] | None = None,
    start: Path | None = None,
) -> Outcome:
    """Evaluate one recipe at the search's fidelity.

    Args:
        bench: What the study's trials share.
        recipe: The candidate.
        folder: Empty folder that gets the model file, the weights and the recipe.
        deadline: Returns True once training has to stop.
        start: Artifact folder of the recovered network that is cut further; the dense network if not given.

    Returns:
        The measurements of the exported artifact, none of which read the report split.

    Raises:
        TrialError: If anything in the trial fails; its kind says what.
    """
    with failures_as_trial_errors():
        recipe.check(bench.groups)
        compressed = bench.compressed(recipe, deadline, start)
        reached("trial:compressed")
        with timed() as deploying:
            artifact = bench.deploy(compressed, recipe, folder)
            bench.save(compressed, recipe, folder)
        reached("trial:exported")
        with timed() as scoring:
            capability = evaluate(bench, artifact, bench.workload.data.search)
        reached("trial:scored")
        with timed() as timing:
            latency, figures = time_against_dense(bench, artifact)
        reached("trial:measured")
        bench.timings.deploy.append(deploying())
        bench.timings.example.append(scoring() / capability.examples)
        bench.timings.latency.append(timing())
        measurement = assemble(bench, compressed.model, artifact, latency, figures, search=capability)
        before = bench.ancestor(start).network.train_steps if start is not None else 0
        return Outcome(measurement, compressed.train_steps, compressed.train_steps - before)


def evaluate(bench: Bench, artifact: Artifact, split: Split) -> Capability:
    """Score the exported artifact on ``split``."""
    return evaluate_file(bench.runtime, artifact.path, split, bench.workload.metric)


def evaluate_file(runtime: Runtime, path: Path, split: Split, metric: Metric) -> Capability:
    """Score an exported model file on ``split``, the same way for a search and for ``autoprune measure``."""
    targets: list[Tensor] = []

    def inputs() -> Iterator[Tensor]:
        for batch, target in split.batches(_EVALUATION_BATCH):
            targets.append(target)
            yield batch

    outputs = runtime.predict(path, inputs())
    return score(outputs, torch.cat(targets), metric)


def time_against_dense(bench: Bench, artifact: Artifact) -> tuple[Latency, RunFigures]:
    """Measure latency interleaved with the dense artifact, and peak memory; there is no time for more in a trial."""
    dense = bench.dense or artifact
    return measure_latency(
        artifact.path,
        dense.path,
        bench.config.target,
        bench.workload.data.input_shape,
        protocol=SEARCH_PROTOCOL,
    )


def assemble(
    bench: Bench,
    model: nn.Module,
    artifact: Artifact,
    latency: Latency,
    figures: RunFigures,
    *,
    search: Capability,
    report: Capability | None = None,
    reference: Path | None = None,
) -> Measurement:
    """Put everything that was measured of one artifact together.

    Args:
        bench: What the study's trials share.
        model: The network.
        artifact: The artifact.
        latency: Its latency.
        figures: What running it takes besides.
        search: Its capability on the search split.
        report: Its capability on the report split.
        reference: The dense network's file on the same target; the first target's if not given.

    Raises:
        TrialError: If a figure that an objective reads is not finite.
    """
    dense = reference or (bench.dense or artifact).path
    size = size_bytes(artifact.path)
    for name, value in (("capability", search.value), ("latency ratio", latency.ratio)):
        if not math.isfinite(value):
            raise TrialError("nan" if math.isnan(value) else "inf", f"{name} is {value}")
    return Measurement(
        search=search,
        report=report,
        latency=latency,
        size_bytes=size,
        size_ratio=size / size_bytes(dense),
        params=count_params(model),
        macs=count_macs(model, bench.workload.data.input_shape),
        executed=artifact.executed,
        parity_error=artifact.parity_error,
        figures=figures,
    )


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Time a block: what is yielded returns the seconds from its begin to its end."""
    begun_s = time.perf_counter()
    ended_s: list[float] = []
    yield lambda: (ended_s[0] if ended_s else time.perf_counter()) - begun_s
    ended_s.append(time.perf_counter())


@contextmanager
def failures_as_trial_errors() -> Iterator[None]:
    """Turn whatever goes wrong inside a trial into a ``TrialError`` with a kind.

    Faults of the storage and of workers are not a trial's and pass through: they must end the study, not count as its
    failures.
    """
    try:
        yield
    except (TrialError, StorageError, WorkerError):
        raise
    except ExportError as error:
        raise TrialError("export", error.message) from error
    except AutopruneError as error:
        raise TrialError("raised", error.message) from error
    except ValidationError as error:  # records hold finite figures alone
        fault = error.errors(include_url=False)[0]
        value = fault.get("input")
        if fault["type"] != "finite_number" or not isinstance(value, float):
            raise TrialError("raised", f"ValidationError: {first_line(error)}") from error
        name = ".".join(str(part) for part in fault["loc"])
        raise TrialError("nan" if math.isnan(value) else "inf", f"{name} is {value}") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrialError("out-of-memory", first_line(error)) from error
    except OSError:
        raise
    except SystemExit as error:  # a library that gives up, or code of the user's own
        raise TrialError("raised", f"it asked to end the program (SystemExit: {error.code})") from error
    except Exception as error:  # a trial may fail in any library; the study goes on without it
        kind = "out-of-memory" if "out of memory" in str(error).lower() else "raised"
        raise TrialError(kind, f"{type(error).__name__}: {first_line(error)}") from error
