"""Targets: the runtimes that there are, and where and how a network is run in one of them. Torch-free."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from autoprune.errors import UsageError
from autoprune.naming import unknown_name

Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16", "float16"]
WeightKind = Literal["conv", "depthwise", "linear"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_SHORT = {"f32": "float32", "fp32": "float32", "bf16": "bfloat16", "f16": "float16", "fp16": "float16"}
_LATER = ("precision", "compile", "input_size")
_GRAMMAR = "RUNTIME[:cuda][:bf16|f16][:compile][:threads=N][:batch=N][:input_size=N]"


@dataclass(frozen=True)
class RuntimeFacts:
    """What is known of a runtime without loading it.

    Attributes:
        module: Module whose presence makes it usable.
        install: Line that installs it.
        model_file: Name of the file that it deploys.
        opens: What opens the file anywhere else, in Python.
        devices: Where it runs.
        precisions: Formats that its float layers can be told to compute in.
        cuda_precisions: The same on a GPU.
        compiles: Whether it can be told to compile.
        int8: Kinds of layers that it can run in int8. The weights of others are stored in the bits that a recipe says,
            and their arithmetic is left in float.
        dynamic: Whether single linear layers can find the range of their 8 bit inputs at each inference.
        fp8: Devices on which linear layers can run in fp8.
    """

    module: str
    install: str
    model_file: str
    opens: str
    devices: tuple[Device, ...] = ("cpu",)
    precisions: tuple[Precision, ...] = ("float32",)
    cuda_precisions: tuple[Precision, ...] = ()
    compiles: bool = False
    int8: tuple[WeightKind, ...] = ("conv", "depthwise", "linear")
    dynamic: bool = False
    fp8: tuple[Device, ...] = ()

    @property
    def installed(self) -> bool:
        """Whether it can be loaded here."""
        return find_spec(self.module) is not None

    @property
    def dense_file(self) -> str:
        """Name of the dense network's file beside an exported one."""
        return f"dense{PurePath(self.model_file).suffix}"

    def precisions_on(self, device: Device) -> tuple[Precision, ...]:
        """Formats that its float layers can be told to compute in on a device."""
        return self.precisions if device == "cpu" else self.cuda_precisions


RUNTIMES: dict[str, RuntimeFacts] = {
    "onnxruntime": RuntimeFacts(
        "onnxruntime",
        "pip install onnxruntime",
        "model.onnx",
        'onnxruntime.InferenceSession("model.onnx")',
        dynamic=True,
    ),
    "openvino": RuntimeFacts(
        "openvino",
        "pip install 'autoprune[openvino]'",
        "model.onnx",
        'openvino.Core().compile_model("model.onnx", "CPU")',
        precisions=("float32", "bfloat16"),
    ),
    "torch": RuntimeFacts(
        "torch",
        "pip install torch",
        "model.pt2",
        'torch.export.load("model.pt2").module()',
        devices=("cpu", "cuda"),
        precisions=("float32", "bfloat16"),
        cuda_precisions=PRECISIONS,
        compiles=True,
        int8=("linear",),
        dynamic=True,
        fp8=("cuda",),
    ),
    "executorch": RuntimeFacts(
        "executorch",
        "pip install 'autoprune[executorch]'",
        "model.pte",
        'executorch.runtime.Runtime.get().load_program("model.pte").load_method("forward")',
        dynamic=True,
    ),
    "tensorrt": RuntimeFacts(
        "tensorrt",
        "pip install 'autoprune[tensorrt]'",
        "model.engine",
        'tensorrt.Runtime(logger).deserialize_cuda_engine(open("model.engine", "rb").read())',
        devices=("cuda",),
        precisions=(),
        cuda_precisions=PRECISIONS,
    ),
}


class Target(BaseModel):
    """Where a network is deployed, and how it is run there.

    Attributes:
        runtime: Name of the runtime.
        device: Device of the runtime; the first one that it runs on if not given.
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

    @model_validator(mode="before")
    @classmethod
    def _first_device(cls, values: object) -> object:
        if isinstance(values, dict) and "device" not in values and values.get("runtime") in RUNTIMES:
            return {**values, "device": RUNTIMES[values["runtime"]].devices[0]}
        return values

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
        allowed = facts.precisions_on(self.device)
        if self.precision not in allowed:
            raise UsageError(
                f"target {self.runtime!r} does not compute in {self.precision} on {self.device}; "
                f"allowed: {', '.join(allowed)}",
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
        return target_word(self.model_dump())

    def content(self) -> dict[str, Any]:
        """Return the target as plain data; settings that came later are left out where they have their defaults."""
        values = self.model_dump(mode="json")
        return {n: value for n, value in values.items() if n not in _LATER or value != _DEFAULTS[n]}

    def check_installed(self) -> None:
        """Refuse a runtime or a device that is not here, before any work is done.

        Raises:
            UsageError: With the line that installs the runtime, or what is said of the device.
        """
        if not self.facts.installed:
            raise UsageError(
                f"target {self.runtime!r} is not installed here", f"install it: {self.facts.install}"
            )
        if self.device == "cuda" and not gpus():
            others = [device for device in self.facts.devices if device != "cuda"]
            raise UsageError(
                f"target {self.spec!r} runs on a GPU, and no NVIDIA GPU can be used here",
                f"run it on a machine with one and its driver, or take --target {self.runtime} on the processor"
                if others
                else "run it on a machine with one and its driver; `autoprune doctor` lists what runs here",
            )


_DEFAULTS: dict[str, Any] = {name: info.default for name, info in Target.model_fields.items()}


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


def target_word(settings: Mapping[str, Any]) -> str:
    """Return a target as one word, with what is not the default; the settings may be of a machine with other cores."""
    runtime = str(settings.get("runtime", _DEFAULTS["runtime"]))
    parts = [runtime]
    devices: tuple[str, ...] = RUNTIMES[runtime].devices if runtime in RUNTIMES else ("cpu",)
    for name, usual in (("device", devices[0]), ("precision", _DEFAULTS["precision"])):
        parts += [str(settings[name])] if settings.get(name, usual) != usual else []
    if settings.get("compile"):
        parts.append("compile")
    numbers = ("threads", "batch", "input_size")
    own = {name: settings[name] for name in numbers if settings.get(name, _DEFAULTS[name]) != _DEFAULTS[name]}
    return ":".join([*parts, *(f"{name}={value}" for name, value in own.items())])


def given_target(value: object) -> object:
    """Return a target as a mapping where it was given as a word."""
    return parse_target(value) if isinstance(value, str) else value


def merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a further target: threads, batch and size of the first where it says nothing of them."""
    shared = {name: base[name] for name in ("threads", "batch", "input_size") if name in base}
    return {**shared, **own}


def recorded_target(settings: Mapping[str, Any]) -> Target:
    """Return the target of recorded settings, which need not fit this machine."""
    given = settings.get("target", {})
    return Target.model_construct(**{**Target().model_dump(), **(given if isinstance(given, dict) else {})})


def gpus() -> int:
    """Return the number of NVIDIA GPUs that the driver's management library tells of and the environment leaves us.

    It loads no CUDA context, which processes that are forked later could not use.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:  # no driver
        return 0
    count = ctypes.c_uint(0)
    if library.nvmlInit_v2() != 0 or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return 0
    return count.value


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
