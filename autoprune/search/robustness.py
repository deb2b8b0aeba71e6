"""Robustness of what a search left: every point of a front, from its exported model file, on the report split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from autoprune.config import StudyConfig, make_config
from autoprune.deploy.registry import make_runtime
from autoprune.errors import UsageError
from autoprune.measure.record import Robustness
from autoprune.measure.robustness import measure_robustness
from autoprune.search.events import Listener, Progress
from autoprune.study.artifacts import artifact_folder, verify
from autoprune.study.front import dense_number
from autoprune.study.records import TrialRecord
from autoprune.study.robustness import RobustnessCache, content_of
from autoprune.study.store import StudyStore
from autoprune.target import recorded_target
from autoprune.workloads.data import load_data
from autoprune.workloads.splits import Data
from autoprune.workloads.workload import TOP1


def file_robustness(path: Path, data: Data, config: StudyConfig, listener: Listener) -> Robustness:
    """Measure an exported model file on the report split.

    Args:
        path: The model file.
        data: The data; its report split is unsealed.
        config: Target and seed.
        listener: Gets progress.

    Raises:
        UsageError: If the data are no images in 0..1.
    """
    runtime = make_runtime(config.target)

    def predict(batches: Iterator[Tensor]) -> Tensor:
        return runtime.predict(path, batches)

    return measure_robustness(
        predict,
        data.report.unseal(),
        data.classes,
        seed=config.seed,
        say=lambda message: listener(Progress("robustness", f"{path.parent.name}: {message}")),
    )


def study_robustness(
    store: StudyStore, records: Sequence[TrialRecord], listener: Listener, *, trust_code: bool = False
) -> dict[int, Robustness]:
    """Return the robustness of trials by their numbers; what was measured before is taken from beside the study.

    Each is kept as soon as it is measured. Trials whose artifact was not kept are left out.

    Args:
        store: The study.
        records: Its trials to measure.
        listener: Gets progress.
        trust_code: Whether a Python file given as data may be run.

    Raises:
        UsageError: If no name stands for the study's data or metric, or the data changed since.
        StorageError: If an artifact is damaged.
    """
    settings = store.settings()
    metrics = {r.measurement.search.name for r in records if r.measurement is not None}
    if settings["data"] == "given" or metrics - {TOP1.name}:
        raise UsageError(
            f"study {store.paths.name!r} was searched with data or a metric given as Python objects, "
            "which no name stands for",
            "measure_robustness of autoprune.measure.robustness takes any network and any split of images",
        )
    cache, fingerprint = RobustnessCache(store.paths), store.notes().get("data_content", "")
    folders = {r.number: _folder(store, r) for r in records}
    model_file = recorded_target(settings).facts.model_file
    keys = {n: content_of(folder, model_file) for n, folder in folders.items() if folder is not None}
    missing = [n for n, key in keys.items() if cache.get(key, fingerprint) is None]
    if missing:
        config = make_config({**settings, "trust_code": trust_code})
        listener(Progress("load", f"loading {config.data or 'the usual data of ' + config.model}"))
        data = load_data(config)
        if data.fingerprint != fingerprint:
            raise UsageError(
                f"the data of study {store.paths.name!r} changed since it began: other content under the same name",
                "figures on it could not be compared; restore the data",
            )
        for number in missing:
            folder = folders[number]
            if folder is not None and cache.get(keys[number], fingerprint) is None:
                verify(folder)
                result = file_robustness(folder / model_file, data, config, listener)
                cache.put(keys[number], fingerprint, result)
    found = {number: cache.get(key, fingerprint) for number, key in keys.items()}
    return {number: result for number, result in found.items() if result is not None}


def _folder(store: StudyStore, record: TrialRecord) -> Path | None:
    """Return where a trial's artifact is; the dense network's is trial 0's where the final phase kept no other."""
    folder = artifact_folder(store.paths, record)
    if not folder.is_dir() and record.label == "dense":
        folder = store.paths.artifact(dense_number(store.records()) or 0)
    return folder if folder.is_dir() else None
