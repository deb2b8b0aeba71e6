"""Writes exported programs as .pt2 files that hold no code, no pickles and no path of this machine."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram

from autoprune.deploy.layers import call_in

_ASSERTIONS = (torch.ops.aten._assert_tensor_metadata.default,)
# Share of its bytes below which a part of the file is compressed.
_WORTH = 0.9
# Of every part of the file, so that equal networks make equal files.
_DATE = (1980, 1, 1, 0, 0, 0)
# A part by which files are told apart, another one each time.
_ID = ".data/serialization_id"
# What the exporter knows of a node and files hold under its own names.
LAYER_KEY, KERNEL_KEY = "layer", "kernel"


def write_pt2(program: ExportedProgram, kernels: Mapping[str, str]) -> bytes:
    """Return the content of a .pt2 file, which ``torch.export.load`` and :mod:`autoprune.deploy.sessions.pt2` read.

    Each node keeps one thing of what the exporter noted: the call of a layer that it belongs to. What the exporter
    would write besides (traces of the code with its paths, example inputs as a pickle, guards as code) is left out.
    Parts that become clearly smaller by it are compressed: the graph, integers of few bits, weights with many zeros.

    Args:
        program: The program; its notes are changed.
        kernels: By layer the kernel that a session is to take where the graph does not say it.
    """
    for node in list(program.graph.nodes):
        if node.target in _ASSERTIONS:
            program.graph.erase_node(node)
            continue
        call = call_in(node.meta.get("nn_module_stack"))
        own: dict[str, Any] = {LAYER_KEY: call} if call else {}
        if kernel := kernels.get(call.partition("#")[0]):
            own[KERNEL_KEY] = kernel
        node.meta = {name: node.meta[name] for name in ("val",) if name in node.meta}
        node.meta |= {"custom": own} if own else {}
    program._guards_code = []
    program._example_inputs = None
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, buffer)
    return _smaller(buffer.getvalue())


def _smaller(raw: bytes) -> bytes:
    """Return an archive with its parts compressed where that pays."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as before, zipfile.ZipFile(made, "w") as after:
        for info in before.infolist():
            if info.filename.endswith(_ID):
                continue
            content = before.read(info)
            part = zipfile.ZipInfo(info.filename, date_time=_DATE)
            after.writestr(part, content, _method(content), compresslevel=9)
    return made.getvalue()


def _method(content: bytes) -> int:
    # A few pages tell: weights are alike from end to end.
    import zlib

    sample = content[: 1 << 16]
    packed = len(zlib.compress(sample, 6))
    return zipfile.ZIP_DEFLATED if packed < _WORTH * len(sample) else zipfile.ZIP_STORED
