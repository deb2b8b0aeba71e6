"""Which channels of a network can be scaled against each other, seen in one run.

Every floating-point value carries, for each of its elements, the *unit* that it is scaled with. Layers and
normalisations make new units; operations that only move values, or for which :math:`f(s x) = s f(x)` with every
:math:`s > 0`, pass them on; additions make units one; everything else fixes them. What a layer reads and what another
one makes can be multiplied and divided by one factor for each unit that is not fixed; the network computes the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from autoprune.compress.flow.rules import RULES
from autoprune.compress.flow.units import Call, Flow, Tape
from autoprune.compress.outputs import flat_outputs
from autoprune.compress.statistics import kept_as_was

# Calls that tell shapes and types alone.
_TELLING = {
    "__get__", "size", "dim", "ndimension", "numel", "stride", "is_floating_point", "__len__", "sym_size",
    "is_contiguous", "get_device", "element_size", "storage_offset", "is_complex",
}  # fmt: skip


@torch.no_grad()
def channel_flow(model: nn.Module, inputs: Tensor) -> Flow:
    """Run a network once and return which channels can be scaled against each other.

    What runs where torch's functions are not seen (scripted modules, autograd functions of the user's own) is not known
    to read anything, so that whoever scales units has to compare outputs too.

    Args:
        model: The network; it is as before afterwards.
        inputs: A few inputs on the model's device.
    """
    tape = Tape(model)
    with kept_as_was(model), torch.no_grad():
        model.eval()
        with _Recorder(tape):
            outputs = model(inputs.clone())
    for tensor in flat_outputs(outputs):
        tape.fix(tensor)
    return tape.flow()


@torch.no_grad()
def input_maxima(model: nn.Module, weights: Collection[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the largest magnitude of every input channel of layers, ``(in,)`` by the name of the layer's weight.

    Args:
        model: The network; it is as before afterwards.
        weights: Names of the layers' weights.
        batches: Inputs on the model's device.
    """
    names = {id(p): name for name, p in model.named_parameters() if name in weights}
    maxima = _Maxima(names)
    with kept_as_was(model), torch.no_grad():
        model.eval()
        with maxima:
            for inputs in batches:
                model(inputs)
    return maxima.found


class _Recorder(TorchFunctionMode):
    """Sees every call of a torch function."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name_of(func)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        before = None if first is None else self.tape.units(first)
        output = func(*args, **kwargs)
        if name in _TELLING and not isinstance(output, Tensor):
            return output
        rule = RULES.get(name)
        call = Call(self.tape, name, func, args, kwargs, output, before)
        if rule is None or not args or not rule(call):
            for tensor in _tensors((args, kwargs)):
                self.tape.fix(tensor)
                self.tape.note_elsewhere(tensor)
            for tensor in _tensors(output):
                self.tape.put(tensor, None)
        return output


class _Maxima(TorchFunctionMode):
    """Sees what layers read."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.found: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name_of(func)
        place = 5 if name == "multi_head_attention_forward" else 1
        weight = args[place] if len(args) > place else kwargs.get("weight")
        own = self.names.get(id(weight))
        if (
            own is not None
            and isinstance(weight, Tensor)
            and (name == "linear" or place == 5 or "conv" in name)
        ):
            inputs = args[0]
            dim = inputs.dim() - (weight.dim() - 1)
            seen = inputs.abs().amax([other for other in range(inputs.dim()) if other != dim])
            self.found[own] = torch.maximum(self.found[own], seen) if own in self.found else seen
        return func(*args, **kwargs)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_iter(values) if isinstance(value, Tensor))


def _name_of(function: Any) -> str:
    """Return the name of a function without its overload: ``relu`` for ``torch.ops.aten.relu.default``."""
    name = str(getattr(function, "__name__", function)).partition(".")[0]
    if name.startswith("__") and name.endswith("__"):
        return name
    return name.strip("_")
