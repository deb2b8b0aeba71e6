"""What torch executes of a graph, read back by its profiler: operators and types of each layer's calls."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from autoprune.deploy.session import Floats
from autoprune.deploy.sessions.torch import TorchSession

_MARK = "autoprune node "
_CPU, _CUDA = DeviceType.CPU, DeviceType.CUDA
_DTYPES = {"float": "float32", "c10::BFloat16": "bfloat16", "c10::Half": "float16", "double": "float64"}
# Operators that name or move memory, or ask for something, mostly inside of others.
_MOVES = (
    "_nnpack_available _reshape_alias _to_copy _unsafe_view alias as_strided clone copy_ detach empty empty_like "
    "empty_strided expand lift_fresh permute reshape resize_ resolve_conj resolve_neg result_type select slice squeeze "
    "t to_mkldnn transpose unflatten unsqueeze view"
)
_IDLE = frozenset(f"aten::{name}" for name in _MOVES.split(" "))
_INTEGERS, _FP8 = "aten::_int_mm", "aten::_scaled_mm"
# What tells that each row of inputs has a range of its own.
_OWN_RANGE = "aten::amax"
_SPARSE = ("aten::_cslt_sparse_mm", "aten::_sparse_semi_structured_addmm", "aten::_sparse_semi_structured_mm",
           "aten::_sparse_semi_structured_linear")  # fmt: skip
_PRODUCTS = ("aten::convolution", "aten::addmm", "aten::mm", "aten::linear", "aten::bmm", *_SPARSE)


class Event(NamedTuple):
    """What the profiler saw on the processor.

    Attributes:
        start_ns: When it began.
        end_ns: When it ended.
        name: Its name.
        dtypes: Types of what it got.
        id: Number by which kernels on a GPU name it.
    """

    start_ns: int
    end_ns: int
    name: str
    dtypes: tuple[str, ...]
    id: int


@dataclass(frozen=True)
class Seen:
    """What was executed of one call of a layer.

    Attributes:
        operators: Names of its operators in the order of execution, inner ones after those that called them.
        dtype: Type of what its product reads; empty where there is none.
        kernels: Kernels on a GPU.
    """

    operators: tuple[str, ...]
    dtype: str
    kernels: tuple[str, ...] = ()

    @property
    def runs_in(self) -> str:
        """What the layer runs in, in the words of a measurement's record."""
        if _INTEGERS in self.operators:
            return "dynamic int8" if _OWN_RANGE in self.operators else "int8"
        if _FP8 in self.operators:
            return "fp8"
        sparse = any(name in self.operators for name in _SPARSE)
        return f"2:4 {self.dtype}" if sparse else self.dtype or "unknown"

    @property
    def why(self) -> str:
        """What became of it, for a layer that does not run as asked."""
        product = next(
            (name for name in self.operators if name in (_INTEGERS, _FP8, *_PRODUCTS)), "no product"
        )
        kernels = f" by {', '.join(dict.fromkeys(self.kernels))}" if self.kernels else ""
        return f"it runs as {product} on {self.dtype or 'no known type'}{kernels}"


def read_back(session: TorchSession, inputs: Floats) -> tuple[dict[str, Seen], dict[str, int]]:
    """Run a session's graph once under the profiler.

    Node by node and eager: of a compiled program this tells the products' types, which compilation keeps; the kernels
    into which it joins what lies between them are counted by :func:`compiled_operators`.

    Args:
        session: The session.
        inputs: Inputs of one inference.

    Returns:
        For each call of a layer what was executed; and the count of operators that called no other one.
    """
    with session.ready(), _profiler(session) as profiler:
        _Marked(session.module).run(session.on_device(inputs))
    events = _events(profiler)
    starts = [event.start_ns for event in events]
    calls: dict[str, str] = {
        n.name: n.meta.get("custom", {}).get("layer", "") for n in session.module.graph.nodes
    }
    found: dict[str, list[Event]] = {}
    for place, mark in enumerate(events):
        if mark.name.startswith(_MARK) and (call := calls[mark.name.removeprefix(_MARK)]):
            inside = events[place + 1 : bisect_left(starts, mark.end_ns)]
            found.setdefault(call, []).extend(inside)
    kernels = _kernels(profiler)
    return {call: _seen(own, kernels) for call, own in found.items()}, _count(events)


def compiled_operators(session: TorchSession, inputs: Floats) -> dict[str, int]:
    """Return the count of operators that a compiled program calls, joined kernels left out where they have no name."""
    given = session.on_device(inputs)
    with session.ready():
        session.call(given)
        with _profiler(session) as profiler:
            session.call(given)
    return _count(_events(profiler))


class _Marked(fx.Interpreter):
    """Runs a graph with a mark around each node."""

    def run_node(self, n: fx.Node) -> Any:
        """Run a node inside of a mark with its name."""
        with record_function(_MARK + n.name):
            return super().run_node(n)


def _profiler(session: TorchSession) -> profile:
    # The library behind it tells of its start, and of GPUs that it does not find, on the standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    kinds = [ProfilerActivity.CPU]
    if session.device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    return profile(activities=kinds, record_shapes=True)


def _events(profiler: profile) -> list[Event]:
    """Return what ran on the processor, outer events before those inside of them."""
    found = [
        Event(e.start_ns(), e.end_ns(), e.name(), tuple(e.dtypes()), e.correlation_id())
        for e in profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        if e.device_type() == _CPU
    ]
    return sorted(found, key=lambda e: (e.start_ns, -e.end_ns))


def _kernels(profiler: profile) -> dict[int, list[str]]:
    """Return the names of kernels by the event that launched them."""
    found: dict[int, list[str]] = {}
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.device_type() == _CUDA:
            found.setdefault(event.linked_correlation_id(), []).append(event.name())
    return found


def _seen(events: Sequence[Event], kernels: dict[int, list[str]]) -> Seen:
    types = [kind for e in events if e.name in _PRODUCTS for kind in e.dtypes[:1]]
    return Seen(
        operators=tuple(e.name for e in events),
        dtype=_DTYPES.get(types[0], types[0]) if types else "",
        kernels=tuple(name for e in events for name in kernels.get(e.id, ())),
    )


def _count(events: Sequence[Event]) -> dict[str, int]:
    """Count operators that called no other one; ``events`` are those of :func:`_events`."""
    own = [e for e in events if "::" in e.name and e.name not in _IDLE]
    innermost = [
        each.name
        for each, following in zip(own, [*own[1:], None], strict=True)
        if following is None or following.start_ns >= each.end_ns
    ]
    return dict(Counter(innermost))


def example_of(inputs: Tensor, session: TorchSession, batch: int) -> Floats:
    """Return as many inputs as one inference of a session has."""
    count = session.fixed_batch or batch
    repeated: Floats = inputs[torch.arange(count) % len(inputs)].numpy()
    return repeated
