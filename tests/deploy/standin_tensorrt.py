"""A stand-in for TensorRT and for a GPU: what is asked of the library, done on the processor by onnxruntime.

It has the classes and functions of TensorRT 11's Python API that are used here, with the arguments of its
documentation, and refuses what the documentation does. Buffers are addresses, as there; kernels are onnxruntime's.
"""

from __future__ import annotations

import ctypes
import json
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

_MODULES = ("autoprune.deploy.sessions.tensorrt", "autoprune.deploy.tensorrt")


class Logger:
    ERROR = 1

    def __init__(self, severity: int) -> None:
        assert severity == Logger.ERROR


class BuilderFlag:
    TF32 = "TF32"
    SPARSE_WEIGHTS = "SPARSE_WEIGHTS"


class ProfilingVerbosity:
    DETAILED = "DETAILED"


class LayerInformationFormat:
    JSON = "JSON"


class TensorIOMode:
    INPUT = "INPUT"
    OUTPUT = "OUTPUT"


class IProfiler:
    def __init__(self) -> None:
        self.ready = True


class Network:
    proto: onnx.ModelProto

    def get_input(self, index: int) -> SimpleNamespace:
        value = self.proto.graph.input[index]
        dims = value.type.tensor_type.shape.dim
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
        return SimpleNamespace(name=value.name, shape=shape)


class OnnxParser:
    """Refuses what TensorRT's parser does: asymmetric integers, unsigned ones, and quantized biases."""

    def __init__(self, network: Network, logger: Logger) -> None:
        self.network = network
        self.errors: list[str] = []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(desc=lambda: self.errors[index])

    def parse(self, raw: bytes) -> bool:
        proto = onnx.load_model_from_string(raw)
        values = {t.name: t for t in proto.graph.initializer}
        for node in proto.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                zero = values[node.input[2]]
                if zero.data_type != TensorProto.INT8 or onnx.numpy_helper.to_array(zero).any():
                    self.errors.append(f"{node.name}: only symmetric int8 is supported")
            if node.op_type == "DequantizeLinear" and node.input[0] in values:
                self.errors.append(f"{node.name}: only activation types allowed as input to this layer")
            if node.op_type == "Refused":
                self.errors.append("No importer registered for op: Refused")
        self.network.proto = proto
        return not self.errors


class Config:
    def __init__(self) -> None:
        self.flags = {BuilderFlag.TF32}
        self.profiling_verbosity = ""
        self.profiles: list[Any] = []

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized: bytes) -> SimpleNamespace:
        return SimpleNamespace(content=serialized + b"timed ", serialize=lambda: serialized + b"timed ")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.cache


class Profile:
    def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
        self.name, self.shapes = name, (least, best, most)


class Builder:
    built: list[Config] = []  # noqa: RUF012

    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def create_network(self) -> Network:
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        Builder.built.append(config)
        if any(size < 0 for size in network.get_input(0).shape) and not config.profiles:
            return None  # a free size needs a profile
        shapes = config.profiles[0].shapes if config.profiles else [network.get_input(0).shape] * 3
        content = {
            "shapes": shapes,
            "detailed": config.profiling_verbosity == ProfilingVerbosity.DETAILED,
            "model": network.proto.SerializeToString().hex(),
        }
        return json.dumps(content).encode()


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.profiler: Any = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == self.engine.names[0]
        assert tuple(shape) == tuple(self.engine.shapes[1])
        self.shape = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == self.engine.names[1]
        zeros = np.zeros(self.shape, np.float32)
        shape: tuple[int, ...] = tuple(self.engine.session.run(None, {self.engine.names[0]: zeros})[0].shape)
        return shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77
        given = _at(self.addresses[self.engine.names[0]], self.shape)
        [made] = self.engine.session.run(None, {self.engine.names[0]: given})
        _at(self.addresses[self.engine.names[1]], made.shape)[...] = made
        if self.profiler is not None:
            assert self.profiler.ready
            for layer in self.engine.layers():
                self.profiler.report_layer_time(layer["Name"], 0.25)
        return True


class Engine:
    def __init__(self, content: dict[str, Any]) -> None:
        self.proto = onnx.load_model_from_string(bytes.fromhex(content["model"]))
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(self.proto.SerializeToString(), options)
        self.shapes, self.detailed = content["shapes"], content["detailed"]
        self.names = [self.proto.graph.input[0].name, self.proto.graph.output[0].name]
        self.num_io_tensors = 2

    def get_tensor_name(self, index: int) -> str:
        return str(self.names[index])

    def get_tensor_mode(self, name: str) -> str:
        return TensorIOMode.INPUT if name == self.names[0] else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == self.names[0]
        network = Network()
        network.proto = self.proto
        return tuple(network.get_input(0).shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Any]:
        assert (name, profile) == (self.names[0], 0)
        return list(self.shapes)

    def create_execution_context(self) -> Context:
        return Context(self)

    def create_engine_inspector(self) -> SimpleNamespace:
        def tell(kind: str) -> str:
            assert kind == LayerInformationFormat.JSON
            layers = self.layers()
            return json.dumps({"Layers": layers if self.detailed else [layer["Name"] for layer in layers]})

        return SimpleNamespace(get_engine_information=tell)

    def layers(self) -> list[dict[str, Any]]:
        """Tell of each layer as TensorRT does: a layer between quantizing nodes is one of integers."""
        makers = {name: node for node in self.proto.graph.node for name in node.output}
        types = {t.name: t.data_type for t in self.proto.graph.initializer}
        words = {TensorProto.FLOAT: "Float", TensorProto.FLOAT16: "Half", TensorProto.BFLOAT16: "BFloat16"}
        found = []
        for node in self.proto.graph.node:
            own = {
                "Name": node.name or node.output[0],
                "LayerType": node.op_type,
                "Inputs": [],
                "Outputs": [{"Name": node.output[0]}],
            }
            own["Metadata"] = f"[ONNX Layer: {node.name}]"
            if node.op_type in ("Conv", "Gemm", "MatMul"):
                steps = [makers[name].op_type for name in node.input[:2] if name in makers]
                integers = steps.count("DequantizeLinear") == 2
                word = "Int8" if integers else words[types.get(node.input[1], TensorProto.FLOAT)]
                own |= {
                    "LayerType": "CaskConvolution",
                    "Weights": {"Type": word, "Count": 1},
                    "TacticName": "xmma",
                }
                own["Metadata"] = f"[ONNX Layer: {node.input[1]}_QuantizeLinear]\x1e[ONNX Layer: {node.name}]"
            own["Inputs"] = [{"Name": name, "DataType": "Float"} for name in node.input[:1]]
            found.append(own)
        return found


class Runtime:
    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        try:
            return Engine(json.loads(content))
        except ValueError:
            return None


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        assert stream.cuda_stream == 77

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1.5


def _at(address: int, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)


def install(patch: pytest.MonkeyPatch) -> None:
    """Put the stand-in in the place of the library, and of a GPU, until the test ends."""
    module = ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)
    module.__version__ = "11.4.0"  # type: ignore[attr-defined]
    for part in (
        Logger, BuilderFlag, ProfilingVerbosity, LayerInformationFormat, TensorIOMode, IProfiler, OnnxParser, Builder,
        Runtime,
    ):  # fmt: skip
        setattr(module, part.__name__, part)
    Builder.built.clear()
    patch.setitem(sys.modules, "tensorrt", module)
    for name in _MODULES:
        patch.delitem(sys.modules, name, raising=False)
    session = import_module(_MODULES[0])
    gpu = SimpleNamespace(
        Stream=lambda: SimpleNamespace(cuda_stream=77, synchronize=lambda: None),
        Event=_Event,
        synchronize=lambda: None,
    )
    patch.setattr(session, "cuda", gpu)
    patch.setattr(session, "_on_gpu", lambda tensor: tensor.clone())
    patch.setattr("autoprune.target.gpus", lambda: 1)


def remove() -> None:
    """Forget the modules that were loaded with the stand-in."""
    for name in _MODULES:
        sys.modules.pop(name, None)
