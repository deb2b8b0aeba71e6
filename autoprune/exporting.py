"""Artifacts outside of their study: written into a folder of their own, and measured afresh there."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autoprune.config import make_config
from autoprune.deploy.parity import INT8_KERNEL_PARITY
from autoprune.deploy.registry import make_runtime
from autoprune.deploy.saturation import kernels_off
from autoprune.errors import AutopruneError, ExportError, StorageError, TrialError, UsageError, first_line
from autoprune.measure.figures import FULL_RUN
from autoprune.measure.latency import FINAL_PROTOCOL, measure_latency
from autoprune.report.card import card_text
from autoprune.report.robustness_view import robustness_json
from autoprune.search.bench import RECIPE_FILE, WEIGHTS_FILE
from autoprune.search.events import ignore
from autoprune.search.robustness import file_robustness
from autoprune.search.trial import evaluate_file
from autoprune.study.artifacts import artifact_folder, commit_folder, temporary_folder, verify
from autoprune.study.elsewhere import seen_on
from autoprune.study.front import dense_number, dense_record
from autoprune.study.reading import read_json
from autoprune.study.robustness import content_of
from autoprune.study.store import StudyStore
from autoprune.target import recorded_target
from autoprune.workloads.data import load_data
from autoprune.workloads.workload import TOP1

_log = logging.getLogger(__name__)


def export_point(
    study: str, trial: int, to: Path, target: str | None = None, storage: str | None = None
) -> Path:
    """Write the artifact of one trial into the folder ``to``.

    The folder gets the model file of the target, the weights as safetensors, the recipe, a card, and the
    dense network's model file, against which ``autoprune measure`` times it.

    Args:
        study: Name of the study.
        trial: Number of a point.
        to: Folder that gets the artifact; must be empty or absent.
        target: One of the study's targets; the first if not given.
        storage: Where the study's record is, if not where its folder says.

    Raises:
        UsageError: If ``to`` holds files already, or the trial has no artifact.
        StorageError: If the artifact is damaged; names the file.
    """
    own = StudyStore.open(study, storage)
    store = own if target is None else seen_on(own, target)
    record = store.record(trial)
    if record.state != "complete":
        raise UsageError(f"trial {trial} of study {study!r} has no artifact: it {record.state}")
    source, place = artifact_folder(own.paths, record), artifact_folder(store.paths, record)
    if not place.is_dir():
        kept = sorted(path.name for path in store.paths.artifacts.glob("trial-*"))
        there = f" for target {target!r}" if target is not None else ""
        raise UsageError(
            f"trial {trial} of study {study!r} has no artifact{there}: only points of the front keep theirs",
            f"`autoprune front {study}` lists them; kept here: {', '.join(kept) or 'none'}",
        )
    verify(source)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"{str(to)!r} exists and is not an empty folder", "choose another with --to DIR")
    card = card_text(store, record)  # reads all of the record: nothing is written before it is found sound
    folder: Path | None = None
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        folder = temporary_folder(to.parent)
        facts = recorded_target(store.settings()).facts
        shutil.copy2(place / facts.model_file, folder / facts.model_file)
        shutil.copy2(source / WEIGHTS_FILE, folder / WEIGHTS_FILE)
        content = _recipe_content(source / RECIPE_FILE, StorageError)
        content |= {"study": study, "trial": trial}
        content["settings"] = {**content["settings"], "target": store.settings()["target"], "also": []}
        (folder / RECIPE_FILE).write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
        shutil.copy2(_dense_folder(own, store) / facts.model_file, folder / facts.dense_file)
        (folder / "card.md").write_text(card, encoding="utf-8")
        if to.exists():
            to.rmdir()
        commit_folder(folder, to)
    except OSError as error:
        raise StorageError(
            f"{str(to)!r} cannot be written: {error}", "choose a folder on a disk with room"
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return to


def _dense_folder(own: StudyStore, seen: StudyStore) -> Path:
    """Return the folder with the dense network's file for the target that the study is seen on."""
    if seen is own:
        return own.paths.artifact(dense_number(own.records()) or 0)
    dense = dense_record(own.records())
    if dense is None:
        raise UsageError(f"study {own.paths.name!r} has not measured its dense network yet")
    return artifact_folder(seen.paths, dense)


def measure_artifact(
    folder: Path, data: str | None, *, trust_code: bool = False, robustness: bool = False
) -> dict[str, Any]:
    """Measure an exported artifact afresh on the report split, and its latency against the dense network.

    Args:
        folder: What ``export`` or ``compress`` wrote.
        data: Data by name; None takes the one that the artifact names.
        trust_code: Whether a Python file given as data may be run.
        robustness: Whether to score it and the dense network on corrupted images too, under ``robustness``.

    Returns:
        One flat mapping with the same names as a point of ``front --json``.

    Raises:
        UsageError: If the folder is not an exported artifact, or the data is unknown.
    """
    content, model_path, dense_path = _read_artifact(folder)
    settings = content["settings"]
    if content.get("metric", TOP1.name) != TOP1.name or settings["data"] == "given":
        raise UsageError(
            f"{str(folder)!r} was searched with data or a metric given as Python objects, which no name stands for",
            f"run its {model_path.name} in {recorded_target(settings).runtime} on that data; "
            "card.md holds the figures to compare with",
        )
    config = make_config({**settings, "data": data or settings["data"], "trust_code": trust_code})
    config.check_installed()
    loaded = load_data(config)
    runtime = make_runtime(config.target)
    with trial_errors_as_export_errors(), _file_faults(model_path):
        corrupted = [
            file_robustness(path, loaded, config, ignore)
            for path in ((model_path, dense_path) if robustness else ())
        ]
        capability = evaluate_file(runtime, model_path, loaded.report.unseal(), TOP1)
        few, _ = next(iter(loaded.report.unseal().batches(8, limit=8)))
        off = kernels_off(config.target, model_path.read_bytes(), few.numpy())
        if off > INT8_KERNEL_PARITY:
            _log.warning(
                "this processor's int8 kernels add in 16 bits, and the file's weights have all 8 bits: its outputs are "
                "off by %.2g of the largest here; search or compress on a machine like this one",
                off,
            )
        latency, figures = measure_latency(
            model_path,
            dense_path,
            config.target,
            loaded.input_shape,
            protocol=FINAL_PROTOCOL,
            run=FULL_RUN,
        )
    return {
        "artifact": str(folder),
        "study": content.get("study"),
        "trial": content.get("trial"),
        "target": config.target.spec,
        "model_sha256": content_of(folder, model_path.name),
        "data": config.data,
        "same_data": loaded.fingerprint == content["data_fingerprint"],
        "metric": capability.name,
        capability.name: capability.value,
        f"{capability.name}_ci": capability.ci,
        "examples": capability.examples,
        "latency_ms": latency.latency_ms,
        "latency_p95_ms": latency.latency_p95_ms,
        "dense_latency_ms": latency.dense_ms,
        "latency_ratio": latency.ratio,
        "latency_ratio_ci": latency.ratio_ci,
        "latency_noisy": latency.noisy,
        "kernels_off": off,
        "samples": latency.samples,
        "size_bytes": model_path.stat().st_size,
        "size_ratio": model_path.stat().st_size / dense_path.stat().st_size,
        **figures.flat(),
        **({"robustness": robustness_json(*corrupted)} if robustness else {}),
    }


@contextmanager
def trial_errors_as_export_errors() -> Iterator[None]:
    """Give what fails outside of a study the exit code of exports."""
    try:
        yield
    except TrialError as error:
        raise ExportError(
            f"{error.kind}: {error.reason}", "`autoprune doctor` shows what runs on this machine"
        ) from error


def _read_artifact(folder: Path) -> tuple[dict[str, Any], Path, Path]:
    if folder.is_file():
        folder = folder.parent
    recipe = folder / RECIPE_FILE
    content: dict[str, Any] = {"settings": {}}
    if recipe.is_file():
        try:
            content = _recipe_content(recipe, UsageError)
            content["settings"]["data"], content["data_fingerprint"]
            facts = recorded_target(content["settings"]).facts
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{str(recipe)!r} cannot be read: {type(error).__name__}: {error}") from error
    else:
        facts = recorded_target({}).facts
    paths = [recipe, folder / facts.model_file, folder / facts.dense_file]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UsageError(
            f"{str(folder)!r} is not an exported artifact: it lacks {', '.join(missing)}",
            "`autoprune export STUDY --trial N --to DIR` writes one",
        )
    verify(folder)
    return content, paths[1], paths[2]


def _recipe_content(path: Path, fault: type[AutopruneError]) -> dict[str, Any]:
    """Return what a ``recipe.json`` holds: a mapping with one of settings in it."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise fault(f"{str(path)!r} cannot be read: {error}", "export or search it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        raise fault(f"{str(path)!r} is no recipe of an artifact: it holds no settings", "export it again")
    return content


@contextmanager
def _file_faults(path: Path) -> Iterator[None]:
    """Turn what a runtime raises of a file that it cannot open or run into an ``ExportError``."""
    try:
        yield
    except (AutopruneError, OSError):
        raise
    except Exception as error:  # each runtime raises errors of its own
        raise ExportError(
            f"{str(path)!r} cannot be run: {type(error).__name__}: {first_line(error)}",
            "export or compress it again",
        ) from error
