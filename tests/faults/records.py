"""What a study under fault wrote down itself: each acknowledged trial, each evaluation, each step of training."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

LOG = "AUTOPRUNE_TESTS_LOG"
_installed = False


def write(**content: Any) -> None:
    """Append one line and flush it to disk."""
    place = os.environ.get(LOG)
    if place is None:
        return
    descriptor = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, json.dumps(content).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(place: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; none where there is none."""
    if not place.exists():
        return []
    return [json.loads(line) for line in place.read_text().splitlines()]


def digest(record: Any) -> str:
    """Return the hash of a trial's record."""
    return hashlib.sha256(record.model_dump_json().encode()).hexdigest()[:16]


def log_store() -> None:
    """Log what the store acknowledges."""
    from autoprune.study.store import StudyStore

    def acknowledged(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def wrapped(store: Any, trial: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(store, trial, *args, **kwargs)
            number = result if isinstance(result, int) else getattr(trial, "number", trial)
            record = store.records()[number]
            write(told=number, state=record.state, digest=digest(record), final=record.fidelity == "final")
            return result

        return wrapped

    for name in ("complete", "fail", "add_final"):
        setattr(StudyStore, name, acknowledged(getattr(StudyStore, name)))


def install() -> None:
    """Log what the store acknowledges, what is evaluated, and steps of training."""
    global _installed
    if _installed:
        return
    _installed = True
    log_store()
    from autoprune.compress.finetune import Trainer
    from autoprune.search.baselines import effective_key
    from tests.faults import synthetic

    driver: Any = importlib.import_module("autoprune.search.driver")
    trainers: Any = Trainer
    evaluate, step = driver.run_trial, trainers._step

    def run_trial(bench: Any, recipe: Any, *args: Any, **kwargs: Any) -> Any:
        write(began=effective_key(recipe, synthetic.groups()))
        return evaluate(bench, recipe, *args, **kwargs)

    def counted(trainer: Any, progress: float) -> None:
        step(trainer, progress)
        place = os.environ.get(LOG)
        if place is not None:
            with Path(f"{place}.steps").open("ab") as file:
                file.write(b".")

    driver.run_trial = run_trial
    trainers._step = counted
