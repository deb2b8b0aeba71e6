"""Post-training int8 of an ONNX graph by onnxruntime's quantizer: per channel, static QDQ, U8S8 or signed."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from autoprune.deploy.executed import layer_of
from autoprune.deploy.template import foreign_nodes, is_layer

_SIGNED = {"ActivationSymmetric": True, "QuantizeBias": False, "AddQDQPairToWeight": True}


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, batches: Sequence[NDArray[np.float32]]) -> None:
        self._name = name
        self._batches: Iterator[NDArray[np.float32]] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def quantize(
    proto: onnx.ModelProto,
    int8_layers: Collection[str],
    batches: Sequence[NDArray[np.float32]],
    overrides: dict[str, list[dict[str, Any]]] | None = None,
    *,
    signed: bool = False,
    narrow: bool = False,
) -> onnx.ModelProto:
    """Return the graph with the given layers in int8.

    Activations are unsigned and weights signed: with both signed, x86 leaves half of a ResNet's convolutions in
    float. Operators between layers are quantized only where every layer that feeds them is, so that a float layer
    is not surrounded by conversions.

    Args:
        proto: Float graph whose layer nodes carry the layers' names.
        int8_layers: Names of the layers.
        batches: Inputs, ``(n, C, H, W)``, from which ranges are taken by minimum and maximum.
        overrides: Scales of weights by initialiser; the others end at their largest magnitudes.
        signed: Whether activations are signed and their ranges symmetric, biases stay float, and weights are float with
            quantizing nodes behind them: what TensorRT's parser knows.
        narrow: Whether weights without given scales have 7 of the 8 bits.

    Returns:
        A new graph; its layer nodes keep their names.
    """
    excluded = _excluded(proto, set(int8_layers))
    with tempfile.TemporaryDirectory(prefix="autoprune-int8-") as folder:
        path = Path(folder) / "int8.onnx"
        level = logging.root.level
        logging.root.setLevel(
            logging.ERROR
        )  # the quantizer advises on the root logger, which is not ours to fill
        try:
            quantize_static(
                proto,
                path,
                _Reader(proto.graph.input[0].name, batches),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                reduce_range=narrow,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"TensorQuantOverrides": overrides or {}, **(_SIGNED if signed else {})},
                nodes_to_exclude=excluded,
            )
        finally:
            logging.root.setLevel(level)
        return onnx.load(path)


def _excluded(proto: onnx.ModelProto, int8_layers: set[str]) -> list[str]:
    """Name the nodes that stay in float; nodes without a name get one."""
    sources: dict[str, set[str]] = {}
    excluded = []
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"node_{index}"
    unasked = {node.name for node in foreign_nodes(proto)}
    for node in proto.graph.node:
        layer = is_layer(node)
        foreign = node.name in unasked
        feeding = set().union(*(sources.get(name, set()) for name in node.input))
        owner = layer_of(node.name)
        kept_float = foreign or (
            owner not in int8_layers if layer else bool(feeding - int8_layers) or not feeding
        )
        if kept_float:
            excluded.append(node.name)
        for output in node.output:
            sources[output] = {owner} if layer else {node.name} if foreign else feeding
    return excluded
