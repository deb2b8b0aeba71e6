"""torch's sessions: a .pt2 file as a graph of ATen operators, eager or compiled, on the processor or a GPU."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from autoprune.deploy.session import Floats, NodeTime, Timer
from autoprune.deploy.sessions.pt2 import Program, read_pt2
from autoprune.errors import ExportError
from autoprune.target import Target

# What compilation is told besides the defaults: weights are constants, and laid out for the kernels once.
COMPILE_OPTIONS = {"freezing": True}
_RANDOM = torch.Tag.nondeterministic_seeded
# Kernel that a file names for a linear layer whose weight has at most two of four weights that are not zero.
SPARSE = "2:4"
_LINEAR = torch.ops.aten.linear.default
_WARM_RUNS = 2


def opening(target: Target) -> dict[str, Any]:
    """Return the settings of a session; see :func:`autoprune.deploy.session.opening`."""
    compiled = f"torch.compile(dynamic=False, options={COMPILE_OPTIONS})" if target.compile else "eager"
    return {"torch.set_num_threads": target.threads, "mode": compiled, "device": target.device}


class TorchSession:
    """One program; see :class:`autoprune.deploy.session.Session`.

    Args:
        program: The graph that was read.
        target: Device, and whether it is compiled.
        threads: Threads of one inference on the processor.
    """

    def __init__(self, program: Program, target: Target, threads: int) -> None:
        self.module, self.device, self.threads = folded(program.module), torch.device(target.device), threads
        if self.device.type == "cuda":
            _lower_sparse(self.module)
        self.call: Callable[[Tensor], Tensor] = self.module
        self.fixed_batch = program.batch
        if target.compile:
            # Every number of examples would be compiled anew.
            self.fixed_batch = program.batch or target.batch
            self.call = torch.compile(self.module, dynamic=False, options=dict(COMPILE_OPTIONS))

    def run(self, inputs: Floats) -> Floats:
        """Return the outputs of one inference."""
        with self.ready():
            found = self.call(self.on_device(inputs))
        return np.asarray(found.cpu().numpy(), np.float32)

    def timer(self, inputs: Floats) -> Timer:
        """Return what times one inference; inputs lie on the device before, outputs stay there."""
        given = self.on_device(inputs)
        timed = _wall_s if self.device.type == "cpu" else _event_s

        def once() -> float:
            with self.ready():
                return timed(self.call, given)

        return once

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Run in inference mode, with this session's threads; on a GPU float32 is not rounded to 10 bits."""
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode(), _kernels(self.device):
                yield
        finally:
            if before != self.threads:
                torch.set_num_threads(before)

    def on_device(self, inputs: Floats) -> Tensor:
        """Return inputs as a tensor on the device."""
        return torch.from_numpy(np.ascontiguousarray(inputs)).to(self.device)


def open_session(target: Target, model: Path | bytes, threads: int) -> TorchSession:
    """Open a model; see :func:`autoprune.deploy.session.open_session`.

    Raises:
        UsageError: If the file is none that is known.
        ExportError: If it is to be compiled, and there is no compiler.
    """
    if target.compile:
        check_compiler(target)
    return TorchSession(read_pt2(model, target.device), target, threads)


def check_compiler(target: Target) -> None:
    """Refuse to compile where nothing can.

    Raises:
        ExportError: If there is no C++ compiler, or on a GPU no Triton.
    """
    from torch._inductor import cpp_builder, exc
    from torch.utils._triton import has_triton

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ExportError(
            f"target {target.spec!r} needs a C++ compiler, and there is none: torch.compile makes C++ of a network",
            "install g++ or clang++, or leave 'compile' out of the target",
        ) from error
    if target.device == "cuda" and not has_triton():
        raise ExportError(
            f"target {target.spec!r} needs Triton, and there is none: torch.compile makes its kernels of a network",
            "install it: pip install triton; or leave 'compile' out of the target",
        )


def node_times(
    target: Target, model: Path, inputs: Floats, runs: int, limit_s: float
) -> list[NodeTime] | None:
    """Return what each node takes; see :func:`autoprune.deploy.session.node_times`.

    Node by node on the clock, on a GPU between events. The compiled program has kernels of several nodes each, and
    tells nothing of them.
    """
    if target.compile:
        return None
    opened = open_session(target, model, target.threads)
    given = opened.on_device(inputs)
    nodes = [node for node in opened.module.graph.nodes if node.op == "call_function"]
    durations: dict[fx.Node, list[float]] = {node: [] for node in nodes}
    with opened.ready():
        for _ in range(_WARM_RUNS):
            opened.module(given)
        begun = time.perf_counter()
        for _ in range(runs):
            clock = _NodeClock(opened.module, opened.device.type == "cuda")
            clock.run(given)
            for node, seconds in clock.seconds():
                durations[node].append(seconds)
            if time.perf_counter() - begun > limit_s:
                break
    return [NodeTime(node.name, str(node.target), tuple(durations[node])) for node in nodes]


class _NodeClock(fx.Interpreter):
    """Runs a graph once and takes the time of each node.

    Args:
        module: The graph.
        events: Whether time is taken by events on the GPU's own clock.
    """

    def __init__(self, module: fx.GraphModule, events: bool) -> None:
        super().__init__(module)
        self.events = events
        self.seen: list[tuple[fx.Node, Any, Any]] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run a node between two marks."""
        if n.op != "call_function":
            return super().run_node(n)
        begun = self._mark()
        made = super().run_node(n)
        self.seen.append((n, begun, self._mark()))
        return made

    def seconds(self) -> list[tuple[fx.Node, float]]:
        """Return the seconds of each node in the order of execution."""
        if not self.events:
            return [(node, (ended - begun) / 1e9) for node, begun, ended in self.seen]
        torch.cuda.synchronize()
        return [(node, begun.elapsed_time(ended) / 1e3) for node, begun, ended in self.seen]

    def _mark(self) -> Any:
        if not self.events:
            return time.perf_counter_ns()
        event = _event()
        event.record()
        return event


def _kernels(device: torch.device) -> AbstractContextManager[object]:
    """Let a GPU's convolutions be in the type that they are asked in, by the fastest kernels of several."""
    if device.type == "cpu":
        return nullcontext()
    found: AbstractContextManager[object] = torch.backends.cudnn.flags(
        enabled=True, benchmark=True, allow_tf32=False
    )
    return found


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _wall_s(call: Callable[[Tensor], Tensor], given: Tensor) -> float:
    begun = time.perf_counter_ns()
    call(given)
    return (time.perf_counter_ns() - begun) / 1e9


def _event_s(call: Callable[[Tensor], Tensor], given: Tensor) -> float:
    """Return the seconds of one inference between two events on the GPU, which waits for nothing before."""
    begun, ended = _event(), _event()
    torch.cuda.synchronize()
    begun.record()
    call(given)
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3


# -- the graph ---------------------------------------------------------------------------------


def folded(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph in which what depends on weights alone is computed: once, not at every inference."""
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            values[node] = getattr(module, str(node.target))
        elif (
            node.all_input_nodes and all(n in values for n in node.all_input_nodes) and _is_pure(node.target)
        ):
            args, kwargs = map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    graph = module.graph
    kept: dict[str, Any] = {}
    for node, value in list(values.items()):
        if all(user in values for user in node.users):
            continue
        name = str(node.target) if node.op == "get_attr" else f"folded_{len(kept)}"
        kept[name] = value
        if node.op != "get_attr":
            module.register_buffer(name, value)
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(name))
    graph.eliminate_dead_code()
    return fx.GraphModule(kept, graph)


def _lower_sparse(module: fx.GraphModule) -> None:
    """Give linear layers that the file says it of the kernels for weights with two of four values."""
    for node in module.graph.nodes:
        if node.target is _LINEAR and node.meta.get("custom", {}).get("kernel") == SPARSE:
            name = str(node.args[1].target)
            weight = torch.sparse.to_sparse_semi_structured(getattr(module, name))
            module.register_buffer(name, weight)


def _is_pure(target: Any) -> bool:
    if target is operator.getitem:
        return True
    known = isinstance(target, torch._ops.OpOverload)
    return known and not target._schema.is_mutable and _RANDOM not in target.tags
