"""Quantizing steps in a graph: where they are, what they round, and whose they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from autoprune.deploy.layered import Layered, layered
from autoprune.deploy.layers import module_name
from autoprune.deploy.qdq import IntegerWeight, with_steps
from tests.deploy.contract import few_bits
from tests.deploy.networks import LAYERS, residual

IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(3))
STEPS = torch.ops.quantized_decomposed
QUANTIZE, DEQUANTIZE = STEPS.quantize_per_tensor.default, STEPS.dequantize_per_tensor.default


def network(model: nn.Module) -> Layered:
    return layered(model, IMAGES[:2], 1)


def steps_of(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target is QUANTIZE]


def call(graph: fx.Graph, layer: str) -> Any:
    [found] = [n for n in graph.nodes if n.target == module_name(layer)]
    return found


def source(node: fx.Node) -> Any:
    """Return what a reader of a rounded value reads before it is rounded."""
    dequantize = node.all_input_nodes[0]
    assert dequantize.target is DEQUANTIZE
    return dequantize.all_input_nodes[0].all_input_nodes[0]


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_every_value_is_rounded_once_behind_its_activation() -> None:
    model = residual()
    made = with_steps(network(model), LAYERS, [], {}, [IMAGES], {})
    nodes = {str(n.all_input_nodes[0]) for n in steps_of(made.graph)}
    # The images, stem's and one's after their activation, two's as it is, the sum after its own, the head's in and out.
    assert nodes == {"x", "relu", "relu_1", "layer_two", "relu_2", "flatten", "layer_head"}
    assert source(call(made.graph, "one")) is next(n for n in made.graph.nodes if n.name == "relu")
    total = next(n for n in made.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    assert [n.target for n in total.all_input_nodes] == [DEQUANTIZE] * 2
    with torch.no_grad():
        assert 0 < relative(made(IMAGES), model(IMAGES)) < 0.05


def test_each_reader_has_a_step_of_its_own() -> None:
    made = with_steps(network(residual()), LAYERS, [], {}, [IMAGES], {})
    dequantized = [n for n in made.graph.nodes if n.target is DEQUANTIZE]
    assert all(len(n.users) == 1 for n in dequantized)
    integers = next(n for n in steps_of(made.graph) if str(n.all_input_nodes[0]) == "relu")
    assert len(integers.users) == 2  # the block, and the path around it


def test_a_sum_with_a_float_part_stays_float() -> None:
    made = with_steps(network(residual()), ["stem", "head"], [], {}, [IMAGES], {})
    total = next(n for n in made.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    assert {n.target for n in total.all_input_nodes} == {DEQUANTIZE, module_name("two")}
    assert str(source(call(made.graph, "head"))) == "flatten"
    assert (
        call(made.graph, "one").all_input_nodes[0].target is DEQUANTIZE
    )  # what stem made is rounded for all


@pytest.mark.parametrize("limits", [(-1.0, 3.0), (0.0, 2.0), (0.0, 0.0)])
def test_a_given_range_is_taken(limits: tuple[float, float]) -> None:
    made = with_steps(network(residual()), ["stem"], [], {}, [IMAGES], {"stem": limits})
    [first, *_] = steps_of(made.graph)
    _, step, zero, low, high, kind = first.args
    assert (low, high, kind) == (-128, 127, torch.int8)
    assert isinstance(step, float)
    assert isinstance(zero, int)
    assert step == pytest.approx(max((limits[1] - limits[0]) / 255, 1e-6))
    # Zero is one of the grid's values, or padding would not be exact.
    assert step * (-128 - zero) == pytest.approx(limits[0], abs=step)
    assert step * (127 - zero) >= limits[1] - step


def test_ranges_are_those_of_calibration() -> None:
    wide = torch.cat([IMAGES, 10 * IMAGES])
    narrow, far = (
        next(iter(steps_of(with_steps(network(residual()), ["stem"], [], {}, [x], {}).graph))).args[1]
        for x in (IMAGES, wide)
    )
    assert far == pytest.approx(10 * narrow)  # type: ignore[operator]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_grids_are_kept_exactly(bits: int) -> None:
    model, weights = few_bits(residual(), bits, IMAGES)
    made = with_steps(network(model), LAYERS, [], weights, [IMAGES], {})
    for layer in LAYERS:
        module = made.get_submodule(module_name(layer))
        assert isinstance(module, IntegerWeight)
        codes = torch.from_numpy(weights[layer].codes)
        assert torch.equal(module.codes.abs(), codes.abs())
        assert int(module.codes.abs().max()) <= 2 ** (bits - 1) - 1
    with torch.no_grad():
        assert relative(made(IMAGES), model(IMAGES)) < 0.05


def test_dynamic_layers_round_what_they_get_themselves() -> None:
    model = residual()
    made = with_steps(network(model), [], ["head"], {}, [IMAGES], {})
    assert steps_of(made.graph) == []
    with torch.no_grad():
        assert 0 < relative(made(10 * IMAGES), model(10 * IMAGES)) < 0.02


def test_transposed_convolutions_have_a_scale_for_each_output() -> None:
    torch.manual_seed(0)
    layers = [nn.ConvTranspose2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 33 * 33, 4)]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0, 1.0])[:, None, None])  # type: ignore[operator]
    made = with_steps(network(model), ["0"], [], {}, [IMAGES], {})
    module = made.get_submodule(module_name("0"))
    assert isinstance(module, IntegerWeight)
    assert module.scales.shape == (6,)
    assert module.scales[1] > 50 * module.scales[2]
    with torch.no_grad():
        assert relative(made(IMAGES), model(IMAGES)) < 0.05
