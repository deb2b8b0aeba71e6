r"""Equalisation: channels rescaled between layers before grids are made, without changing what a network computes.

A channel that is divided by :math:`s > 0` where it is made and multiplied by :math:`s` where it is read is the same
channel, as long as everything between passes factors on; :mod:`autoprune.compress.flow.recorder` finds such channels.

References:
    [Nagel2019] Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019.
    [Xiao2023] SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, ICML 2023.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from autoprune.compress.flow.families import Family, Tables, families, scale
from autoprune.compress.flow.recorder import channel_flow, input_maxima
from autoprune.compress.flow.units import Maker, Reader
from autoprune.compress.outputs import flat_outputs
from autoprune.space.quantization import SMOOTHING, Equalize, Quantization

# Largest difference of outputs, relative to the largest output.
_TOLERANCE = 1e-4
_EXAMPLES = 64
# Sweeps over all families, which share layers, and the change of a factor below which they have settled.
_SWEEPS = 20
_SETTLED = 1e-3
_TINY = 1e-12
# Factors beyond are those of channels that are all but dead.
_LARGEST = 1e4
_log = logging.getLogger(__name__)


@torch.no_grad()
def equalised(model: nn.Module, how: Quantization, batches: Sequence[Tensor]) -> nn.Module:
    """Return the network with its channels rescaled as ``how.equalize`` says.

    The rescaled network's outputs are compared with the network's own on calibration inputs. Where they differ by more
    than 1e-4 of the largest, families of channels are rescaled one after another, and what changes the outputs is
    taken back and told by name.

    Args:
        model: The network on the CPU in evaluation mode; it is not changed.
        how: Form of equalisation.
        batches: Calibration inputs, at least one batch.

    Returns:
        A copy: the same layers with other weights.
    """
    copy = deepcopy(model).eval()
    if how.equalize == "none":
        return copy
    flow = channel_flow(copy, batches[0][:2])
    if how.equalize in ("cross_layer", "both"):
        found = families(flow, _equalises)
        maxima = _maxima(copy, found, batches)
        _rescale(copy, found, cross_layer_factors(copy, found, maxima, flow.count), batches, "cross_layer")
    if how.equalize in SMOOTHING:
        found = families(flow, _smooths)
        maxima = _maxima(copy, found, batches)
        factors = smooth_factors(copy, found, maxima, flow.count, how.smooth_alpha)
        _rescale(copy, found, factors, batches, "smooth")
    return copy


def cross_layer_factors(
    model: nn.Module, found: Sequence[Family], maxima: Mapping[str, Tensor], count: int
) -> Tensor:
    r"""Return the factors with which what makes and what reads each channel have equal ranges [Nagel2019]_.

    With the ranges :math:`r^{(1)}` of a channel where it is made and :math:`r^{(2)}` where it is read it is divided by
    :math:`s = \sqrt{r^{(1)} / r^{(2)}}`; families that share layers take turns until factors settle. Unlike the paper,
    which knows chains of layers, a channel that many layers make and read, as in residual networks, has one factor,
    by the largest ranges. The paper absorbs large biases into the following layers; here no channel grows beyond the
    largest magnitude that its layer read before, seen on calibration inputs.

    Args:
        model: The network; it is not changed.
        found: Families of layers and BatchNorms.
        maxima: Largest magnitude of every input channel, by the name of the reading weight.
        count: Units of the network.

    Returns:
        Positive factors, ``(count,)``, by which a unit is divided where it is made; 1 for units of no family.
    """
    tables = Tables(model, found)
    total = torch.ones(count, dtype=torch.float64)
    shares = {r.weight: _shares(maxima[r.weight]) for family in found for r in family.readers}
    for _ in range(_SWEEPS):
        largest = 0.0
        for family in found:
            made, read = (
                _by_unit(((side.units, tables.ranges(side)) for side in sides), count)
                for sides in (family.makers, family.readers)
            )
            factors = torch.ones_like(total)
            known = family.units[(made[family.units] > 0) & (read[family.units] > 0)]
            factors[known] = (made[known] / read[known]).sqrt()
            least = _by_unit(((r.units, shares[r.weight]) for r in family.readers), count) / total
            factors[known] = torch.maximum(factors, least)[known]
            factors = (total * factors).clamp(1 / _LARGEST, _LARGEST) / total
            tables.scale(family, factors)
            total *= factors
            largest = max(largest, float(factors.log().abs().max()))
        if largest < _SETTLED:
            break
    return total


def smooth_factors(
    model: nn.Module, found: Sequence[Family], maxima: Mapping[str, Tensor], count: int, alpha: float
) -> Tensor:
    r"""Return the factors that move large inputs into the weights that read them [Xiao2023]_.

    Channel :math:`j` behind a LayerNorm is divided by
    :math:`s_j = \max |x_j|^\alpha / \max |w_j|^{1 - \alpha}`, with maxima over calibration inputs and over all weights
    that read it.

    Args:
        model: The network; it is not changed.
        found: Families of LayerNorms and linear layers.
        maxima: Largest magnitude of every input channel, by the name of the reading weight.
        count: Units of the network.
        alpha: From 0, inputs get equal ranges only as far as weights ask for it, to 1, inputs get equal ranges.

    Returns:
        Positive factors, ``(count,)``; 1 for units of no family.
    """
    tables = Tables(model, found)
    total = torch.ones(count, dtype=torch.float64)
    for family in found:
        seen = _by_unit(((r.units, maxima[r.weight].double()) for r in family.readers), count)
        read = _by_unit(((r.units, tables.ranges(r)) for r in family.readers), count)
        known = family.units[(seen[family.units] > 0) & (read[family.units] > 0)]
        total[known] = (seen[known] ** alpha / read[known] ** (1.0 - alpha)).clamp(1 / _LARGEST, _LARGEST)
    return total


def _equalises(makers: Sequence[Maker], readers: Sequence[Reader]) -> bool:
    return all(m.kind == "layer" or (m.kind == "batchnorm" and m.layer) for m in makers)


def _smooths(makers: Sequence[Maker], readers: Sequence[Reader]) -> bool:
    return all(m.kind == "layernorm" for m in makers) and all(r.kind == "linear" for r in readers)


def _maxima(model: nn.Module, found: Sequence[Family], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    return input_maxima(model, {r.weight for family in found for r in family.readers}, batches)


def _by_unit(sides: Iterable[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Return the largest value of each unit, ``(count,)``; 0 where there is none."""
    found = torch.zeros(count, dtype=torch.float64)
    for units, values in sides:
        found.scatter_reduce_(0, units, values.double(), "amax")
    return found


def _shares(maxima: Tensor) -> Tensor:
    """Return magnitudes as shares of the largest."""
    return maxima.double() / maxima.max().double().clamp_min(_TINY)


def _rescale(
    model: nn.Module, found: Sequence[Family], factors: Tensor, batches: Sequence[Tensor], form: Equalize
) -> None:
    """Rescale families in place, as far as the outputs stay the same."""
    if not found:
        _log.warning("equalize %r: this network has no channels that can be rescaled so", form)
        return
    inputs = batches[0][:_EXAMPLES]
    wanted = flat_outputs(model(inputs))
    state = deepcopy(model.state_dict())
    for family in found:
        scale(model, family, factors)
    if _difference(wanted, flat_outputs(model(inputs))) <= _TOLERANCE:
        return
    model.load_state_dict(state)
    for family in found:
        before = deepcopy(model.state_dict())
        scale(model, family, factors)
        difference = _difference(wanted, flat_outputs(model(inputs)))
        if not difference <= _TOLERANCE:
            model.load_state_dict(before)
            _log.warning(
                "equalize %r: the channels of %r stay as they are; outputs would change by %.2g of the largest "
                "(allowed: %g)",
                form,
                family.name,
                difference,
                _TOLERANCE,
            )


def _difference(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Return the largest difference relative to the largest output; NaN where there is one."""
    differences = [
        float((want - other).abs().max() / want.abs().max().clamp_min(_TINY))
        for want, other in zip(wanted, got, strict=True)
    ]
    return max(differences, key=lambda each: each if each == each else float("inf"), default=0.0)
