"""A study as it is on another of its targets, or by figures that were measured elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoprune.measure.record import Measurement
from autoprune.naming import unknown_name
from autoprune.study.records import TrialRecord
from autoprune.study.store import StudyStore
from autoprune.target import target_word


def targets_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the words of a study's targets, the one that its search decided by first."""
    if "targets" in settings:  # of a study that is seen on one of them
        return tuple(settings["targets"])
    return tuple(target_word(each) for each in (settings.get("target", {}), *settings.get("also", ())))


def seen_on(store: StudyStore, spec: str) -> StudyStore:
    """Return a study with the figures of one of its targets; trials that were not measured there have none.

    Raises:
        UsageError: If the study has no such target.
    """
    settings = store.settings()
    targets = targets_of(settings)
    if spec not in targets:
        raise unknown_name("target", spec, targets, f"study {store.paths.name!r} was measured on these")
    if spec == targets[0]:
        return store
    own = settings["also"][targets.index(spec) - 1]
    seen = {**settings, "target": own, "targets": targets}
    return store.as_seen(lambda record: record_on(record, spec), seen, store.paths.on_target(spec))


def record_on(record: TrialRecord, spec: str) -> TrialRecord:
    """Return a trial with the figures of a further target; without any where it was not measured there."""
    measured = record.measurement.elsewhere.get(spec) if record.measurement is not None else None
    return record.model_copy(update={"measurement": measured})


def seen_by(store: StudyStore, measured: Mapping[int, Measurement]) -> StudyStore:
    """Return a study with other figures, by trial; trials without any count as not measured."""

    def given(record: TrialRecord) -> TrialRecord:
        return record.model_copy(update={"measurement": measured.get(record.number)})

    return store.as_seen(given, store.settings(), store.paths)
