"""Exported graphs of dense networks, kept from one study to the next."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxscript
import torch
from torch import Tensor, nn

from autoprune.compress.graph.network import GraphNetwork
from autoprune.deploy.template import Template, export_fresh
from autoprune.naming import cache_root

_FORMAT = 5
_log = logging.getLogger(__name__)


def export_template(
    model: nn.Module, example: Tensor, *, batch: int = 1, fits: Callable[[Template], bool] | None = None
) -> Template:
    """Export ``model``, or take the graph from the cache of earlier exports.

    Args:
        model: Network in eval mode on the CPU.
        example: Inputs, ``(n, C, H, W)``, n at least 2 so that the exporter leaves the batch free.
        batch: Batch of the graph where the network does not leave it free.
        fits: Whether a graph from the cache is really this network's; one that is not is replaced.

    Raises:
        ExportError: If the exporter refuses the network; holds its first line.
    """
    folder = cache_root() / "export" / _fingerprint(model, example, batch)
    cached = _read_cache(folder)
    if cached is not None and (fits is None or fits(cached)):
        return cached
    template = export_fresh(model, example, batch=batch)
    _write_cache(folder, template)
    return template


def _fingerprint(model: nn.Module, example: Tensor, batch: int) -> str:
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    versions = [_FORMAT, torch.__version__, onnx.__version__, onnxscript.__version__]
    content = [
        versions,
        repr(model),
        shapes,
        [str(example.dtype), *example.shape[1:], batch],
        sorted({_code(kind) for kind in {type(module) for module in model.modules()}}),
        [_plain_attributes(module) for module in model.modules()],
        str(model.graph) if isinstance(model, GraphNetwork) else "",
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _code(kind: type[nn.Module]) -> str:
    """Return a hash of a module's source, which says what its forward does; its name where there is no source."""
    if kind.__module__.startswith("torch."):
        return kind.__qualname__
    try:
        return hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()
    except (OSError, TypeError):
        return f"{kind.__module__}.{kind.__qualname__}"


def _plain_attributes(module: nn.Module) -> list[str]:
    plain = (bool, int, float, str, tuple, type(None))
    return [f"{name}={value!r}" for name, value in sorted(vars(module).items()) if isinstance(value, plain)]


def _read_cache(folder: Path) -> Template | None:
    try:
        content = json.loads((folder / "template.json").read_text(encoding="utf-8"))
        raw = (folder / "template.onnx").read_bytes()
        if hashlib.sha256(raw).hexdigest() != content["sha256"]:
            return None
        folded = {weight: (name, float(epsilon)) for weight, (name, epsilon) in content["folded"].items()}
        return Template(
            onnx.load_model_from_string(raw), folded, content["transposed"], content["takes_weights"]
        )
    except (OSError, ValueError, KeyError):
        return None


def _write_cache(folder: Path, template: Template) -> None:
    raw = template.proto.SerializeToString()
    content = {
        "sha256": hashlib.sha256(raw).hexdigest(),
        "folded": template.folded,
        "transposed": template.transposed,
        "takes_weights": template.takes_weights,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in (("template.onnx", raw), ("template.json", json.dumps(content).encode())):
            temporary = folder / f".{name}.{os.getpid()}"
            temporary.write_bytes(data)
            temporary.replace(folder / name)
    except OSError as error:
        _log.warning("the exported graph could not be cached in %s: %s", folder, error)
