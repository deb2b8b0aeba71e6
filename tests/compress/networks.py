"""Small networks with known couplings, and a split that makes its own batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.space.groups import Groups


class Plain(nn.Module):
    """Two convolutions with BatchNorm and a classifier over 4 x 4 places."""

    def __init__(self, channels: int = 8, *, norm: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, stride=2, bias=bias)
        self.bn2 = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.fc1 = nn.Linear(16 * channels, 10)
        self.fc2 = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        y: Tensor = self.fc2(F.relu(self.fc1(self.pool(x).flatten(1))))
        return y


class OptionA(nn.Module):
    """A residual block whose shortcut pads channels by a constant (He 2016, option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv2(F.relu(self.bn1(self.conv1(x))))
        y = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        z: Tensor = self.head(y.mean((2, 3)))
        return z


class Mixed(nn.Module):
    """Concatenation, a grouped and a depthwise convolution, a layer that is used twice, and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 1)
        self.right = nn.Conv2d(3, 4, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 16, 3, padding=1, groups=4)
        self.twice = nn.Conv2d(16, 16, 1)
        self.unused = nn.Conv2d(16, 5, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = F.relu(self.grouped(F.relu(self.depthwise(x))))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class Split:
    """Batches that depend on the step and seed alone; the class is where the input is brightest."""

    def training_batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return batch ``step``."""
        generator = torch.Generator().manual_seed(seed * 1000 + step)
        inputs = torch.randn(size, 3, 8, 8, generator=generator)
        return inputs, inputs.mean((2, 3)).argmax(1)


def half(groups: Groups, *names: str) -> dict[str, tuple[int, ...]]:
    """Return a plan that keeps every other unit of the named groups, or of all prunable ones."""
    chosen = names or tuple(group.name for group in groups.prunable)
    return {name: tuple(range(0, groups.by_name[name].size, 2)) for name in chosen}
