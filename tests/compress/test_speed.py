"""The memory layout that a network trains in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoprune.compress.speed import memory_format


class Flattening(nn.Module):
    """Flattens its feature maps by ``view``, as older networks do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        z: Tensor = self.head(y.view(len(y), -1))
        return z


def images() -> Tensor:
    return torch.zeros(2, 3, 8, 8)


def test_a_network_keeps_the_layout_in_which_it_runs() -> None:
    model = Flattening(32)
    assert memory_format(model, images) is torch.contiguous_format
    assert model.conv.weight.is_contiguous()
    flat = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(32 * 36, 4))
    assert memory_format(flat, images) is torch.channels_last


def test_narrow_batchnorms_and_networks_without_convolutions_ask_for_no_example() -> None:
    def refuse() -> Tensor:
        raise AssertionError

    narrow = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert memory_format(narrow, refuse) is torch.contiguous_format
    assert memory_format(nn.Linear(3, 4), refuse) is torch.contiguous_format
