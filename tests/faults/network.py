"""The model file of studies under fault: `--model tests/faults/network.py:build --trust-code`.

Whoever loads the model, in whatever process, gets the quick runtime and timing with it.
"""

from __future__ import annotations

from torch import Tensor, nn

from tests.faults import synthetic

synthetic.install()


def build() -> nn.Module:
    return synthetic.network()


def images() -> dict[str, tuple[Tensor, Tensor]]:
    return synthetic.data()
