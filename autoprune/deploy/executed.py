"""What runs as asked: from what each call of a layer became in a runtime to the record of a measurement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from autoprune.measure.record import Executed

_INTEGERS = ("int8", "dynamic int8")


class Asked(Protocol):
    """What was asked of a file."""

    @property
    def asked(self) -> Mapping[str, str]:
        """What each layer is to run in, where that is not plain float."""
        ...

    @property
    def stored(self) -> Mapping[str, int]:
        """Count of layers by the bits of their stored weights."""
        ...

    @property
    def foreign(self) -> int:
        """Number of products with weights that belong to no layer by name."""
        ...


def layer_of(call: str) -> str:
    """Return the layer of a call: its second one is named ``layer#2``, and so on."""
    return call.partition("#")[0]


def told(
    written: Asked,
    ran: Mapping[str, str],
    why: Mapping[str, str],
    operators: Mapping[str, int],
    precision: str,
) -> Executed:
    """Return the record of what a runtime executes.

    A layer runs as asked if all of its calls do.

    Args:
        written: The file, with what was asked for.
        ran: What each call of a layer runs in; see :func:`layer_of`.
        why: For each call what became of it, told where it does not run as asked.
        operators: Count of executed nodes by operator.
        precision: What layers are to compute in of which nothing else is asked.
    """
    calls: dict[str, list[str]] = {}
    for node in ran:
        calls.setdefault(layer_of(node), []).append(node)
    asked = {layer: written.asked.get(layer, precision) for layer in calls}
    off = {
        layer: next(node for node in nodes if ran[node] != asked[layer])
        for layer, nodes in calls.items()
        if any(ran[node] != asked[layer] for node in nodes)
    }
    # One that is asked for in int8 runs in it where every call does.
    found = {layer: asked[layer] if layer not in off else ran[off[layer]] for layer in calls}
    return Executed(
        layers=len(calls) + written.foreign,
        int8_layers=sum(each in _INTEGERS for each in found.values()),
        asked_int8=sum(each in _INTEGERS for each in written.asked.values()),
        operators=dict(sorted(operators.items())),
        not_as_asked=tuple(sorted(off) + sorted(set(written.asked) - set(calls))),
        asked=dict(sorted(Counter(asked.values()).items())),
        ran=dict(sorted(Counter(found.values()).items())),
        reasons={layer: why.get(node, "") for layer, node in sorted(off.items())},
        stored_layers=dict(written.stored),
    )
