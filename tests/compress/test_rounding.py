"""Simulated 8 bits against their definition."""

from __future__ import annotations

import torch
from torch import nn

from autoprune.compress.rounding import round_weight, rounded


def test_each_output_channel_has_255_levels_of_its_own() -> None:
    weight = torch.tensor([[1.0, -0.5, 0.003], [100.0, 50.2, -0.4]])
    got = round_weight(weight, 0)
    steps = weight.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(got, (weight / steps).round() * steps)
    assert (got - weight).abs().le(steps / 2 + 1e-9).all()
    assert got[0, 2] == 0.0
    torch.testing.assert_close(round_weight(weight.T, 1), got.T)


def test_only_the_named_layers_are_rounded_and_the_network_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(4, 3, 8, 8)
    wanted = model(images)
    torch.testing.assert_close(rounded(model, [])(images), wanted)
    copy = rounded(model, ["0", "gone"])
    assert not torch.equal(copy.get_parameter("0.weight"), model.get_parameter("0.weight"))
    assert torch.equal(copy.get_parameter("3.weight"), model.get_parameter("3.weight"))
    assert 0 < float((copy(images) - wanted).detach().abs().max()) < 0.05 * float(wanted.detach().abs().max())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(model(images), wanted)


def test_inputs_are_rounded_over_the_range_of_the_batch() -> None:
    layer = nn.Sequential(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        layer.get_parameter("0.weight").fill_(1.0)
    inputs = torch.linspace(-1, 1, 1001)[:, None]
    got = rounded(layer, ["0"])(inputs)
    # Zero is one of the 256 levels, so that one end of a symmetric range lies half a step beyond the last level.
    assert len(got.unique()) in (255, 256)
    assert float((got - inputs).abs().max()) <= 2 / 255
    assert float(rounded(layer, ["0"])(torch.zeros(3, 1)).abs().max()) == 0.0


def test_zero_stays_zero_in_a_range_that_is_not_symmetric() -> None:
    layer = nn.Sequential(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        layer.get_parameter("0.weight").fill_(1.0)
    inputs = torch.tensor([[-0.3], [0.0], [0.5], [1.0]])
    got = rounded(layer, ["0"])(inputs)
    assert float(got[1]) == 0.0
    assert float((got - inputs).abs().max()) <= 1.3 / 255
