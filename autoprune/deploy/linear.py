"""Linear layers with integer weights that run otherwise than in static int8: low-bit weights, and dynamic int8."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from autoprune.deploy.grids import Found, on_grid, weights_in
from autoprune.deploy.runtime import StoredWeight

# Weights that MatMulNBits reads at run time; onnxruntime and OpenVINO both know the operator.
LOW_BITS = (2, 4, 8)
_DOMAIN = "com.microsoft"
# The operator's blocks; one scale for a whole row is written once for each block.
_BLOCKS = (16, 32, 64, 128, 256)
_LINEAR = ("Gemm", "MatMul")


def low_bit_layers(
    proto: onnx.ModelProto, weights: Mapping[str, StoredWeight], taken: Collection[str]
) -> list[str]:
    """Return the linear layers whose weights a kernel can read in their few bits, while it computes in float.

    Args:
        proto: Float graph whose layer nodes carry the layers' names.
        weights: How weights are stored.
        taken: Layers that run otherwise.
    """
    return [
        found.layer
        for found in weights_in(proto, weights)
        if found.layer not in taken
        and found.stored.codes is not None
        and found.stored.bits in LOW_BITS
        and _is_plain(found)
        and _block(found) is not None
    ]


def write_low_bit(
    proto: onnx.ModelProto, weights: Mapping[str, StoredWeight], layers: Collection[str]
) -> None:
    """Let layers read their weights in 2, 4 or 8 bits, in place; the products are of float32.

    Args:
        proto: Graph whose layer nodes carry the layers' names.
        weights: Integers of the layers' weights.
        layers: From :func:`low_bit_layers`.
    """
    chosen = {name: stored for name, stored in weights.items() if name in layers}
    for found in list(weights_in(proto, chosen)):
        codes, scale = on_grid(found)
        rows, steps = _as_rows(found, codes, scale)
        block = _block(found)
        assert block is not None  # noqa: S101
        bits, (outputs, features) = found.stored.bits, rows.shape
        blocks = -(-features // block)
        padded = np.zeros((outputs, blocks * block), np.int64)
        padded[:, :features] = rows
        # Unsigned around the middle, which is the operator's own zero point.
        unsigned = (padded + 2 ** (bits - 1)).astype(np.uint8).reshape(outputs, blocks, block)
        per_byte = 8 // bits
        stored = np.zeros((outputs, blocks, block // per_byte), np.uint8)
        for place in range(per_byte):
            stored |= unsigned[:, :, place::per_byte] << np.uint8(bits * place)
        names = [f"{found.name}:bits", f"{found.name}:steps"]
        proto.graph.initializer.extend(
            [numpy_helper.from_array(stored, names[0]), numpy_helper.from_array(steps.reshape(-1), names[1])]
        )
        for node in found.nodes:
            # accuracy_level 1 is float32: left out, the kernel may round the inputs to 8 bits.
            attributes: dict[str, Any] = {"K": features, "N": outputs, "bits": bits, "block_size": block}
            made = helper.make_node(
                "MatMulNBits", [node.input[0], *names], [node.output[0]],
                name=node.name, domain=_DOMAIN, accuracy_level=1, **attributes,
            )  # fmt: skip
            _put(proto, node, [made])
    if chosen:
        _know_domain(proto)


def write_dynamic(
    proto: onnx.ModelProto, weights: Mapping[str, StoredWeight], layers: Collection[str]
) -> None:
    """Let linear layers round their inputs to 8 bits over the range of each inference, in place.

    Args:
        proto: Graph whose layer nodes carry the layers' names.
        weights: Integers of the layers' weights.
        layers: Linear layers.
    """
    chosen = {name: stored for name, stored in weights.items() if name in layers}
    for found in list(weights_in(proto, chosen)):
        codes, scale = on_grid(found)
        matrix = codes if found.transposed else codes.T
        names = {part: f"{found.name}:{part}" for part in ("codes", "steps", "zero")}
        proto.graph.initializer.extend(
            [
                numpy_helper.from_array(np.ascontiguousarray(matrix).astype(np.int8), names["codes"]),
                numpy_helper.from_array(scale.reshape(-1), names["steps"]),
                numpy_helper.from_array(np.zeros(matrix.shape[1], np.int8), names["zero"]),
            ]
        )
        for node in found.nodes:
            own = {part: f"{node.name}:{part}" for part in ("x", "scale", "offset", "sum", "float", "both")}
            made = [
                helper.make_node(
                    "DynamicQuantizeLinear", [node.input[0]], [own["x"], own["scale"], own["offset"]]
                ),
                helper.make_node(
                    "MatMulInteger",
                    [own["x"], names["codes"], own["offset"], names["zero"]],
                    [own["sum"]],
                    name=node.name,
                ),  # fmt: skip
                helper.make_node("Cast", [own["sum"]], [own["float"]], to=TensorProto.FLOAT),
                helper.make_node("Mul", [own["scale"], names["steps"]], [own["both"]]),
                helper.make_node("Mul", [own["float"], own["both"]], [node.output[0]]),
            ]
            _put(proto, node, made)


def in_float(raw: bytes) -> bytes:
    """Return a file whose products of integers are of the same numbers in float32, which no kernel cuts off."""
    proto = onnx.load_model_from_string(raw)
    for node in [node for node in proto.graph.node if node.op_type == "MatMulInteger"]:
        parts = [f"{node.name}:{part}:whole" for part in ("inputs", "weight", "offset", "zero")]
        casts = [
            helper.make_node("Cast", [name], [part], to=TensorProto.FLOAT)
            for name, part in zip(node.input, parts, strict=True)
        ]
        moved = [f"{part}:moved" for part in parts[:2]]
        _replace(proto, node, [
            *casts,
            helper.make_node("Sub", [parts[0], parts[2]], [moved[0]]),
            helper.make_node("Sub", [parts[1], parts[3]], [moved[1]]),
            helper.make_node("MatMul", moved, [f"{node.name}:product:whole"]),
            helper.make_node("Cast", [f"{node.name}:product:whole"], [node.output[0]], to=TensorProto.INT32),
        ])  # fmt: skip
    content: bytes = proto.SerializeToString()
    return content


def _is_plain(found: Found) -> bool:
    """Whether all calls of a layer are products of inputs and weight, with a bias at most."""
    return all(node.op_type in _LINEAR and _plain_gemm(node) for node in found.nodes)


def _plain_gemm(node: onnx.NodeProto) -> bool:
    values = {a.name: a for a in node.attribute}
    return all(name not in values or values[name].f == 1.0 for name in ("alpha", "beta")) and not (
        "transA" in values and values["transA"].i
    )


def _block(found: Found) -> int | None:
    """Return the operator's block for a layer, that of the fewest bytes; None where none fits."""
    features = found.shape[0] if found.transposed else found.shape[1]
    if found.stored.blocks == 1:
        fitting = [size for size in _BLOCKS if size <= features]
        return min(
            fitting, key=lambda size: -(-features // size) * (size * found.stored.bits / 8 + 4), default=None
        )
    size = features // found.stored.blocks
    return size if size * found.stored.blocks == features and size in _BLOCKS else None


def _as_rows(
    found: Found, codes: NDArray[np.float32], scale: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return codes ``(out, in)`` and scales ``(out, blocks)``."""
    rows = (codes.T if found.transposed else codes).astype(np.int64)
    if found.stored.blocks > 1:
        return rows, np.ascontiguousarray(scale, np.float32)
    blocks = -(-rows.shape[1] // (_block(found) or rows.shape[1]))
    return rows, np.repeat(scale.reshape(-1, 1), blocks, axis=1).astype(np.float32)


def _put(proto: onnx.ModelProto, old: onnx.NodeProto, new: list[onnx.NodeProto]) -> None:
    """Put nodes in the place of one, with its bias added behind them."""
    if len(old.input) > 2 and old.input[2]:
        summed = f"{old.output[0]}:sum"
        new[-1].output[0] = summed
        new = [*new, helper.make_node("Add", [summed, old.input[2]], [old.output[0]])]
    _replace(proto, old, new)


def _replace(proto: onnx.ModelProto, old: onnx.NodeProto, new: list[onnx.NodeProto]) -> None:
    place = next(index for index, node in enumerate(proto.graph.node) if node is old or node == old)
    nodes = [*proto.graph.node[:place], *new, *proto.graph.node[place + 1 :]]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)


def _know_domain(proto: onnx.ModelProto) -> None:
    if all(each.domain != _DOMAIN for each in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
