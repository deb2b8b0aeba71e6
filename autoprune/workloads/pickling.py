"""A user's own network and data as bytes for another process of ours, and what stands in the way, by name."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

from autoprune.errors import UsageError
from autoprune.workloads.workload import Workload

_TOP_LEVEL = (
    "define it at the top level of a module (a lambda or a function inside of a function cannot be sent), "
    "or run with one worker in this process"
)
_MEMBERS = (
    "let it not keep what belongs to one process: open files, locks, generators, connections; "
    "open them when they are first used, and define its class at the top level of a module"
)


def picklable(workload: Workload, dumps: Callable[[Any], bytes] = pickle.dumps) -> bytes:
    """Return a workload of a user's own objects as bytes.

    Args:
        workload: The workload as the user gave it, before its network was written as a graph.
        dumps: How objects are pickled; ``cloudpickle.dumps`` takes what is defined in a notebook or script too.

    Raises:
        UsageError: If something of it cannot be pickled; names the part, and what to do.
    """
    try:
        return dumps(workload)
    except Exception as error:  # a user's classes may raise anything; the part is found below
        whole = error
    for name, part, hint in _parts(workload):
        try:
            dumps(part)
        except Exception as error:  # likewise
            raise UsageError(
                f"{name}, {_described(part)}, cannot be sent to workers: {_cause(error)}", hint
            ) from error
    raise UsageError(
        f"the workload {workload.name!r} cannot be sent to workers: {_cause(whole)}", _TOP_LEVEL
    ) from whole


def _parts(workload: Workload) -> Iterator[tuple[str, Any, str]]:
    """Yield the parts that a user gave, each with its name and what helps."""
    for name, module in workload.model.named_modules():
        # The innermost layer is the one to name; of the others only what they hold themselves.
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        yield f"the network's {f'layer {name!r}' if name else 'own class'}", type(module), _TOP_LEVEL
        for key, value in own.items():
            yield f"the network's attribute {f'{name}.{key}' if name else key!r}", value, _MEMBERS
    yield "the network", workload.model, _MEMBERS
    yield "the loss", workload.loss, _TOP_LEVEL
    yield "the training step", workload.training_step, _TOP_LEVEL
    yield "the metric's score", workload.metric.score, _TOP_LEVEL
    yield "the metric's per_example", workload.metric.per_example, _TOP_LEVEL
    data = workload.data
    for split in (data.train, data.calibration, data.search, data.report.unseal()):
        examples = getattr(split, "_examples", None)
        if examples is not None:
            yield f"the {examples.part} data", examples.dataset, _MEMBERS
            yield f"the collate_fn of the {examples.part} data", examples._collate, _TOP_LEVEL


def _described(part: Any) -> str:
    named = getattr(part, "__qualname__", None)
    return f"{part.__module__}.{named}" if isinstance(named, str) else f"a {type(part).__qualname__}"


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
