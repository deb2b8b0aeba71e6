"""What `doctor` finds: each runtime tried at each bit-width, in words."""

from __future__ import annotations

import pytest

from autoprune.cli.doctor import _probe_targets
from autoprune.deploy.probe import Probe, probe
from autoprune.deploy.saturation import int8_bits
from autoprune.target import RUNTIMES, RuntimeFacts, Target


@pytest.mark.parametrize(
    ("target", "note"),
    [
        (Target(), "32 bit: 2 in float32; 8 bit: 2 in int8"),
        (
            Target(runtime="torch"),
            "32 bit: 2 in float32; 8 bit: 1 in float32, 1 in int8; int8 in linear layers alone",
        ),
    ],
)
def test_what_runs_is_found_by_trying(target: Target, note: str) -> None:
    if int8_bits(target) < 8:
        note += "; weights of int8 have 7 of 8 bits, since its kernels add in 16 bits here"
    assert probe(target) == Probe(usable=True, bits=(32, 8), note=note)


def test_a_device_that_is_not_here_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = probe(Target(runtime="torch", device="cuda"))
    assert (found.usable, found.bits) == (False, ())
    assert found.note.endswith("no NVIDIA GPU can be used here")


def test_every_target_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = RuntimeFacts("no_such_module", "pip install 'autoprune[executorch]'", "model.pte", "")
    monkeypatch.setitem(RUNTIMES, "executorch", absent)
    monkeypatch.setattr(
        "autoprune.deploy.probe.probe", lambda target: Probe(True, (32,), f"tried {target.spec}")
    )
    found = {line["name"]: line for line in _probe_targets()}
    assert found["executorch"] == {
        "name": "executorch",
        "usable": False,
        "bits": [],
        "note": "pip install 'autoprune[executorch]'",
    }
    assert found["onnxruntime"]["note"] == "tried onnxruntime"
    torchs = ["torch", "torch:bfloat16", "torch:cuda", "torch:cuda:bfloat16", "torch:cuda:float16"]
    assert [name for name in found if name.startswith("torch")] == torchs
    assert found["torch:cuda:float16"]["bits"] == [32]
    monkeypatch.setattr("autoprune.deploy.probe.probe", lambda target: Probe(target.device == "cpu", (), ""))
    assert [line["name"] for line in _probe_targets() if line["name"].startswith("torch")] == torchs[:3]
