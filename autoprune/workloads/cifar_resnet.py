"""Residual networks for 32 x 32 images [He2016]_, section 4.2, with the parameter-free shortcut A.

.. [He2016] He, Zhang, Ren, Sun. Deep residual learning for image recognition. CVPR 2016.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut.

    Args:
        inputs: Channels that come in.
        channels: Channels that go out.
        stride: 2 halves the picture.
    """

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, inputs, h, w)`` to ``(n, channels, h / stride, w / stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.padding:
            # Option A: subsampling, and channels of zeros on both sides; it has no weights.
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """A network of three stages with 16, 32 and 64 channels.

    Args:
        blocks: Blocks in one stage; the depth is ``6 * blocks + 2``.
        num_classes: Outputs.
    """

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(n, 3, h, w)`` to scores ``(n, num_classes)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.adaptive_avg_pool2d(out, 1).flatten(1)
        return self.linear(out)  # type: ignore[no-any-return]


def _stage(inputs: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def cifar_resnet(name: str, num_classes: int = 10) -> CifarResNet:
    """Build ``cifar_resnet20``, ``32``, ``44``, ``56`` or ``110`` with random weights."""
    return CifarResNet((int(name.removeprefix("cifar_resnet")) - 2) // 6, num_classes)
