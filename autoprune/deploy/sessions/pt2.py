"""Reads .pt2 files without running anything that they hold.

``torch.export.load`` unpickles parts of a file, and evaluates its symbolic sizes and its guards as Python code (torch
2.14). Here a graph is made of what is known: operators of ATen by name, numbers, and tensors from raw bytes. The rest
is refused.
"""

from __future__ import annotations

import io
import json
import operator
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from autoprune.errors import UsageError

_SCHEMA = 8
_LEAST_LIMIT, _MOST_PACKED = 64 * 2**20, 50
_MODEL, _WEIGHTS, _CONSTANTS = (
    "models/model.json",
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
)
_ATEN = re.compile(r"torch\.ops\.aten\.([a-z_0-9A-Z]+)\.([a-z_0-9A-Z]+)")
# Operators of ATen that reach beyond tensors.
_BARRED = ("from_file", "_print")
_NUMBERS = "add sub mul floordiv truediv mod neg pow eq ne lt le gt ge getitem"
_PLAIN: dict[str, Callable[..., Any]] = {
    **{f"_operator.{name}": getattr(operator, name) for name in _NUMBERS.split()},
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "torch.sym_int": torch.sym_int,
}
# Numbers of the format's enumerations.
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16, 29: torch.float8_e4m3fn, 30: torch.float8_e5m2,
}  # fmt: skip
_MEMORY = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
_LAYOUTS = {7: torch.strided}
# Kinds of arguments that hold what they mean, another argument, or a list of others.
_LITERAL = ["as_int", "as_bool", "as_string", "as_ints", "as_bools", "as_strings", "as_int_lists"]
_WRAPPED = ["as_optional_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"]
_LISTS = ["as_optional_tensors", "as_sym_ints", "as_sym_floats", "as_sym_bools"]


@dataclass(frozen=True)
class Program:
    """A graph that was read.

    Attributes:
        module: What runs. Nodes hold in ``meta["custom"]`` which call of a layer they belong to.
        batch: Examples of one inference that it is bound to; None where their number is free.
    """

    module: fx.GraphModule
    batch: int | None


def read_pt2(source: Path | bytes, device: str = "cpu") -> Program:
    """Return the program of a .pt2 file.

    Args:
        source: The file, or its content.
        device: Where its tensors are put.

    Raises:
        UsageError: If it is none, or holds anything but tensors and operators of ATen.
    """
    name = "the file" if isinstance(source, bytes) else repr(str(source))
    try:
        return _read(source, device)
    except UsageError as error:
        raise UsageError(f"{name} cannot be read: {error.message}", error.hint) from error
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        RuntimeError,
    ) as error:
        raise UsageError(
            f"{name} cannot be read as a .pt2 file: {type(error).__name__}: {error}",
            "export it again with this version",
        ) from error


def _read(source: Path | bytes, device: str) -> Program:
    with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
        _check_unpacked(archive)
        root = archive.namelist()[0].partition("/")[0]
        program = json.loads(archive.read(f"{root}/{_MODEL}"))
        major = program["schema_version"]["major"]
        if major != _SCHEMA:
            raise UsageError(
                f"its schema has version {major}; allowed: {_SCHEMA}", "export it again with this version"
            )
        tensors = {
            **_tensors(archive, root, _WEIGHTS, device),
            **_tensors(archive, root, _CONSTANTS, device),
        }
    parts = program["graph_module"]
    builder = _Builder(tensors, device)
    batch = builder.inputs(parts)
    for node in parts["graph"]["nodes"]:
        builder.node(node)
    outputs = parts["graph"]["outputs"]
    kinds = [next(iter(spec)) for spec in parts["signature"]["output_specs"]]
    if kinds != ["user_output"]:
        raise UsageError(f"it gives {', '.join(kinds) or 'nothing'}; allowed: one user_output")
    builder.graph.output(builder.value(outputs[0]))
    builder.graph.lint()
    return Program(fx.GraphModule(builder.root, builder.graph), batch)


def _check_unpacked(archive: zipfile.ZipFile) -> None:
    """Refuse a small file that would unpack to more than the memory; what is packed here shrinks far less."""
    parts = archive.infolist()
    stored = sum(part.compress_size for part in parts)
    unpacked = sum(part.file_size for part in parts)
    if unpacked > _LEAST_LIMIT + _MOST_PACKED * stored:
        raise UsageError(f"its {stored:,} bytes would unpack to {unpacked:,}, which no network's do")


def _tensors(archive: zipfile.ZipFile, root: str, config: str, device: str) -> dict[str, Tensor]:
    """Return the tensors that a part of the file lists, by their names."""
    found: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    for name, entry in json.loads(archive.read(f"{root}/{config}"))["config"].items():
        meta, file = entry["tensor_meta"], entry["path_name"]
        if entry["use_pickle"] or meta is None or not re.fullmatch(r"(weight|tensor)_\d+", file):
            raise UsageError(f"{name!r} is stored as a pickle, which may run code; allowed: raw tensors")
        if file not in stored:
            raw = bytearray(archive.read(f"{root}/{config.rpartition('/')[0]}/{file}"))
            dtype = _DTYPES[meta["dtype"]]
            stored[file] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        sizes, strides = ([each["as_int"] for each in meta[key]] for key in ("sizes", "strides"))
        view = torch.as_strided(stored[file], sizes, strides, meta["storage_offset"]["as_int"])
        found[name] = view.to(device)
    return found


class _Builder:
    """Builds a graph node by node.

    Args:
        tensors: Weights and constants by name.
        device: Where they are.
    """

    def __init__(self, tensors: dict[str, Tensor], device: str) -> None:
        self.tensors, self.device = tensors, device
        self.root = torch.nn.Module()
        self.graph = fx.Graph()
        self.named: dict[str, Any] = {}
        self.readers: dict[str, Callable[[Any], Any]] = {
            **dict.fromkeys(_LITERAL, lambda content: content),
            **dict.fromkeys(_WRAPPED, self.value),
            **dict.fromkeys(_LISTS, lambda content: [self.value(each) for each in content]),
            "as_none": lambda content: None,
            "as_float": float,
            "as_floats": lambda content: [float(each) for each in content],
            "as_name": self.named.__getitem__,
            "as_tensor": lambda content: self.named[content["name"]],
            "as_tensors": lambda content: [self.named[each["name"]] for each in content],
            "as_scalar_type": _DTYPES.__getitem__,
            "as_memory_format": _MEMORY.__getitem__,
            "as_layout": _LAYOUTS.__getitem__,
            "as_device": lambda content: torch.device(self.device),
        }

    def inputs(self, parts: dict[str, Any]) -> int | None:
        """Add weights and the one input; return the batch that it is bound to."""
        batch: list[int | None] = []
        for spec in parts["signature"]["input_specs"]:
            kind, content = next(iter(spec.items()))
            if kind == "user_input":
                name = content["arg"]["as_tensor"]["name"]
                # Names of inputs and of arguments become code: none is the file's.
                self.named[name] = self.graph.placeholder("images")
                batch.append(parts["graph"]["tensor_values"][name]["sizes"][0].get("as_int"))
                continue
            names = {
                "parameter": "parameter_name",
                "buffer": "buffer_name",
                "tensor_constant": "tensor_constant_name",
            }
            if kind not in names:
                raise UsageError(f"it takes {kind}; allowed: user_input, {', '.join(names)}")
            # Under a name of its own, which holds no dots.
            own = f"tensor_{len(self.named)}"
            self.root.register_buffer(own, self.tensors[content[names[kind]]])
            self.named[content["arg"]["name"]] = self.graph.get_attr(own)
        if len(batch) != 1:
            raise UsageError(f"it takes {len(batch)} inputs; allowed: one")
        return batch[0]

    def node(self, content: dict[str, Any]) -> None:
        """Add one node."""
        target = _operator(content["target"])
        args, kwargs = [], {}
        for given in content["inputs"]:
            value = self.value(given["arg"])
            if given.get("kind") == 2:
                kwargs[_keyword(target, given["name"])] = value
            else:
                args.append(value)
        # Of a node's name fx replaces whatever is no letter, number or underscore.
        made = self.graph.create_node("call_function", target, tuple(args), kwargs, content.get("name"))
        made.meta["custom"] = json.loads(content["metadata"].get("custom", "{}"))
        outputs = content["outputs"]
        listed = outputs[0].get("as_tensors") if outputs else None
        names = [_name(each) for each in (listed if listed is not None else outputs)]
        if listed is None and len(names) == 1:
            self.named[names[0]] = made
            return
        for index, name in enumerate(names):
            self.named[name] = self.graph.call_function(operator.getitem, (made, index))
            self.named[name].meta["custom"] = made.meta["custom"]

    def value(self, argument: dict[str, Any]) -> Any:
        """Return an argument: a number, a word, a node, or a list of those."""
        kind, content = next(iter(argument.items()))
        if kind not in self.readers:
            raise UsageError(f"it holds an argument of kind {kind!r}, which is not known here")
        return self.readers[kind](content)


def _name(output: dict[str, Any]) -> str:
    """Return the name of one thing that a node makes."""
    while "name" not in output and "as_name" not in output:
        output = next(iter(output.values()))
    return str(output["name"] if "name" in output else output["as_name"])


def _operator(target: str) -> Callable[..., Any]:
    """Return an operator by its name in the file."""
    if target in _PLAIN:
        return _PLAIN[target]
    match = _ATEN.fullmatch(target)
    if match is None or match[1] in _BARRED:
        raise UsageError(f"it calls {target!r}; allowed: operators of ATen")
    # What is no operator is an attribute of Python's, through which anything could be reached.
    found = getattr(getattr(torch.ops.aten, match[1], None), match[2], None)
    if not isinstance(found, torch._ops.OpOverload):
        raise UsageError(f"it calls {target!r}, which is no operator of ATen here")
    return found


def _keyword(target: Callable[..., Any], name: str) -> str:
    """Return the name of a keyword argument, once the operator is known to have it."""
    known = [a.name for a in target._schema.arguments] if isinstance(target, torch._ops.OpOverload) else []
    if name not in known:
        raise UsageError(f"it gives {target} an argument that it does not have")
    return name
