"""Weights from files: safetensors, or torch files without any code in them."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoprune.errors import UsageError

_NESTED = ("state_dict", "model", "model_state_dict", "net", "weights")
_SHOWN = 3


def load_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file; code in it is never run.

    Args:
        path: A ``.safetensors`` file, or a torch file that holds tensors alone.

    Returns:
        Tensors by name, without a common ``module.`` prefix.

    Raises:
        UsageError: If the file is missing, damaged, holds more than tensors, or holds none.
    """
    if not path.is_file():
        raise UsageError(f"weights {str(path)!r}: there is no such file")
    loaded = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_torch(path)
    for key in _NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict):
        raise UsageError(
            f"weights {str(path)!r} hold a {type(loaded).__name__}; allowed: tensors by name",
            "save model.state_dict()",
        )
    state = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not state:
        raise UsageError(f"weights {str(path)!r} hold no tensors", "save model.state_dict()")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    broken = [
        n for n, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if broken:
        raise UsageError(f"weights {str(path)!r} are not finite in {_shown(broken)}")
    return state


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"weights {str(path)!r} are not a readable safetensors file: {error}") from None


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # About the protocol of a pickle that is then refused or read all the same.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"weights {str(path)!r} are refused: the file holds more than tensors, and loading it could run code",
            "save the tensors alone with safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')",
        ) from None
    except Exception as error:  # a damaged file fails anywhere in the reader; none of it is loaded
        first = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"weights {str(path)!r} cannot be read: {type(error).__name__}: {first[:200]}",
            "a safetensors file is the safest form: safetensors.torch.save_file(model.state_dict(), 'w.safetensors')",
        ) from None


def apply_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Put weights into a network, all of them.

    Args:
        model: The network; changed in place.
        state: Tensors by name.
        source: What the weights are called in messages.

    Raises:
        UsageError: If a tensor is missing, unknown or of another shape; names the layers. The network is
            unchanged then.
    """
    own = model.state_dict()
    faults: list[str] = []
    # The counter of batches is no weight; older files lack it.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"layer {name.rpartition('.')[0] or name!r}: {name} is {tuple(state[name].shape)}, "
        f"the network needs {tuple(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    faults += [f"shapes differ in {_shown(shapes)}"] if shapes else []
    faults += [f"missing: {_shown(missing)}"] if missing else []
    faults += [f"not in the network: {_shown(unknown)}"] if unknown else []
    if faults:
        raise UsageError(
            f"weights {source} do not fit the network; " + "; ".join(faults), "check --model and --weights"
        )
    model.load_state_dict(as_of_today(model, state), strict=False)


def as_of_today(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with the versions of the network's modules, which files of tensors alone do not hold.

    Some modules, MnasNet's among them, refuse weights of no version.
    """
    result = OrderedDict(state)
    result._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    return result


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def state_digest(model: nn.Module) -> str:
    """Return a hex SHA-256 over a network's tensors, their names and shapes."""
    result = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        result.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        result.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()
