"""torch: the contract in float32, in bfloat16 and compiled; and what it refuses."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from autoprune.target import Target
from tests.deploy.contract import RuntimeContract, inputs, one_cache

__all__ = ["inputs", "one_cache"]


class TestTorch(RuntimeContract):
    target = Target(runtime="torch")
    int8 = False
    int16 = False
    dynamic = True
    needs_torch = True
    linear_bits = MappingProxyType({})


class TestTorchInBfloat16(TestTorch):
    target = Target(runtime="torch", precision="bfloat16")
    dense_bits = 12.5  # the exponents of weights are much alike, and compressed
    tolerance = 5e-2


@pytest.mark.slow
class TestTorchCompiled(TestTorch):
    target = Target(runtime="torch", compile=True)
