"""Numbers in a network's code that count units: found in the exported graph, written into the rewritten one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from autoprune.compress.graph.capture import arguments_of, layer_of, where
from autoprune.compress.graph.network import GraphNetwork
from autoprune.compress.graph.propagate import Propagation
from autoprune.compress.graph.units import ALWAYS, Dim
from autoprune.compress.layers import split_name

_Place = tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """One number in the code.

    Attributes:
        name: Name of the attribute that takes its place.
        node: The operation that has it, in the exported graph.
        place: Where it stands among the arguments: an argument's number, and the place in a list.
        counted: What it counts: units that each index needs.
    """

    name: str
    node: fx.Node
    place: _Place
    counted: Dim


def find_sizes(p: Propagation) -> list[Size]:
    """Return all numbers that count something that can be removed.

    Where a number cannot become an attribute, its units are left alone, and the propagation says why.

    Args:
        p: The finished walk.
    """
    found: list[Size] = []
    taken: dict[str, int] = {}
    for node in p.captured.nodes:
        if node.op != "call_function" or node in p.layers:
            continue
        finder = _FINDERS.get(str(node.target).removeprefix("aten.").partition(".")[0].rstrip("_"))
        for place, counted in finder(p, node) if finder else ():
            if (p.units.resolved(counted) != ALWAYS).any():
                owner = layer_of(node)
                taken[owner] = taken.get(owner, -1) + 1
                name = f"{owner}.size_{taken[owner]}".lstrip(".")
                found.append(Size(name, node, place, counted))
    return found


def write_sizes(network: GraphNetwork, nodes: Mapping[fx.Node, fx.Node], sizes: Sequence[Size]) -> None:
    """Put attributes in the place of numbers, in place.

    Args:
        network: The rewritten network.
        nodes: Its node for each operation of the exported graph.
        sizes: What :func:`find_sizes` returned, or some of it.
    """
    for size in sizes:
        node = nodes[size.node]
        owner, own = split_name(size.name)
        _module(network, owner).__dict__[own] = len(size.counted)
        with network.graph.inserting_before(node):
            value = network.graph.create_node("get_attr", size.name)
        node.args = tuple(_replaced(list(node.args), size.place, value))
    if sizes:
        network.run_graph(network.graph)


def _replaced(arguments: list[Any], place: _Place, value: Any) -> list[Any]:
    first, *rest = place
    own = _replaced(list(arguments[first]), tuple(rest), value) if rest else value
    return [*arguments[:first], own, *arguments[first + 1 :]]


def _module(network: nn.Module, name: str) -> nn.Module:
    """Return the module called ``name``, made on the way where the graph runs the parts of one alone."""
    found = network
    for own in name.split(".") if name else ():
        if own not in found._modules:
            found.add_module(own, nn.Module())
        found = found.get_submodule(own)
    return found


# -- finders: arguments of an operation that are numbers, with what they count -----------------


_Found = Iterator[tuple[_Place, Dim]]


def _shape(argument: int) -> Callable[[Propagation, fx.Node], _Found]:
    def find(p: Propagation, node: fx.Node) -> _Found:
        sizes: Any = node.args[argument] if len(node.args) > argument else ()
        made = p.dims(node)
        begin = len(made) - len(sizes)
        computed = [place for place, size in enumerate(sizes) if not isinstance(size, int)]
        open_one = len(computed) == 1 and -1 not in sizes
        for place, size in enumerate(sizes):
            if place in computed and not open_one:
                p.fix([made[begin + place]], f"{where(node)} computes its size")
            elif isinstance(size, int) and size != -1:
                yield (argument, place), made[begin + place]

    return find


def _unflattened(p: Propagation, node: fx.Node) -> _Found:
    sizes: Any = node.args[2]
    first = int(arguments_of(node)["dim"]) % len(p.dims(node.args[0]))
    for place, size in enumerate(sizes):
        if isinstance(size, int) and size != -1:
            yield (2, place), p.dims(node)[first + place]


def _pieces(p: Propagation, node: fx.Node) -> _Found:
    whole: Any = p.of[node]
    place = int(arguments_of(node).get("dim", 0))
    for number, dims in enumerate(whole if isinstance(whole, tuple) else ()):
        yield (1, number), dims[place % len(dims)]


def _bounds(p: Propagation, node: fx.Node) -> _Found:
    given = arguments_of(node)
    x = p.dims(node.args[0])
    if not x:
        return
    dim = x[int(given["dim"]) % len(x)]
    step = given.get("step") or 1
    start, stop = given.get("start") or 0, given.get("end")
    if "length" in given:
        if isinstance(start, int):
            yield (2,), dim[:start]
            yield (3,), dim[start : start + int(given["length"])]
        return
    if step != 1:
        p.fix([dim], f"{where(node)} takes every {step}th")
    for argument, bound in ((2, start), (3, stop)):
        if isinstance(bound, int) and abs(bound) < len(dim) and len(node.args) > argument:
            if bound >= 0:
                yield (argument,), dim[:bound]
            else:
                p.fix([dim], f"{where(node)} counts from the end")


def _selected(p: Propagation, node: fx.Node) -> _Found:
    given = arguments_of(node)
    x = p.dims(node.args[0])
    index = given["index"]
    if x and isinstance(index, int):
        dim = x[int(given["dim"]) % len(x)]
        if index > 0:
            yield (2,), dim[:index]
        elif index < 0 and index != -1:
            p.fix([dim], f"{where(node)} counts from the end")


def _padded(p: Propagation, node: fx.Node) -> _Found:
    amounts: Any = node.args[1]
    made = p.dims(node)
    for place in range(len(amounts) // 2):
        before, after = int(amounts[2 * place]), int(amounts[2 * place + 1])
        dim = made[len(made) - 1 - place]
        if before > 0:
            yield (1, 2 * place), dim[:before]
        if after > 0:
            yield (1, 2 * place + 1), dim[len(dim) - after :]


def _normalised(p: Propagation, node: fx.Node) -> _Found:
    sizes: Any = node.args[1]
    for place in range(len(sizes)):
        yield (1, place), p.dims(node)[place - len(sizes)]


def _grouped(p: Propagation, node: fx.Node) -> _Found:
    """A convolution that is no layer of its own keeps its number of groups."""
    given = arguments_of(node)
    if int(given.get("groups", 1)) > 1:
        p.fix([p.dims(node)[1]], f"{where(node)} has groups and computes its weight")
    yield from ()


_FINDERS: dict[str, Callable[[Propagation, fx.Node], _Found]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "new_zeros", "new_ones", "new_full", "new_empty"), _shape(1)),
    **dict.fromkeys(("zeros", "ones", "full", "empty"), _shape(0)),
    "expand": _shape(1),
    "unflatten": _unflattened,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _pieces),
    **dict.fromkeys(("slice", "narrow"), _bounds),
    "select": _selected,
    **dict.fromkeys(("pad", "constant_pad_nd"), _padded),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalised),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"), _grouped),
}  # fmt: skip
