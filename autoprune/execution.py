"""How a search is run: where its trials run, and how many side by side. It changes nothing of what is searched."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from autoprune.errors import UsageError

ENGINES = ("local", "ray")
_ADDRESS = re.compile(r"auto|(ray://)?(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_SHARED_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s]+|/[^\s]*")


class Execution(BaseModel):
    """Where trials run; may differ from one run of a study to the next.

    Attributes:
        engine: ``local`` for processes of this machine, ``ray`` for a cluster.
        workers: Trials that run side by side. None runs them one after the other in the driver's own process, or on Ray
            as many as there is room for.
        address: Cluster to join: ``auto``, ``ray://HOST:PORT`` or ``HOST:PORT``; None starts Ray here.
        cpus_per_trial: Processors of one trial on Ray; None stands for 1.
        gpus_per_trial: GPUs of one trial on Ray; a part of one lets trials share it; None stands for 0.
        artifacts: Folder or fsspec URL that all nodes reach, where artifacts are exchanged and kept; None takes the
            study's own folder.
        trial_limit_s: Seconds after which a trial in a worker counts as hung; None derives it from the trials so far.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Literal["local", "ray"] = "local"
    workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    address: str | None = None
    cpus_per_trial: Annotated[float, Field(gt=0.0, le=4096.0, allow_inf_nan=False)] | None = None
    gpus_per_trial: Annotated[float, Field(ge=0.0, le=1024.0, allow_inf_nan=False)] | None = None
    artifacts: str | None = None
    trial_limit_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None

    @field_validator("address")
    @classmethod
    def _address(cls, address: str | None) -> str | None:
        match = _ADDRESS.fullmatch(address) if address is not None else None
        if address is not None and (
            match is None or (match.group(3) and not 0 < int(match.group(3)) < 65536)
        ):
            raise UsageError(
                f"address {address!r} is not understood; allowed: auto, ray://HOST:PORT, HOST:PORT"
            )
        return address

    @field_validator("artifacts")
    @classmethod
    def _artifacts(cls, url: str | None) -> str | None:
        if url is not None and (not _SHARED_URL.fullmatch(url) or ".." in url.split("/")):
            raise UsageError(
                "artifacts go to an absolute folder or a URL such as s3://bucket/folder, without '..'"
            )
        if url is not None and ("@" in url or "?" in url):
            raise UsageError(
                "the URL of the artifacts holds a password or a query",
                "give credentials in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            )
        return url

    @model_validator(mode="after")
    def _fits_engine(self) -> Self:
        if self.engine == "local":
            of_clusters = ("address", "cpus_per_trial", "gpus_per_trial")
            given = [name for name in of_clusters if getattr(self, name) is not None]
            if given:
                raise UsageError(
                    f"--{given[0].replace('_', '-')} is for a cluster",
                    "give --engine ray, or leave it out: local workers share this machine's cores and GPUs",
                )
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise UsageError(
                f"gpus_per_trial {self.gpus:g} cannot be had; allowed: parts of one GPU, or whole ones"
            )
        return self

    @property
    def cpus(self) -> float:
        """Processors of one trial on Ray."""
        return 1.0 if self.cpus_per_trial is None else self.cpus_per_trial

    @property
    def gpus(self) -> float:
        """GPUs of one trial on Ray."""
        return self.gpus_per_trial or 0.0
