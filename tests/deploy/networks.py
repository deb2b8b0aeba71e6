"""Small networks for deployment tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two residual blocks with BatchNorm, pooling and a linear head."""

    def __init__(self, inner: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.one = nn.Conv2d(16, inner, 3, padding=1, bias=False)
        self.one_norm = nn.BatchNorm2d(inner)
        self.two = nn.Conv2d(inner, 16, 3, padding=1, bias=False)
        self.two_norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.one_norm(self.one(x)))
        x = F.relu(x + self.two_norm(self.two(y)))
        outputs: Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 4), 1))
        return outputs


def residual(inner: int = 16, seed: int = 0) -> Residual:
    """Return a network in eval mode whose BatchNorms are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    model = Residual(inner).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.3, 0.3, generator=generator)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2.0, generator=generator)  # type: ignore[union-attr]
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.3, 0.3, generator=generator)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.normal_(0, 0.1, generator=generator)
    return model


LAYERS = ["stem", "one", "two", "head"]
