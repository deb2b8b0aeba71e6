"""Cost model: bytes and latency of a network that was not built, from networks that were.

Bytes follow from the layers' shapes; the few that a file format adds for each layer and channel are fitted. Latency is
the sum of the layers' times inside of exported networks, as the runtime's own profiler tells them (conversions between
float and int8 and the steps of kernel widths are in them), corrected by whole networks timed without the profiler. The
model states the error of its predictions for networks that it has not seen.

Where a runtime tells no times of layers, as compiled programs do not, the whole networks' times are shared out among
their layers by multiply-accumulates, at one speed for float and one for int8: what is known then is what whole networks
took, not which of their layers took it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from autoprune.search.profile import Design, Timed
from autoprune.space.quantization import INTEGER_BITS, computed_in
from autoprune.space.shapes import LayerShape

Array = NDArray[np.float64]

# What onnx files were seen to add, in bytes: constant, for each int8 layer, for each int8 and float output channel, for
# each layer whose weights are packed. A ridge pulls towards it where there are few networks.
_OVERHEAD = np.array([6000.0, 400.0, 13.0, 4.0, 350.0])
_OVERHEAD_SPREAD = np.array([6000.0, 200.0, 5.0, 2.0, 200.0])
_BYTES_SPREAD = 20.0
# Widths nearer than this share of a layer's channels take a step in time from the same kernel.
_NEAR = 0.05
# How much less a network timed as a whole counts for each distance in predicted latency.
_RIDGE = 1e-3


@dataclass(frozen=True)
class LayerTimes:
    """Times of one layer at one bit-width.

    Attributes:
        coefficients: Of ``(1, outputs x inputs, outputs, inputs)``, each as a share; none is negative.
        seen: Shares ``(outputs, inputs)`` of the observations, ``(n, 2)``.
        rest: What the smooth part leaves of each observation, seconds, ``(n,)``.
    """

    coefficients: Array
    seen: Array
    rest: Array

    @classmethod
    def fit(cls, shares: Array, seconds: Array) -> LayerTimes:
        """Fit a smooth part and keep the steps around it.

        Args:
            shares: Kept shares ``(outputs, inputs)``, ``(n, 2)``; n at least 1.
            seconds: ``(n,)``.
        """
        features = _features(shares[:, 0], shares[:, 1])
        # With few observations a layer is taken to be proportional to its multiplications.
        prior = np.diag([0.0, 0.0, 1e-2, 1e-2])
        solution, _ = nnls(np.vstack([features, prior]), np.concatenate([seconds, np.zeros(4)]))
        return cls(solution, shares, seconds - features @ solution)

    def __call__(self, outputs: Array, inputs: Array) -> Array:
        """Return seconds for shares of outputs and inputs, each ``(n,)``."""
        smooth: Array = _features(outputs, inputs) @ self.coefficients
        apart = np.stack([outputs, inputs], axis=1)[:, None, :] - self.seen[None]
        near = np.exp(-(apart**2).sum(axis=2) / (2 * _NEAR**2))
        step: Array = (near @ self.rest) / (near.sum(axis=1) + 0.1)
        return np.maximum(smooth + step, 0.0)


def _features(outputs: Array, inputs: Array) -> Array:
    return np.stack([np.ones_like(outputs), outputs * inputs, outputs, inputs], axis=1)


# Places in the line: a constant, seconds of int8 layers, of float layers, elements that change their type.
_SLOPE = {8: 1, 32: 2}
_FLOAT = 32
_CROSSING = 3


class CostModel:
    """Predicts the file's bytes and the latency, both as shares of the dense network's.

    Args:
        shapes: Layers of the network.
        designs: Networks that were built and timed, the dense one first.
        results: Trials that came since, of which the whole was timed, not the layers. They are used if that predicts
            those among them better that were left out.
        in_float: Groups whose integers are only stored as such on the target: they take the time of float, whatever
            the noise of the profile says.

    Attributes:
        dense_bytes: Bytes of the dense file.
        size_error: Largest error of a predicted size over the designs, as a share of the dense file.
        is_corrected: Whether the results changed the predictions of latency.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        designs: Sequence[Design],
        results: Sequence[Timed] = (),
        in_float: Collection[str] = (),
    ) -> None:
        self.shapes = tuple(shapes)
        self.designs = _with_times(designs, self.shapes)
        self.results = tuple(results)
        self.in_float = frozenset(in_float)
        self.dense_bytes = designs[0].size_bytes
        self._overhead = self._fit_overhead()
        self._times = self._fit_times(self.designs)
        self._design_rows = self._rows(self.designs, self._times)
        self._line = self._corrected_line()
        self.size_error = max(
            abs(self.size(d.kept, d.bits) - d.size_bytes / self.dense_bytes) for d in designs
        )

    def corrected(self, results: Sequence[Timed]) -> CostModel:
        """Return the model of the same designs, corrected by other results."""
        other = copy.copy(self)
        other.results = tuple(results)
        other._line = other._corrected_line()
        return other

    # -- bytes -------------------------------------------------------------------------------

    def size(self, kept: Mapping[str, int], bits: Mapping[str, int]) -> float:
        """Return the predicted bytes of the file as a share of the dense file.

        Args:
            kept: Kept units by group; groups that are not named are whole.
            bits: Bit-width by group; 32 where not named.
        """
        total = self._overhead[0] + sum(self.layer_bytes(shape, kept, bits) for shape in self.shapes)
        return float(total) / self.dense_bytes

    def layer_bytes(self, shape: LayerShape, kept: Mapping[str, int], bits: Mapping[str, int]) -> float:
        """Return the bytes that one layer adds to the file."""
        if shape.is_gone(kept):
            return 0.0
        width = bits.get(shape.group, 32)
        outputs = shape.output_share(kept)
        weights = shape.weights * outputs * (shape.input_share(kept) if shape.reads else 1.0)
        channels = shape.outputs * outputs
        _, layer, int8_channel, float_channel, packed = self._overhead
        added = layer + int8_channel * channels if computed_in(width) == 8 else float_channel * channels
        added += packed if width < INTEGER_BITS else 0.0
        return float(weights * width / 8 + added)

    @property
    def base_bytes(self) -> float:
        """Bytes that no layer adds."""
        return float(self._overhead[0])

    def _fit_overhead(self) -> Array:
        """Fit what is left when the weights are taken away, pulled towards what such files were seen to add."""
        rows, rest = [], []
        for design in self.designs:
            present = [s for s in self.shapes if not s.is_gone(design.kept)]
            widths = {s.name: design.bits.get(s.group, 32) for s in present}
            eight = [s for s in present if computed_in(widths[s.name]) == 8]
            packed = sum(width < INTEGER_BITS for width in widths.values())
            weights = sum(
                s.weights
                * s.output_share(design.kept)
                * (s.input_share(design.kept) if s.reads else 1.0)
                * widths[s.name]
                / 8
                for s in present
            )
            channels = {s.name: s.outputs * s.output_share(design.kept) for s in present}
            in_int8 = sum(channels[s.name] for s in eight)
            rows.append([1.0, len(eight), in_int8, sum(channels.values()) - in_int8, packed])
            rest.append(design.size_bytes - weights)
        features = np.vstack([np.array(rows) / _BYTES_SPREAD, np.diag(1 / _OVERHEAD_SPREAD)])
        wanted = np.concatenate([np.array(rest) / _BYTES_SPREAD, _OVERHEAD / _OVERHEAD_SPREAD])
        found: Array = np.linalg.lstsq(features, wanted, rcond=None)[0]
        return found

    # -- latency -----------------------------------------------------------------------------

    def timed_as(self, group: str, width: int) -> int:
        """Return the bit-width of the arithmetic of a group's layers: 8, or 32 for float."""
        return _FLOAT if group in self.in_float else computed_in(width)

    def timed_bits(self, bits: Mapping[str, int]) -> dict[str, int]:
        """Return what layers are timed as, by group."""
        return {group: self.timed_as(group, width) for group, width in bits.items()}

    def latency(self, kept: Mapping[str, int], bits: Mapping[str, int]) -> float:
        """Return the predicted latency as a share of the dense network's; see :meth:`size`."""
        return float(self._parts([(kept, bits)], self._times)[0] @ self._line)

    def layer_share(
        self, shape: LayerShape, outputs: Array, inputs: Array, width: int, converted: Array | float = 0.0
    ) -> Array:
        """Return what a layer adds to the latency, as shares of the dense network's.

        Args:
            shape: The layer.
            outputs: Shares of its outputs that stay, ``(n,)``.
            inputs: Shares of its inputs that stay, ``(n,)``.
            width: Its bit-width.
            converted: Share of its dense inputs that changes its type, ``(n,)``.
        """
        seconds = self._layer_s(shape, outputs, inputs, width, self._times)
        share: Array = (
            self._line[_SLOPE[self.timed_as(shape.group, width)]] * seconds
            + self._line[_CROSSING] * shape.read_elements * converted
        )
        return share

    @property
    def base_latency(self) -> float:
        """Share of the dense latency that no layer adds."""
        return float(self._line[0] + self._line[_SLOPE[32]] * self._times.before_s)

    def _fit_times(self, designs: Sequence[Design]) -> _Times:
        by_layer: dict[tuple[str, int], LayerTimes] = {}
        for shape in self.shapes:
            for width in (8, 32):
                seen = [
                    d
                    for d in designs
                    if self.timed_as(shape.group, d.bits.get(shape.group, _FLOAT)) == width
                    and shape.name in d.layer_s
                    and not shape.is_gone(d.kept)
                ]
                if seen:
                    shares = np.array([[shape.output_share(d.kept), shape.input_share(d.kept)] for d in seen])
                    seconds = np.array([d.layer_s[shape.name] for d in seen])
                    by_layer[shape.name, width] = LayerTimes.fit(shares, seconds)
        before = [d.layer_s.get("", 0.0) for d in designs]
        return _Times(by_layer, float(np.median(before)))

    def _layer_s(self, shape: LayerShape, outputs: Array, inputs: Array, width: int, times: _Times) -> Array:
        own = self.timed_as(shape.group, width)
        known = times.by_layer.get((shape.name, own)) or times.by_layer.get((shape.name, 40 - own))
        return known(outputs, inputs) if known is not None else np.zeros(len(outputs))

    def _parts(self, networks: Sequence[tuple[Mapping[str, int], Mapping[str, int]]], times: _Times) -> Array:
        """Return 1, the seconds of int8 and of float layers, and the elements that change their type, ``(n, 4)``.

        Args:
            networks: Kept units and bit-widths by group, as in :meth:`size`.
            times: Times of the layers.
        """
        parts = np.tile([1.0, 0.0, times.before_s, 0.0], (len(networks), 1))
        timed = [(row, kept, self.timed_bits(bits)) for row, (kept, bits) in enumerate(networks)]
        for shape in self.shapes:
            by_width: dict[int, list[tuple[int, Mapping[str, int]]]] = {}
            for row, kept, bits in timed:
                if shape.is_gone(kept):
                    continue
                width = bits.get(shape.group, _FLOAT)
                by_width.setdefault(width, []).append((row, kept))
                parts[row, _CROSSING] += shape.read_elements * shape.converted_share(kept, bits, width)
            for width, found in by_width.items():
                rows = [row for row, _ in found]
                outputs = np.array([shape.output_share(kept) for _, kept in found])
                inputs = np.array([shape.input_share(kept) for _, kept in found])
                seconds = self._layer_s(shape, outputs, inputs, width, times)
                parts[rows, _SLOPE[self.timed_as(shape.group, width)]] += seconds
        return parts

    def _rows(self, timed: Sequence[Timed], times: _Times) -> tuple[Array, Array]:
        """Return the parts of networks, ``(n, 4)``, and their latencies, ``(n,)``."""
        parts = self._parts([(t.kept, t.bits) for t in timed], times)
        return parts, np.array([t.latency_ratio for t in timed])

    def _corrected_line(self) -> Array:
        """Fit the line to designs and results, if that predicts left-out results better."""
        parts, ratios = self._design_rows
        plain = _fit_line(parts, ratios)
        self.is_corrected = False
        if len(self.results) < 2:
            return plain
        more, found = self._rows(self.results, self._times)
        all_parts, all_ratios = np.concatenate([parts, more]), np.concatenate([ratios, found])
        left_out = []
        for row in range(len(parts), len(all_parts)):
            line = _fit_line(np.delete(all_parts, row, axis=0), np.delete(all_ratios, row))
            left_out.append(float(all_parts[row] @ line - all_ratios[row]))
        self.is_corrected = float(np.square(left_out).mean()) < float(np.square(more @ plain - found).mean())
        return _fit_line(all_parts, all_ratios) if self.is_corrected else plain

    @cached_property
    def latency_error(self) -> float:
        """Root mean square error of latency for designs that were left out, as a share of the dense latency.

        NaN with fewer than four designs.
        """
        if len(self.designs) < 4:
            return float("nan")
        errors = []
        for left_out in self.designs[1:]:
            rest = [d for d in self.designs if d is not left_out]
            times = self._fit_times(rest)
            line = _fit_line(*self._rows(rest, times))
            predicted = float(self._parts([(left_out.kept, left_out.bits)], times)[0] @ line)
            errors.append(predicted - left_out.latency_ratio)
        return float(np.sqrt(np.mean(np.square(errors))))


def _with_times(designs: Sequence[Design], shapes: Sequence[LayerShape]) -> tuple[Design, ...]:
    """Return the designs, with multiply-accumulates in the place of times where none has any times of layers.

    The line through whole networks makes time of them; see :func:`_fit_line`.
    """
    if any(design.layer_s for design in designs):
        return tuple(designs)
    dense = max(sum(shape.macs({}) for shape in shapes), 1.0)
    return tuple(
        design.model_copy(
            update={
                "layer_s": {s.name: s.macs(design.kept) / dense for s in shapes if s.macs(design.kept) > 0}
            }
        )
        for design in designs
    )


@dataclass(frozen=True)
class _Times:
    by_layer: dict[tuple[str, int], LayerTimes]
    before_s: float


def _fit_line(parts: Array, ratios: Array) -> Array:
    """Fit what whole networks took to their parts; nothing takes less than no time.

    The profiler slows int8 and float layers by different shares, so each kind has a slope of its own.

    Args:
        parts: Parts of networks, the dense one first, ``(n, 4)``.
        ratios: Their latencies as shares of the dense network's, ``(n,)``.
    """
    scale = np.array([1.0, *np.maximum(parts[:, 1:].max(axis=0), 1e-12)])
    dense_s = max(float(parts[0, 1:3].sum()), 1e-12)
    # Without evidence the ratio is that of the sums, and a change of type costs what the profiler saw of it.
    usual = np.array([0.0, 1.0 / dense_s, 1.0 / dense_s, 0.0]) * scale
    pull = np.sqrt(_RIDGE) * np.eye(4)
    found, _ = nnls(np.vstack([parts / scale, pull]), np.concatenate([ratios, pull @ usual]))
    line: Array = found / scale
    return line
