"""Whether int8 kernels add up rightly here: on processors without VNNI, two products are added in 16 bits.

There ``vpmaddubsw`` adds two products of an unsigned and a signed byte and cuts the sum off at 32,767, which two of
255 times 127 exceed. Weights of up to 63 in magnitude, 7 of their 8 bits, cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from autoprune.deploy.linear import in_float
from autoprune.deploy.parity import relative_error
from autoprune.deploy.session import open_session, run_all
from autoprune.deploy.sessions.onnxruntime import run_onnx
from autoprune.space.quantization import INTEGER_BITS
from autoprune.target import RUNTIMES, Target

NARROW_BITS = INTEGER_BITS - 1
# Runtimes whose kernels were seen to do so. torch's and XNNPACK's add in 32 bits on every processor.
_RUNTIMES = ("onnxruntime", "openvino")
_elsewhere: dict[str, int] = {}
# Products in each sum of the probe, and its examples: one, and enough for kernels that work on several.
_PRODUCTS, _EXAMPLES = 64, (1, 8)


def int8_bits(target: Target) -> int:
    """Return the bits that weights of int8 layers may have so that a target's kernels add them up rightly here.

    Found once in a process, by running two layers with the largest numbers. Where networks are also run on another
    machine, it is the fewer bits of both; see :func:`also_run_elsewhere`.

    Args:
        target: Where networks run.

    Returns:
        8, or 7 where sums are cut off.
    """
    if target.runtime not in _RUNTIMES or target.device != "cpu":
        return INTEGER_BITS
    return min(_own_bits(target.runtime), _elsewhere.get(target.runtime, INTEGER_BITS))


def bits_here() -> dict[str, int]:
    """Return the bits that :func:`int8_bits` gives on this machine, by runtime that is installed."""
    return {name: _own_bits(name) for name in _RUNTIMES if RUNTIMES[name].installed}


def also_run_elsewhere(bits: Mapping[str, int]) -> None:
    """Let networks that this process makes be right on another machine too, as the one that measures them.

    Args:
        bits: What :func:`bits_here` gave there; nothing where they are run here alone.
    """
    _elsewhere.clear()
    _elsewhere.update(bits)


def _own_bits(runtime: str) -> int:
    return NARROW_BITS if _saturates(runtime) else INTEGER_BITS


def kernels_off(target: Target, raw: bytes, inputs: NDArray[np.float32]) -> float:
    """Return how far a file's outputs are from its own arithmetic, as a share of the largest; 0 where sums are whole.

    A file that was made on another machine may have weights of all 8 bits.

    Args:
        target: Where the file runs.
        raw: Its content.
        inputs: Examples, ``(n, C, H, W)``.
    """
    if int8_bits(target) == INTEGER_BITS:
        return 0.0
    outputs = run_all(open_session(target, raw), inputs)
    return relative_error(outputs, run_onnx(in_float(raw), inputs, optimized=False))


@cache
def _saturates(runtime: str) -> bool:
    target = Target(runtime=runtime)
    for examples in _EXAMPLES:
        for convolution in (True, False):
            raw, inputs = _largest(convolution, examples)
            outputs = open_session(target, raw, 1).run(inputs)
            # Half of a sum is lost where any is; the outputs have 8 bits.
            if not np.allclose(outputs, 1.0, atol=0.1):
                return True
    return False


def _largest(convolution: bool, examples: int) -> tuple[bytes, NDArray[np.float32]]:
    """Return an int8 layer whose products are all the largest that there are, with inputs that give ones."""
    kernel = (3, 3) if convolution else ()
    products = _PRODUCTS * int(np.prod(kernel))
    shape = (32, _PRODUCTS, *kernel) if convolution else (_PRODUCTS, 32)
    scales = {"in": 1 / 255, "weight": 1 / (127 * products), "out": 1 / 255}
    constants = [
        numpy_helper.from_array(np.array(step, np.float32), f"{n}:scale") for n, step in scales.items()
    ]
    constants += [
        numpy_helper.from_array(np.array(0, np.int8 if n == "weight" else np.uint8), f"{n}:zero")
        for n in scales
    ]
    constants.append(numpy_helper.from_array(np.full(shape, 127, np.int8), "weight:codes"))
    grids = {n: [f"{n}:scale", f"{n}:zero"] for n in scales}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *grids["in"]], ["in:codes"]),
        helper.make_node("DequantizeLinear", ["in:codes", *grids["in"]], ["in"]),
        helper.make_node("DequantizeLinear", ["weight:codes", *grids["weight"]], ["weight"]),
        helper.make_node("Conv" if convolution else "MatMul", ["in", "weight"], ["made"]),
        helper.make_node("QuantizeLinear", ["made", *grids["out"]], ["out:codes"]),
        helper.make_node("DequantizeLinear", ["out:codes", *grids["out"]], ["y"]),
    ]
    sizes = [examples, _PRODUCTS, *(2 + side for side in kernel)]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "largest", [given], [made], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    content: bytes = proto.SerializeToString()
    return content, np.ones(sizes, np.float32)
