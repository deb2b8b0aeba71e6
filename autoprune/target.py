"""Targets: the runtimes that there are, and where and how a network is run in one of them. Torch-free."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from autoprune.errors import UsageError
from autoprune.naming import unknown_name

Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_SHORT = {"f32": "float32", "fp32": "float32", "bf16": "bfloat16", "f16": "float16", "fp16": "float16"}
_GRAMMAR = "RUNTIME[:cuda][:bf16|f16][:compile][:threads=N][:batch=N][:input_size=N]"


@dataclass(frozen=True)
class RuntimeFacts:
    """What is known of a runtime without loading it.

    Attributes:
        module: Module whose presence makes it usable.
        install: Line that installs it.
        model_file: Name of the file that it deploys.
        devices: Where it runs.
        precisions: Formats that its float layers can be told to compute in.
        compiles: Whether it can be told to compile.
        dynamic: Whether single linear layers can find the range of their 8 bit inputs at each inference.
    """

    module: str
    install: str
    model_file: str
    devices: tuple[Device, ...] = ("cpu",)
    precisions: tuple[Precision, ...] = ("float32",)
    compiles: bool = False
    dynamic: bool = False

    @property
    def installed(self) -> bool:
        """Whether it can be loaded here."""
        return find_spec(self.module) is not None


RUNTIMES: dict[str, RuntimeFacts] = {
    "onnxruntime": RuntimeFacts("onnxruntime", "pip install onnxruntime", "model.onnx", dynamic=True),
    "openvino": RuntimeFacts(
        "openvino", "pip install 'autoprune[openvino]'", "model.onnx", precisions=("float32", "bfloat16")
    ),
}


class Target(BaseModel):
    """Where a network is deployed, and how it is run there.

    Attributes:
        runtime: Name of the runtime.
        device: Device of the runtime.
        precision: What layers that no recipe makes integers of compute in, the dense network's too.
        compile: Whether the runtime compiles the network first; for ``torch``.
        threads: Threads that one inference uses.
        batch: Examples in one inference.
        input_size: Pixels of the sides of images that it gets; None takes the data's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: str = "onnxruntime"
    device: Device = "cpu"
    precision: Precision = "float32"
    compile: bool = False
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    batch: Annotated[int, Field(ge=1, le=4096)] = 1
    input_size: Annotated[int, Field(ge=8, le=1024)] | None = None

    @field_validator("runtime")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in RUNTIMES:
            raise unknown_name(
                "target",
                name,
                RUNTIMES,
                "`autoprune doctor` lists the targets that this version can measure here",
            )
        return name

    @field_validator("precision", mode="before")
    @classmethod
    def _short(cls, name: object) -> object:
        return _SHORT.get(name, name) if isinstance(name, str) else name

    @field_validator("threads")
    @classmethod
    def _there(cls, threads: int) -> int:
        if threads > usable_cores():
            raise UsageError(
                f"target.threads is {threads}, but {usable_cores()} cores can be used here; "
                f"allowed: 1 to {usable_cores()}",
                "a latency with fewer cores than threads would be that of another target",
            )
        return threads

    @model_validator(mode="after")
    def _can(self) -> Self:
        facts = self.facts
        if self.device not in facts.devices:
            raise UsageError(
                f"target {self.runtime!r} does not run on device {self.device!r}; "
                f"allowed: {', '.join(facts.devices)}"
            )
        if self.precision not in facts.precisions:
            raise UsageError(
                f"target {self.runtime!r} does not compute in {self.precision}; "
                f"allowed: {', '.join(facts.precisions)}",
                "16 bits for weights alone are a choice of recipes: bits 16",
            )
        if self.compile and not facts.compiles:
            able = [name for name, other in RUNTIMES.items() if other.compiles]
            raise UsageError(
                f"target {self.runtime!r} cannot be told to compile; targets that can: {', '.join(able) or 'none'}"
            )
        return self

    @property
    def facts(self) -> RuntimeFacts:
        """What is known of its runtime."""
        return RUNTIMES[self.runtime]

    @property
    def spec(self) -> str:
        """The target as one word that :func:`parse_target` reads."""
        parts = [self.runtime]
        if self.device != "cpu":
            parts.append(self.device)
        if self.precision != "float32":
            parts.append(self.precision)
        if self.compile:
            parts.append("compile")
        fresh = Target(runtime=self.runtime)
        numbers = ("threads", "batch", "input_size")
        own = {name: getattr(self, name) for name in numbers if getattr(self, name) != getattr(fresh, name)}
        return ":".join([*parts, *(f"{name}={value}" for name, value in own.items())])

    def content(self) -> dict[str, Any]:
        """Return the target as plain data; settings that came later are left out where they have their defaults."""
        later = {"precision": "float32", "compile": False, "input_size": None}
        values = self.model_dump(mode="json")
        return {name: value for name, value in values.items() if name not in later or value != later[name]}

    def check_installed(self) -> None:
        """Refuse a runtime that is not here, before any work is done.

        Raises:
            UsageError: With the line that installs it.
        """
        if not self.facts.installed:
            raise UsageError(
                f"target {self.runtime!r} is not installed here", f"install it: {self.facts.install}"
            )


def parse_target(text: str) -> dict[str, Any]:
    """Return the settings of a target that is written as one word, such as ``openvino:bf16:threads=2``.

    Raises:
        UsageError: If a part of it is not understood.
    """
    runtime, *parts = text.strip().split(":")
    values: dict[str, Any] = {"runtime": runtime}
    for part in parts:
        name, equals, value = part.partition("=")
        if (
            equals
            and name in ("threads", "batch", "input_size")
            and re.fullmatch(r"\d{1,6}", value, re.ASCII)
        ):
            values[name] = int(value)
        elif part in get_args(Device):
            values["device"] = part
        elif part in _SHORT or part in PRECISIONS:
            values["precision"] = _SHORT.get(part, part)
        elif part == "compile":
            values["compile"] = True
        else:
            raise UsageError(f"target {text!r}: {part!r} is not understood; allowed: {_GRAMMAR}")
    return values


def given_target(value: object) -> object:
    """Return a target as a mapping where it was given as a word."""
    return parse_target(value) if isinstance(value, str) else value


def merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a further target: threads, batch and size of the first where it says nothing of them."""
    shared = {name: base[name] for name in ("threads", "batch", "input_size") if name in base}
    return {**shared, **own}


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
