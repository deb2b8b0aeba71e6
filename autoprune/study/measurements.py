"""Measurements of exported artifacts that were made elsewhere, read back in so that a front is ranked by them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autoprune.config import describe_faults
from autoprune.errors import StorageError, UsageError
from autoprune.measure.record import RUN_FIGURES, Capability, Latency, Measurement, RunFigures
from autoprune.naming import StudyPaths
from autoprune.study.artifacts import MANIFEST, artifact_folder
from autoprune.study.front import dense_record
from autoprune.study.reading import read_json, read_text
from autoprune.study.records import TrialRecord
from autoprune.study.store import StudyStore
from autoprune.target import target_word

_Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Interval = tuple[_Finite, _Finite]


class Reported(BaseModel):
    """What ``autoprune measure --json`` printed of one artifact; what else it prints is left out.

    Attributes:
        study: Study that the artifact is of.
        trial: Its trial.
        target: Word of the target that it was measured on.
        model_sha256: Hash of its model file.
        metric: Name of the capability.
        value: The capability on the report split.
        value_ci: Its 95 % interval.
        examples: Number of examples.
        latency_ms: Median latency.
        latency_p95_ms: 95th percentile.
        dense_latency_ms: Median of the dense network in the same session.
        latency_ratio: Median of paired ratios.
        latency_ratio_ci: Its 95 % interval.
        latency_noisy: Whether the machine was.
        samples: Timed runs.
        size_bytes: Bytes of the model file.
        size_ratio: The same as a share of the dense file.
        figures: What running it takes besides its latency.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    study: str
    trial: Annotated[int, Field(ge=0)]
    target: str
    model_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    metric: str
    value: _Finite
    value_ci: _Interval
    examples: Annotated[int, Field(ge=1)]
    latency_ms: _Positive
    latency_p95_ms: _Positive | None = None
    dense_latency_ms: _Positive
    latency_ratio: _Positive
    latency_ratio_ci: _Interval
    latency_noisy: bool = False
    samples: Annotated[int, Field(ge=1)] = 1
    size_bytes: Annotated[int, Field(ge=1)]
    size_ratio: _Positive
    figures: RunFigures


def read_measurements(path: Path, store: StudyStore) -> dict[int, Measurement]:
    """Return the measurements of a study's trials that a file holds, by trial.

    What layers run in stays as the study has it of that target: measuring does not read it back.

    Args:
        path: One object, a list of them, or one on each line, as ``autoprune measure --json`` prints them.
        store: The study, seen on the target of the measurements.

    Raises:
        UsageError: If the file cannot be read, holds no measurement, two of one trial, or one of another study,
            target or model file.
    """
    target = target_word(store.settings().get("target", {}))
    seen: set[int] = set()
    found: dict[int, Measurement] = {}
    every = store.records()
    records = {r.number: r for r in every if r.measurement is not None}
    dense = dense_record(every)
    for number, entry in enumerate(_entries(path), start=1):
        where = f"{str(path)!r}, measurement {number}"
        reported = _reported(entry, where)
        record = records.get(reported.trial)
        if reported.study != store.paths.name or record is None:
            raise UsageError(
                f"{where} is of trial {reported.trial} of study {reported.study!r}, not of a measured trial of "
                f"{store.paths.name!r}",
                "measure what `autoprune export` wrote of this study",
            )
        if reported.target != target:
            raise UsageError(
                f"{where} is of target {reported.target!r}, the front of {target!r}",
                f"give --target {reported.target}, one target in a file, where the study has it",
            )
        if reported.trial in seen:
            raise UsageError(f"{where} is another one of trial {reported.trial}", "keep one of each trial")
        seen.add(reported.trial)
        _check_same_file(record, reported, store, where)
        found[record.number] = _measurement(record, reported)
        if dense is not None and dense.measurement is not None and dense.number not in found:
            found[dense.number] = _dense(dense.measurement, reported)
    if not found:
        raise UsageError(
            f"{str(path)!r} holds no measurement", "`autoprune measure ARTIFACT --json` prints one"
        )
    return found


def _check_same_file(record: TrialRecord, reported: Reported, store: StudyStore, where: str) -> None:
    """Refuse a measurement of another file than the study has, as far as the trial's artifact was kept."""
    manifest = artifact_folder(StudyPaths(store.paths.root), record) / MANIFEST
    own = store.paths.in_artifact(Path())
    if not manifest.is_file():
        return
    try:
        hashes = read_json(manifest)
        same = any(
            Path(name).parent == own and kept == reported.model_sha256 for name, kept in hashes.items()
        )
    except (OSError, ValueError, AttributeError) as error:
        raise StorageError(f"{str(manifest)!r} cannot be read: {error}", "search it again") from error
    if not same:
        raise UsageError(
            f"{where} is of another model file than that of trial {record.number}",
            f"export the trial again: autoprune export {store.paths.name} --trial {record.number} --to DIR",
        )


def _entries(path: Path) -> Iterator[Any]:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL in the path
        raise UsageError(f"{str(path)!r} cannot be read: {error}") from error
    try:
        whole = json.loads(text)
        yield from whole if isinstance(whole, list) else [whole]
        return
    except (ValueError, RecursionError):
        lines = [line for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{str(path)!r}, line {number} is no JSON: {error}") from error


def _reported(entry: object, where: str) -> Reported:
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is no object but {type(entry).__name__}")
    metric = str(entry.get("metric", "accuracy"))
    figures = _figures(entry, "") | {
        "dense": _figures(entry, "dense_"),
        "missing": entry.get("not_measured", {}),
    }
    values = {
        **entry,
        "metric": metric,
        "value": entry.get(metric),
        "value_ci": entry.get(f"{metric}_ci"),
        "figures": figures,
    }
    try:
        return Reported.model_validate(values)
    except ValidationError as error:
        raise UsageError(
            describe_faults(where, error),
            "only what `autoprune measure --json` printed of an export can be read",
        ) from None


def _figures(entry: dict[str, Any], prefix: str) -> dict[str, Any]:
    names = (*RUN_FIGURES, "throughput_batch", "energy_source")
    return {name: entry[prefix + name] for name in names if prefix + name in entry}


def _measurement(record: TrialRecord, reported: Reported) -> Measurement:
    own = record.measurement
    assert own is not None  # noqa: S101
    latency = Latency(
        latency_ms=reported.latency_ms,
        latency_p95_ms=reported.latency_p95_ms,
        dense_ms=reported.dense_latency_ms,
        ratio=reported.latency_ratio,
        ratio_ci=reported.latency_ratio_ci,
        samples=reported.samples,
        noisy=reported.latency_noisy,
    )
    capability = Capability(
        name=reported.metric, value=reported.value, ci=reported.value_ci, examples=reported.examples
    )
    # A study without a final measurement ranks by the search split.
    search = own.search if record.fidelity == "final" else capability
    return own.model_copy(
        update={
            "search": search,
            "report": capability,
            "latency": latency,
            "size_bytes": reported.size_bytes,
            "size_ratio": reported.size_ratio,
            "figures": reported.figures,
            "elsewhere": {},
        }
    )


def _dense(own: Measurement, reported: Reported) -> Measurement:
    """Return the dense network's measurement, as far as a candidate's session tells it."""
    latency = Latency(
        latency_ms=reported.dense_latency_ms,
        latency_p95_ms=None,
        dense_ms=reported.dense_latency_ms,
        ratio=1.0,
        ratio_ci=(1.0, 1.0),
        samples=reported.samples,
        noisy=reported.latency_noisy,
    )
    figures = reported.figures.dense or RunFigures()
    return own.model_copy(update={"latency": latency, "figures": figures, "elsewhere": {}})
