"""OpenVINO: the contract in float32 and in bfloat16, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from autoprune.deploy.registry import make_runtime
from autoprune.deploy.runtime import Formats
from autoprune.errors import ExportError
from autoprune.target import Target
from tests.deploy.contract import RuntimeContract, few_bits, inputs, one_cache
from tests.deploy.networks import residual

__all__ = ["inputs", "one_cache"]

pytest.importorskip("openvino", reason="openvino is not installed: pip install 'autoprune[openvino]'")


# Integers of other widths are read as int8, which others make float when they load a file.
_READ = MappingProxyType({2: 2, 3: 8, 4: 4, 5: 8, 6: 8, 8: 8})


class TestOpenVino(RuntimeContract):
    target = Target(runtime="openvino")
    linear_bits = _READ


def has_bfloat16() -> bool:
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


@pytest.mark.skipif(not has_bfloat16(), reason="this processor has no bfloat16")
class TestOpenVinoInBfloat16(RuntimeContract):
    target = Target(runtime="openvino", precision="bfloat16")
    linear_bits = _READ
    tolerance = 5e-2


def test_a_float_layer_is_never_in_bfloat16_unasked(inputs: Tensor, tmp_path: Path) -> None:
    """The plug-in's own choice on a processor that has bfloat16."""
    model = residual(64)
    exact, coarse = (Target(runtime="openvino", precision=p) for p in ("float32", "bfloat16"))
    runtime = make_runtime(exact)
    runtime.prepare(model, inputs[:2])
    made = runtime.build(model, tmp_path / "m.onnx", Formats(), [inputs])
    assert made.executed.ran == {"float32": 4}
    assert made.parity_error < 1e-5
    if has_bfloat16():
        outputs = make_runtime(coarse).predict(made.path, [inputs])
        assert not torch.allclose(outputs, runtime.predict(made.path, [inputs]), atol=1e-5)


def test_dynamic_int8_of_single_layers_is_refused(inputs: Tensor, tmp_path: Path) -> None:
    runtime = make_runtime(Target(runtime="openvino"))
    model, weights = few_bits(residual(), 8, inputs)
    runtime.prepare(model, inputs[:2])
    with pytest.raises(ExportError, match="dynamic int8"):
        runtime.build(model, tmp_path / "m.onnx", Formats(dynamic=["head"], weights=weights), [inputs])
