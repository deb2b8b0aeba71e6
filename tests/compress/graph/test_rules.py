"""What the rules find in small networks whose couplings are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.compress.graph.capture import capture
from autoprune.compress.graph.layer_rules import LAYER_RULES
from autoprune.compress.graph.propagate import Propagation
from autoprune.compress.graph.shape_rules import SHAPE_RULES


def walked(model: nn.Module, *inputs: Tensor) -> Propagation:
    return Propagation(capture(model, inputs), {**LAYER_RULES, **SHAPE_RULES})


def made_by(found: Propagation, layer: str) -> list[list[int]]:
    """Return the units that each output of a layer needs."""
    units: list[list[int]] = found.units.resolved(found.sides[layer, "out"]).tolist()
    return units


class Between(nn.Module):
    """A function between two linear layers, of 12 and 12 or fewer channels."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 12) -> None:
        super().__init__()
        self.function = function
        self.first = nn.Linear(5, 12)
        self.second = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.function(self.first(x)))
        return y


def reasons(found: Propagation, layer: str = "first") -> set[str]:
    return {found.units.reason(unit) for row in made_by(found, layer) for unit in row}


@pytest.mark.parametrize(
    ("function", "width", "distinct"),
    [
        (torch.relu, 12, 12),
        (lambda x: F.silu(x) * torch.sigmoid(x), 12, 12),
        (lambda x: torch.cat([x, x], 1), 24, 12),
        (lambda x: x[:, :4] + x[:, 4:8], 4, 8),  # the last four are read by nobody
        (lambda x: F.glu(x, 1), 6, 6),
        (lambda x: x.chunk(3, 1)[0] + x.chunk(3, 1)[2], 4, 8),
        (lambda x: x.roll(3, 1) + x, 12, 3),  # every fourth place ends up together
        (lambda x: x.flip(1) * 2.0, 12, 12),
        (lambda x: torch.stack([x, x], 2).sum(2), 12, 12),
        (lambda x: x.repeat_interleave(2, dim=1), 24, 12),
        (lambda x: x.repeat(1, 2), 24, 12),
        (lambda x: F.pad(x, (2, 2)), 16, 12),
        (lambda x: x.unsqueeze(2).expand(-1, -1, 3).mean(2), 12, 12),
    ],
)
def test_couplings(function: Callable[[Tensor], Tensor], width: int, distinct: int) -> None:
    found = walked(Between(function, width), torch.randn(2, 5))
    assert len({tuple(row) for row in made_by(found, "first")}) == distinct
    assert reasons(found) == {""}


@pytest.mark.parametrize(
    ("function", "width", "why"),
    [
        (lambda x: x.softmax(1), 12, "softmax"),
        (lambda x: x.cumsum(1), 12, "cumsum"),
        (lambda x: x.sort(1).values, 12, "sort"),
        (lambda x: x + torch.arange(12.0), 12, "add"),
        (lambda x: x[:, torch.tensor([0, 5, 5])], 3, "index"),
        (lambda x: torch.fft.fft(x).real, 12, "fft"),
    ],
)
def test_what_cannot_be_cut_says_why(function: Callable[[Tensor], Tensor], width: int, why: str) -> None:
    found = walked(Between(function, width), torch.randn(2, 5))
    assert any(why in reason for reason in reasons(found))


class Attention(nn.Module):
    """Grouped-query attention: 4 heads of 3 that share 2 keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)
        self.out = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, places = x.shape[:2]
        query = self.query(x).view(n, places, 4, 3).transpose(1, 2)
        key, value = (
            layer(x)
            .view(n, places, 2, 3)
            .transpose(1, 2)[:, :, None]
            .expand(n, 2, 2, places, 3)
            .reshape(n, 4, places, 3)
            for layer in (self.key, self.value)
        )
        mixed = (query @ key.transpose(-2, -1) * 3**-0.5).softmax(-1) @ value
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(n, places, 12))
        return y


def test_heads_that_share_keys_go_together() -> None:
    found = walked(Attention(), torch.randn(2, 7, 8))
    query, key, value = (
        found.units.resolved(found.sides[layer, "out"]) for layer in ("query", "key", "value")
    )
    # Two shared heads; three places for queries and keys, three others for values.
    assert {len(set(column)) for column in query.T.tolist()} == {2, 3}
    assert query[0, 0] == query[3, 0] != query[6, 0]
    assert set(query.ravel().tolist()) == set(key.ravel().tolist())
    assert len(set(value.ravel().tolist()) & set(key.ravel().tolist())) == 2
    assert reasons(found, "query") == reasons(found, "value") == {""}
    assert found.units.resolved(found.sides["out", "in"]).tolist() == [
        [v[0], v[1]] for head in (0, 0, 1, 1) for v in value[3 * head : 3 * head + 3].tolist()
    ]


class Windows(nn.Module):
    """Windows of 2 x 2 places, whose channels are put side by side as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.norm = nn.LayerNorm(6)
        self.inside = nn.Linear(6, 6)
        self.merge = nn.Linear(24, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        n, high, wide, width = x.shape
        y = self.norm(x).view(n, high // 2, 2, wide // 2, 2, width).transpose(2, 3).reshape(-1, 4, width)
        y = (
            self.inside(y)
            .view(n, high // 2, wide // 2, 2, 2, width)
            .transpose(2, 3)
            .reshape(n, high, wide, width)
        )
        x = x + y
        x = torch.cat([x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]], -1)
        merged: Tensor = self.merge(x)
        return merged.mean((1, 2))


def test_windows_keep_channels_whole() -> None:
    found = walked(Windows(), torch.randn(2, 3, 4, 4))
    stem = found.units.resolved(found.sides["stem", "out"])
    assert stem.shape == (6, 1)
    assert found.units.resolved(found.sides["inside", "out"]).tolist() == stem.tolist()
    assert found.units.resolved(found.sides["norm", "out"]).tolist() == stem.tolist()
    assert found.units.resolved(found.sides["merge", "in"]).tolist() == 4 * stem.tolist()
    assert reasons(found, "stem") == {""}


def test_places_that_are_made_of_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 4, 1))
    found = walked(model, torch.randn(2, 3, 4, 4))
    made = made_by(found, "0")
    assert made[:4] == [made[0]] * 4
    assert made[4:] == [made[4]] * 4
    assert made[0] != made[4]
