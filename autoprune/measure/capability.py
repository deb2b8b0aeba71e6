"""Capability: the task's metric with its interval, and the class on which a network does worst."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from autoprune.errors import TrialError
from autoprune.measure.record import Capability, ClassScore, Interval
from autoprune.measure.stats import wilson_interval
from autoprune.workloads.workload import Metric


def score(outputs: Tensor, targets: Tensor, metric: Metric) -> Capability:
    """Score outputs by ``metric``.

    Args:
        outputs: Outputs of the artifact, ``(n, …)``.
        targets: What was wanted, ``(n, …)``.
        metric: Higher is better.

    Returns:
        The score with its 95 % interval: Wilson's for a share of examples, the normal one for a mean, and the
        score itself where the metric gives no values by example.

    Raises:
        TrialError: If the score is NaN or infinite.
    """
    value = float(metric.score(outputs, targets))
    if not math.isfinite(value):
        raise TrialError("nan" if math.isnan(value) else "inf", f"{metric.name} is {value}")
    return Capability(
        name=metric.name, value=value, ci=_interval(outputs, targets, metric, value), examples=len(targets)
    )


def worst_class(outputs: Tensor, targets: Tensor, names: Sequence[str] = ()) -> ClassScore:
    """Return the class with the lowest top-1 accuracy, the first of equal ones.

    The lowest of many shares lies below what that class is worth by chance alone, the more so the fewer examples a
    class has; the interval is the class's own and knows nothing of the choice.

    Args:
        outputs: Outputs, ``(n, classes)``.
        targets: Classes, ``(n,)``; those of which there is no example are left out.
        names: Names of the classes; their numbers where there is none.
    """
    hits = (outputs.argmax(1) == targets).double()
    best: ClassScore | None = None
    for index in sorted(set(targets.tolist())):
        own = hits[targets == index]
        right, count = float(own.sum()), len(own)
        if best is None or right / count < best.value:
            name = names[index] if index < len(names) else str(index)
            best = ClassScore(
                name=name, index=index, value=right / count, ci=wilson_interval(right, count), examples=count
            )
    if best is None:
        raise ValueError("there are no examples")
    return best


def _interval(outputs: Tensor, targets: Tensor, metric: Metric, value: float) -> Interval:
    if metric.per_example is None:
        return (value, value)
    each = metric.per_example(outputs, targets).double()
    if bool(((each == 0) | (each == 1)).all()):
        return wilson_interval(float(each.sum()), len(each))
    half = 1.96 * float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else 0.0
    return (value - half, value + half)
