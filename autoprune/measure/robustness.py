"""Robustness: accuracy and worst class of a network on images that are corrupted as they are read.

References:
    [Hendrycks2019] Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR 2019.
    [Hooker2019] What Do Compressed Deep Neural Networks Forget?, arXiv 1911.05248.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from autoprune.measure.capability import score, worst_class
from autoprune.measure.record import CorruptedScore, Robustness
from autoprune.workloads.corruptions import CORRUPTIONS, SEVERITIES, CorruptedSplit
from autoprune.workloads.splits import Split
from autoprune.workloads.workload import TOP1

Predict = Callable[[Iterator[Tensor]], Tensor]

_BATCH = 100
NO_CORRUPTION = "none"


def measure_robustness(
    predict: Predict,
    split: Split,
    classes: Sequence[str],
    *,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    say: Callable[[str], None] = lambda message: None,
) -> Robustness:
    """Score a network on the images of a split, as they are and under each corruption and severity.

    Compression can cost little on the whole and much on some classes and on corrupted images [Hooker2019]_.
    [Hendrycks2019]_ has 15 corruptions in 5 severities and relates errors to AlexNet's; here it is 4 in 3, and the
    dense network is what others are compared with.

    Args:
        predict: Takes batches of inputs, ``(b, channels, height, width)``; returns all outputs, ``(n, classes)``.
        split: Images and classes.
        classes: Names of the classes.
        corruptions: Names of :data:`~autoprune.workloads.corruptions.CORRUPTIONS`.
        severities: Of each, 1 to 5.
        seed: Seed of the noise.
        say: Gets a line before each evaluation.

    Raises:
        UsageError: If the split holds no images in 0..1.
        TrialError: If a score is not finite.
    """
    wanted = [(corruption, severity) for corruption in corruptions for severity in severities]
    scores = []
    for number, (corruption, severity) in enumerate([(NO_CORRUPTION, 0), *wanted]):
        say(f"{number + 1} of {len(wanted) + 1}: {corruption} {severity or ''}".rstrip())
        targets: list[Tensor] = []
        outputs = predict(_inputs(CorruptedSplit(split, corruption, severity, seed), targets))
        scores.append(_scored(corruption, severity, outputs, torch.cat(targets), classes))
    return Robustness(clean=scores[0], corrupted=tuple(scores[1:]), seed=seed)


def _inputs(split: Split, targets: list[Tensor]) -> Iterator[Tensor]:
    for inputs, wanted in split.batches(_BATCH):
        targets.append(wanted)
        yield inputs


def _scored(
    corruption: str, severity: int, outputs: Tensor, targets: Tensor, classes: Sequence[str]
) -> CorruptedScore:
    return CorruptedScore(
        corruption=corruption,
        severity=severity,
        accuracy=score(outputs, targets, TOP1),
        worst_class=worst_class(outputs, targets, classes),
    )
