"""What a driver sends of its workload: settings, the dense network's weights, and how to find or rebuild the rest."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save
from torch import Tensor

from autoprune.config import StudyConfig
from autoprune.workloads.catalog import FOLDER_PREFIX, Spec, parse_model
from autoprune.workloads.data import data_spec
from autoprune.workloads.packing import DataPack
from autoprune.workloads.pickling import picklable
from autoprune.workloads.weights import state_digest
from autoprune.workloads.workload import Workload

WEIGHTS_NAME = "weights.safetensors"
_COMPARED = 1000


class CodeFile(BaseModel):
    """A user's Python file.

    Attributes:
        path: Where it is on the driver's machine.
        content: Its bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    path: str
    content: bytes


class Shipment(BaseModel):
    """What a worker needs to have the driver's workload.

    Attributes:
        settings: The study's settings.
        model: The model's specification, with an absolute path; empty for a user's own objects.
        data: The data's specification, likewise.
        data_fingerprint: Content of the data and its splits.
        data_name: What the data is called.
        name: What the workload is called.
        weights_source: Where the dense weights are from.
        search_split_seen: See :class:`autoprune.workloads.workload.Workload`.
        notes: Lines for people.
        code: The user's Python files that model and data are functions of.
        pack: What is in the data's archive; None where data is not shipped.
        weights: The dense network's tensors as safetensors; empty where they are in a file.
        weights_sha256: Hash of these bytes or of the file.
        network: Digest of the network's tensors.
        outputs: What the network gives for two calibration examples, its first numbers.
        pickled: The workload as the user gave it; empty for models and data by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    settings: dict[str, Any]
    model: str
    data: str
    data_fingerprint: str
    data_name: str
    name: str
    weights_source: str
    search_split_seen: bool
    notes: tuple[str, ...] = ()
    code: tuple[CodeFile, ...] = ()
    pack: DataPack | None = None
    weights: bytes = b""
    weights_sha256: str
    network: str
    outputs: tuple[float, ...]
    pickled: bytes = b""

    @property
    def config(self) -> StudyConfig:
        """The study's settings."""
        return StudyConfig.model_validate(self.settings)


def ship(
    workload: Workload,
    config: StudyConfig,
    *,
    given: Workload | None = None,
    pack: DataPack | None = None,
    folder: Path | None = None,
    dumps: Callable[[Any], bytes] = pickle.dumps,
) -> Shipment:
    """Make what a worker on another node needs of the driver's workload.

    Args:
        workload: The workload whose dense network is trained and whose groups are found.
        config: The study's settings.
        given: The workload before its groups were found, where it is of a user's own objects; None where model and data
            have names.
        pack: What of the data is shipped, if anything.
        folder: Gets the weights as a file, which then travels by itself; they are part of the shipment if not given.
        dumps: How objects are pickled; ``cloudpickle.dumps`` takes what is defined in a notebook or script too.

    Raises:
        UsageError: If something of the user's own cannot be pickled; names it.
    """
    state = {
        name: tensor.detach().cpu().contiguous().clone()  # tied weights would share memory
        for name, tensor in workload.model.state_dict().items()
    }
    weights = save(state)
    if folder is not None:
        (folder / WEIGHTS_NAME).write_bytes(weights)
    model, data, code = ("", "", ()) if given is not None else _words(config)
    return Shipment(
        settings=config.model_dump(mode="json"),
        model=model,
        data=data,
        data_fingerprint=workload.data.fingerprint,
        data_name=workload.data.name,
        name=workload.name,
        weights_source=workload.weights_source,
        search_split_seen=workload.search_split_seen,
        notes=workload.notes,
        code=code,
        pack=pack,
        weights=b"" if folder is not None else weights,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        network=state_digest(workload.model),
        outputs=outputs_of(workload),
        pickled=picklable(given, dumps) if given is not None else b"",
    )


def shipped_data_word(config: StudyConfig) -> str:
    """Return the specification of a study's data with an absolute path, so that it means the same on every node."""
    return _word(data_spec(config))


def _word(spec: Spec) -> str:
    if spec.kind == "folder":
        return f"{FOLDER_PREFIX}{Path(spec.name).absolute()}"
    return f"{Path(spec.name).absolute()}:{spec.function}" if spec.kind == "code" else spec.name


def _words(config: StudyConfig) -> tuple[str, str, tuple[CodeFile, ...]]:
    specs = (parse_model(config.model), data_spec(config))
    paths = {Path(spec.name).absolute() for spec in specs if spec.kind == "code"}
    code = tuple(CodeFile(path=str(path), content=path.read_bytes()) for path in sorted(paths))
    return _word(specs[0]), _word(specs[1]), code


def outputs_of(workload: Workload) -> tuple[float, ...]:
    """Return what a workload's network gives for two calibration examples, its first numbers."""
    inputs = next(workload.data.calibration.batches(2, limit=2))[0]
    model = workload.model.eval()
    with torch.no_grad():
        outputs: Tensor = model(inputs)
    return tuple(outputs.detach().float().flatten()[:_COMPARED].tolist())
