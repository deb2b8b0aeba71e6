"""A workload: the network, the data, and the metric by which candidates are judged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.config import StudyConfig
from autoprune.errors import UsageError
from autoprune.workloads.catalog import WEIGHTS_WORDS, check_inputs, parse_model
from autoprune.workloads.data import load_data, say_on_stderr
from autoprune.workloads.download import Say
from autoprune.workloads.head import probe
from autoprune.workloads.models import choose_weights, load_network
from autoprune.workloads.objects import data_from_objects
from autoprune.workloads.splits import Data, Split
from autoprune.workloads.splitting import Limits
from autoprune.workloads.weights import load_state, state_digest

Loss = Callable[[Tensor, Tensor], Tensor]
TrainingStep = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]

__all__ = ["TOP1", "Data", "Metric", "Workload", "load_workload", "workload_from_objects"]


@dataclass(frozen=True)
class Metric:
    """What is searched for; higher is better.

    Attributes:
        name: Such as ``accuracy``.
        unit: Such as ``fraction``.
        score: Takes all outputs of a split, ``(n, …)``, and its targets, ``(n, …)``; returns one number.
        per_example: Takes the same and returns 0 or 1 for each example, ``(n,)``, so that an interval can be
            given; None where the metric is not a share of examples.
    """

    name: str
    unit: str
    score: Callable[[Tensor, Tensor], float]
    per_example: Callable[[Tensor, Tensor], Tensor] | None = None


def _hits(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.argmax(1) == targets


def _top1(outputs: Tensor, targets: Tensor) -> float:
    return float(_hits(outputs, targets).double().mean())


TOP1 = Metric("accuracy", "fraction", _top1, _hits)


@dataclass(frozen=True)
class Workload:
    """What a study works on.

    Attributes:
        name: For people.
        model: The dense network, in eval mode, on the CPU.
        data: Splits.
        metric: What candidates are judged by.
        loss: Takes outputs and targets; cross entropy unless the user gave another.
        training_step: A user's own: takes the network and a batch, returns the loss; None for the default.
        weights_source: Where the dense weights are from.
        search_split_seen: Whether the dense network may have been trained on the images of the search split,
            so that absolute drops on it mislead.
        dense_trained: Whether the network is trained for the data; else it is trained first.
        notes: Lines for people, such as the name of a replaced classifier.
    """

    name: str
    model: nn.Module
    data: Data
    metric: Metric
    loss: Loss
    training_step: TrainingStep | None
    weights_source: str
    search_split_seen: bool
    dense_trained: bool
    notes: tuple[str, ...] = ()


def load_workload(config: StudyConfig, say: Say = say_on_stderr) -> Workload:
    """Load the model and the data that the settings name.

    Args:
        config: Settings of the study.
        say: Gets progress of downloads, and notes.

    Raises:
        UsageError: If anything named is unknown, missing, damaged, untrusted, or does not fit together.
    """
    check_inputs(config)
    spec = parse_model(config.model)
    from_file = config.weights is not None and config.weights not in WEIGHTS_WORDS
    # A file that is refused is refused before anything is decoded or built.
    state = load_state(Path(config.weights)) if from_file and config.weights is not None else None
    data = load_data(config, say)
    if not data.classes:
        raise UsageError(
            f"the classes of data {data.name!r} are not known",
            "give it targets that are whole numbers from 0, in a TensorDataset or in an attribute `targets`",
        )
    weights = choose_weights(spec, config.weights, data.classes)
    loaded = load_network(
        spec,
        weights,
        data.classes,
        data.input_shape,
        seed=config.seed,
        trusted=config.trust_code,
        say=say,
        state=state,
    )
    probe(loaded.model, data.input_shape, next(data.calibration.batches(2, limit=2))[0])
    trained, notes = loaded.trained, loaded.notes
    if trained is None:
        trained, note = _looks_trained(loaded.model, data.calibration, len(data.classes))
        notes = (*notes, note)
    for note in notes:
        say(note)
    return Workload(
        name=f"{config.model} on {data.name}",
        model=loaded.model,
        data=data,
        metric=TOP1,
        loss=F.cross_entropy,
        training_step=None,
        weights_source=loaded.source,
        search_split_seen=loaded.seen and trained and data.search_from_train,
        dense_trained=trained,
        notes=notes,
    )


def _looks_trained(model: nn.Module, split: Split, classes: int) -> tuple[bool, str]:
    """Judge on calibration images whether a user's network knows the data: twice as often right as by chance."""
    hits = count = 0
    with torch.no_grad():
        for inputs, targets in split.batches(64, limit=256):
            hits += int(_hits(model(inputs), targets).sum())
            count += len(targets)
    share, chance = hits / count, 1.0 / classes
    deviation = (chance * (1.0 - chance) / count) ** 0.5
    trained = share > min(0.5 * (1.0 + chance), max(2.0 * chance, chance + 3.0 * deviation))
    verdict = "taken as trained" if trained else "trained first"
    return trained, f"the network given is right on {share:.1%} of {count} calibration images: {verdict}"


def workload_from_objects(
    model: nn.Module,
    data: Any,
    *,
    metric: Metric | None = None,
    loss: Loss | None = None,
    training_step: TrainingStep | None = None,
    config: StudyConfig,
    train_dense: bool = False,
) -> Workload:
    """Make a workload of a network and data of the user's own.

    Args:
        model: The network; it is copied, never changed.
        data: ``(train, test)``, a mapping with these keys and optionally ``search`` and ``calibration``, or one
            data set that is split; each a torch ``Dataset``, a ``DataLoader`` or a pair of tensors.
        metric: What candidates are judged by; top-1 accuracy if not given.
        loss: Takes outputs and targets; cross entropy if not given.
        training_step: Takes the network and a batch, returns the loss; the default step if not given.
        config: Settings of the study.
        train_dense: Whether the network has to be trained first in any case. Else it is trained first only where the
            metric is accuracy and the network is hardly better than chance.

    Raises:
        UsageError: If the data has another form, or network, data, metric and loss do not fit together.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is a {type(model).__name__}; allowed: a torch.nn.Module or a name")
    limits = Limits(config.search_examples, config.report_examples, config.calibration_examples)
    splits = data_from_objects(data, name=config.data or "given", seed=config.seed, limits=limits)
    try:
        own = copy.deepcopy(model).cpu().eval()
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"the network cannot be copied: {error}", "detach tensors that it stores") from error
    inputs, targets = next(splits.calibration.batches(2, limit=2))
    if not inputs.is_floating_point():
        raise UsageError(
            f"inputs are {inputs.dtype}; allowed: floating point, which is what latency is measured with",
            "let the data set convert its inputs; networks that take indices are not supported yet",
        )
    outputs = probe(own, splits.input_shape, inputs)
    if metric is None or loss is None:
        _check_classification(outputs, targets, len(splits.classes), metric, loss)
    if outputs.ndim == 2 and len(splits.classes) < outputs.shape[1] and not targets.is_floating_point():
        names = (*splits.classes, *(str(i) for i in range(len(splits.classes), outputs.shape[1])))
        splits = replace(splits, classes=names)
    trained = not train_dense
    notes: tuple[str, ...] = ()
    if trained and metric is None and splits.classes:
        trained, note = _looks_trained(own, splits.calibration, len(splits.classes))
        notes = (note,)
    return Workload(
        name=f"{type(model).__name__} on {splits.name}",
        model=own,
        data=splits,
        metric=metric or TOP1,
        loss=loss or F.cross_entropy,
        training_step=training_step,
        weights_source=f"given sha256:{state_digest(own)[:16]}",
        search_split_seen=trained and splits.search_from_train,
        dense_trained=trained,
        notes=notes,
    )


def _check_classification(
    outputs: Tensor, targets: Tensor, classes: int, metric: Metric | None, loss: Loss | None
) -> None:
    """Check that accuracy and cross entropy mean something where they were not replaced."""
    lacking = " and ".join(name for name, value in (("metric", metric), ("loss", loss)) if value is None)
    if outputs.ndim != 2 or targets.ndim != 1 or targets.is_floating_point():
        raise UsageError(
            f"outputs {tuple(outputs.shape)} with targets {tuple(targets.shape)} {targets.dtype} are no "
            "classification: outputs (n, classes) and whole numbers (n,) are",
            f"give your own {lacking}",
        )
    if classes > outputs.shape[1]:
        raise UsageError(f"the data has {classes} classes, the network {outputs.shape[1]} outputs")
