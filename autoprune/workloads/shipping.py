"""A workload on another node: the same network and the same data, checked by content before anything is computed.

The driver makes a :class:`~autoprune.workloads.shipment.Shipment` of its workload once the dense network is trained and
its groups are found; a worker calls :func:`load_shipped`. Networks and data by name are built on the node by the code
that built them for the driver, then get the driver's weights; a user's own objects go by pickle, which only ever passes
between our own processes.
"""

from __future__ import annotations

import hashlib
import pickle
import socket
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from autoprune.config import StudyConfig
from autoprune.errors import UsageError
from autoprune.naming import cache_root, data_root
from autoprune.workloads.catalog import FOLDER_PREFIX, parse_data, parse_model
from autoprune.workloads.data import load_data, say_on_stderr
from autoprune.workloads.download import Say
from autoprune.workloads.models import choose_weights, rebuild_network
from autoprune.workloads.packing import unpack, unpacked_folder, unpacked_word
from autoprune.workloads.shipment import Shipment, outputs_of, ship
from autoprune.workloads.sources import folder_of
from autoprune.workloads.splits import Data
from autoprune.workloads.weights import apply_state, state_digest
from autoprune.workloads.workload import TOP1, Workload

__all__ = ["Shipment", "load_shipped", "ship"]

# Nodes differ in their processors' instructions, and so in the last digits of what they compute.
_TOLERANCE = 1e-3
_PACKAGES = "install the versions of the packages that the driver has"


def load_shipped(
    shipment: Shipment,
    *,
    prepare: Callable[[Workload], Workload] | None = None,
    weights: Path | None = None,
    archive: Callable[[], bytes | Path] | None = None,
    say: Say = say_on_stderr,
) -> Workload:
    """Return the driver's workload on this node.

    Args:
        shipment: What the driver sent.
        prepare: Writes the network as a graph where the study's groups are those of the graph.
        weights: The weights' file, where they travelled by themselves.
        archive: Brings the data's archive; called only where this node lacks the data.
        say: Gets progress.

    Raises:
        UsageError: If this node cannot have the same workload; names the node, the path and what to do.
    """
    state = _shipped_state(shipment, weights)
    workload = _unpickled(shipment) if shipment.pickled else _rebuilt(shipment, archive, say)
    workload = replace(
        workload,
        name=shipment.name,
        weights_source=shipment.weights_source,
        search_split_seen=shipment.search_split_seen,
        dense_trained=True,
        notes=shipment.notes,
    )
    if prepare is not None:
        workload = prepare(workload)
    try:
        apply_state(workload.model, state, "that were shipped")
    except UsageError as error:
        raise _elsewhere(f"the network is not the driver's: {error.message}") from error
    _check_network(shipment, workload)
    return workload


def _elsewhere(message: str, hint: str = "") -> UsageError:
    return UsageError(f"node {socket.gethostname()}: {message}", hint)


def _shipped_state(shipment: Shipment, path: Path | None) -> dict[str, Tensor]:
    try:
        content = path.read_bytes() if path is not None else shipment.weights
        if hashlib.sha256(content).hexdigest() != shipment.weights_sha256:
            raise ValueError("their hash is not the one that the driver gave")
        return load(content)
    except (OSError, ValueError, SafetensorError) as error:
        where = f"in {str(path)!r} " if path is not None else ""
        raise _elsewhere(
            f"the dense network's weights {where}are damaged: {error}", "ship them again"
        ) from error


def _unpickled(shipment: Shipment) -> Workload:
    try:
        workload = pickle.loads(shipment.pickled)  # noqa: S301 - made by our own driver, never read from a file
    except Exception as error:  # a user's classes may raise anything; the fault is named
        raise _elsewhere(
            f"the network and data cannot be rebuilt: {type(error).__name__}: {error}",
            "install the modules that define them on every node, or start Ray with a working_dir that holds them",
        ) from error
    if not isinstance(workload, Workload):
        raise _elsewhere(f"a {type(workload).__name__} was shipped instead of a workload")
    return workload


def _rebuilt(shipment: Shipment, archive: Callable[[], bytes | Path] | None, say: Say) -> Workload:
    """Build the workload by names, the same way as :func:`autoprune.workloads.workload.load_workload`."""
    config = shipment.config.model_copy(
        update={"model": _with_code(shipment, shipment.model), "data": _with_code(shipment, shipment.data)}
    )
    data = replace(_found_data(shipment, config, archive, say), name=shipment.data_name)
    spec = parse_model(config.model)
    model = rebuild_network(
        spec,
        choose_weights(spec, config.weights, data.classes),
        data.classes,
        data.input_shape,
        seed=config.seed,
        trusted=config.trust_code,
    )
    return Workload(
        name=shipment.name,
        model=model,
        data=data,
        metric=TOP1,
        loss=F.cross_entropy,
        training_step=None,
        weights_source=shipment.weights_source,
        search_split_seen=shipment.search_split_seen,
        dense_trained=True,
    )


def _with_code(shipment: Shipment, word: str) -> str:
    """Return a specification whose Python file is on this node: the driver's path, else a copy in the cache."""
    files = {file.path: file.content for file in shipment.code}
    path, _, function = word.rpartition(":")
    if path not in files:
        return word
    content = files[path]
    if Path(path).is_file():
        if Path(path).read_bytes() != content:
            raise _elsewhere(
                f"{path!r} is not the file that the driver runs", "copy the driver's file there, or remove it"
            )
        return word
    place = cache_root() / "shipped" / f"code-{hashlib.sha256(content).hexdigest()[:32]}" / Path(path).name
    if not place.is_file() or place.read_bytes() != content:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{uuid.uuid4().hex}.unfinished")
        temporary.write_bytes(content)
        temporary.replace(place)
    return f"{place}:{function}"


def _found_data(
    shipment: Shipment, config: StudyConfig, archive: Callable[[], bytes | Path] | None, say: Say
) -> Data:
    """Load the data that this node has, else what was shipped; its content has to be the driver's."""
    kind = parse_data(shipment.data).kind
    faults = []
    for where, word in _own_data(shipment, config):
        found = _loaded(config.model_copy(update={"data": word}), say, None, shipment, where)
        if isinstance(found, Data):
            return found
        faults.append(found)
    if not faults:
        faults.append(f"data {shipment.data!r} is not there, nor in {str(data_root())!r}")
    if shipment.pack is not None:
        place = unpacked_folder(shipment.pack.fingerprint)
        if not place.is_dir() and archive is not None:
            say(f"node {socket.gethostname()}: unpacking data {shipment.data_name} into {place}")
            unpack(shipment.pack, archive())
        if place.is_dir():
            unpacked = config.model_copy(update={"data": unpacked_word(shipment.pack)})
            found = _loaded(unpacked, say, place, shipment, f"{str(place)!r}, which was shipped,")
            if isinstance(found, Data):
                return found
            faults.append(f"{found}; remove that folder")
    hints = {"digits": _PACKAGES, "code": "put what the function reads where every node finds the same"}
    raise _elsewhere(
        "; ".join(faults),
        hints.get(
            kind,
            "put the driver's data into the folder that AUTOPRUNE_DATA names on this node, or let the driver ship it",
        ),
    )


def _own_data(shipment: Shipment, config: StudyConfig) -> Iterator[tuple[str, str]]:
    """Yield where this node has data of this name: the place for people, and its specification."""
    spec, word = parse_data(shipment.data), str(config.data)
    if spec.kind in ("digits", "code"):
        yield repr(word), word
    elif spec.kind == "folder":
        for folder in (Path(spec.name), data_root() / Path(spec.name).name):
            if folder.is_dir():
                yield repr(str(folder)), f"{FOLDER_PREFIX}{folder}"
    elif (own := folder_of(spec, data_root())) is not None:
        yield repr(str(own)), word


def _loaded(config: StudyConfig, say: Say, root: Path | None, shipment: Shipment, where: str) -> Data | str:
    """Return the data, or what is wrong with it."""
    try:
        data = load_data(config, say, root)
    except UsageError as error:
        return f"the data in {where} cannot be used: {error.message}"
    if data.fingerprint != shipment.data_fingerprint:
        return (
            f"the data in {where} differs from the driver's: "
            f"fingerprint {data.fingerprint[:12]}, not {shipment.data_fingerprint[:12]}"
        )
    return data


def _check_network(shipment: Shipment, workload: Workload) -> None:
    """Compare the network with the driver's: its tensors exactly, what it computes but for rounding."""
    found = state_digest(workload.model)
    if found != shipment.network:
        raise _elsewhere(
            f"the network is not the driver's: its tensors have the digest {found[:12]}, not {shipment.network[:12]}",
            _PACKAGES,
        )
    expected, outputs = torch.tensor(shipment.outputs), torch.tensor(outputs_of(workload))
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    if expected.shape != outputs.shape or not torch.allclose(
        outputs, expected, rtol=0, atol=_TOLERANCE * scale
    ):
        raise _elsewhere(
            "the network is not the driver's: it has the same weights and computes other outputs",
            _PACKAGES,
        )
