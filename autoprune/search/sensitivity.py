"""Sensitivity analysis: every group cut alone at every ratio, measured on the search split and kept for later."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from autoprune.compress.effects import EffectMeter
from autoprune.compress.sensitivity import SensitivityMeter
from autoprune.compress.statistics import collect_statistics
from autoprune.config import StudyConfig
from autoprune.errors import StorageError, UsageError
from autoprune.naming import cache_root
from autoprune.search.bench import discover, training_device
from autoprune.search.curves import Analysis, Cut, Measured
from autoprune.search.events import Listener, Progress
from autoprune.search.interrupt import Interrupt
from autoprune.space.groups import Groups, kept_count
from autoprune.space.recipe import GRADIENT_CRITERIA, Recovery
from autoprune.study.artifacts import write_text_atomic
from autoprune.workloads.training import train_dense
from autoprune.workloads.weights import state_digest
from autoprune.workloads.workload import Workload, load_workload

Recover = Literal["none", "closed_form"]
Wanted = tuple[str, int, str]

_FORMAT = 1
_BATCH = 100
_SAVED_EVERY = 20
_log = logging.getLogger(__name__)


def analyse(
    config: StudyConfig,
    ratios: Sequence[float],
    criteria: Sequence[str],
    recover: Recover,
    listener: Listener,
    interrupt: Interrupt,
) -> Analysis:
    """Cut every prunable group of a network by itself and measure what is lost.

    Ctrl-C ends it after the cut at hand. What was measured before of the same network, data and recovery
    is taken from the cache.

    Args:
        config: Model, data, weights.
        ratios: Shares removed, each in ``(0, 1)``.
        criteria: How units are ranked.
        recover: Whether weights and BatchNorm statistics are recovered in closed form after each cut.
        listener: Gets progress.
        interrupt: Hears of Ctrl-C while cuts are measured.

    Raises:
        UsageError: If the network has no group that can be pruned.
    """
    listener(Progress("load", f"loading {config.model} and {config.data or 'its usual data'}"))
    workload = load_workload(config)
    listener(Progress("groups", f"finding the groups of {config.model}"))
    workload, groups = discover(workload)
    if not groups.prunable:
        raise UsageError(
            f"no group of {config.model!r} can be pruned", "`autoprune groups` tells the reason of each"
        )
    if not workload.dense_trained:
        workload = train_dense(
            workload,
            deadline=None,
            progress=lambda message: listener(Progress("dense", message)),
            seed=config.seed,
        )
    return analyse_workload(workload, groups, config, ratios, criteria, recover, listener, interrupt)


def analyse_workload(
    workload: Workload,
    groups: Groups,
    config: StudyConfig,
    ratios: Sequence[float],
    criteria: Sequence[str],
    recover: Recover,
    listener: Listener,
    interrupt: Interrupt,
) -> Analysis:
    """Do what :func:`analyse` says with a network that is loaded and trained."""
    wanted = _wanted(groups, ratios, criteria)
    place = cache_root() / "sensitivity" / f"{_key(workload, groups, config, recover)}.json"
    known = {(c.group, c.kept, c.criterion): c for c in _read(place)}
    listener(Progress("sensitivity", "collecting statistics and measuring the dense network"))
    meter = _meter(workload, groups, config, criteria, recover)
    effects = EffectMeter(meter, workload.metric.score)
    with interrupt.listening():
        _measure(
            effects,
            [key for key in wanted if key not in known],
            known,
            criteria[0],
            place,
            listener,
            interrupt,
        )
    return Analysis(
        metric=workload.metric.name,
        measure="divergence" if meter.compares_outputs else "loss",
        recover=recover,
        dense=effects.dense,
        uncut=effects.uncut,
        examples=len(workload.data.search),
        ratios=tuple(ratios),
        criteria=tuple(criteria),
        groups=tuple(
            Measured(name=g.name, type=g.type, units=g.size, block=g.block) for g in groups.prunable
        ),
        cuts=tuple(known[key] for key in wanted if key in known),
        complete=all(key in known for key in wanted),
    )


def _measure(
    effects: EffectMeter,
    missing: Sequence[Wanted],
    known: dict[Wanted, Cut],
    any_criterion: str,
    place: Path,
    listener: Listener,
    interrupt: Interrupt,
) -> None:
    """Add what is missing to what is known, and keep it, until the user ends it."""
    for done, key in enumerate(missing):
        if interrupt():
            break
        group, kept, criterion = key
        listener(Progress("sensitivity", f"cut {done + 1} of {len(missing)}: {group}, {kept} units left"))
        effect = effects.of_cut(group, kept, criterion or any_criterion)
        known[key] = Cut(
            group=group,
            kept=kept,
            criterion=criterion,
            accuracy=effect.capability,
            divergence=effect.divergence,
        )
        if done % _SAVED_EVERY == _SAVED_EVERY - 1:
            _write(place, known.values())
    if missing:
        _write(place, known.values())


def _wanted(groups: Groups, ratios: Sequence[float], criteria: Sequence[str]) -> list[Wanted]:
    """Return what is measured, so that an interruption leaves every group with something: ratios outermost.

    Ratios in the middle come first. Counts are not rounded to a width: curves are of the network, not of a target.
    """
    found: list[Wanted] = []
    for criterion in criteria:
        for ratio in sorted(ratios, key=lambda ratio: abs(ratio - 0.5)):
            found += [(g.name, kept_count(g.size, ratio, 1), criterion) for g in groups.prunable]
    found += [(g.name, 0, "") for g in groups.prunable if g.block]
    sizes = {g.name: g.size for g in groups.prunable}
    return [key for key in dict.fromkeys(found) if key[1] < sizes[key[0]]]


def _meter(
    workload: Workload, groups: Groups, config: StudyConfig, criteria: Sequence[str], recover: Recover
) -> SensitivityMeter:
    closed = recover == "closed_form"
    recovery = Recovery(least_squares=closed, batchnorm=closed, finetune_steps=0)
    calibration = list(workload.data.calibration.batches(64, limit=config.calibration_examples))
    limits = {} if closed else {"gram_limit": 0}  # second moments of patches are for least squares alone
    statistics = collect_statistics(
        workload.model,
        groups,
        calibration,
        gradients=any(name in GRADIENT_CRITERIA for name in criteria),
        loss=workload.loss,
        **limits,
    )
    return SensitivityMeter(
        workload.model,
        groups,
        statistics,
        calibration,
        list(workload.data.search.batches(_BATCH)),
        loss=workload.loss,
        recovery=recovery,
        distils=workload.training_step is None,
        device=training_device(),
    )


def _key(workload: Workload, groups: Groups, config: StudyConfig, recover: Recover) -> str:
    """Return a name for all that a cut's figures depend on."""
    content = [
        _FORMAT,
        state_digest(workload.model),
        groups.model_dump_json(),
        workload.data.fingerprint,
        workload.metric.name,
        config.calibration_examples,
        config.seed,
        recover,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _read(place: Path) -> list[Cut]:
    try:
        return [Cut.model_validate(cut) for cut in json.loads(place.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, ValidationError) as error:
        _log.warning("%s cannot be used and is measured again: %s", place, error)
        return []


def _write(place: Path, cuts: Iterable[Cut]) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(place, json.dumps([cut.model_dump() for cut in cuts]))
    except (OSError, StorageError) as error:
        _log.warning("the sensitivity could not be cached in %s: %s", place, error)
