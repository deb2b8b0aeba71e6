"""The ledger of what can be cut: a sample of it in each run, the whole of it marked slow."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

LEDGER = Path(__file__).parents[1] / "studies" / "coverage" / "coverage.py"
# One of each kind of trouble: shuffled channels, heads and embeddings, gates, windows, auxiliary classifiers.
SAMPLE = ("shufflenet_v2_x0_5", "vit_b_32", "mobilenet_v3_small", "swin_t", "googlenet")


@pytest.fixture(scope="module")
def ledger() -> ModuleType:
    found = importlib.util.spec_from_file_location("coverage_ledger", LEDGER)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def check(ledger: ModuleType, record: dict[str, Any]) -> None:
    assert "error" not in record, record
    assert record["prunable"] > 0
    assert ledger.faults(record) == []
    assert all(reason for reason in record["left_alone"].values())
    for seen in record["ratios"].values():
        assert seen["params"] < record["params"]
        assert seen["macs"] < record["macs"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in ("swin_t", "vit_b_32") else n for n in SAMPLE],
)
def test_a_sample_is_cut_exactly_trained_and_exported(ledger: ModuleType, name: str) -> None:
    record = ledger.examine(f"torchvision/{name}")
    check(ledger, record)
    assert record["rewritten"] == (name in ("shufflenet_v2_x0_5", "vit_b_32", "swin_t"))
    if name in ("vit_b_32", "swin_t", "googlenet", "mobilenet_v3_small"):
        assert record["reachable"] == 1.0


def test_the_kinds_of_reasons_leave_names_out(ledger: ModuleType) -> None:
    assert ledger._kind("view in 'stage2.1' (and 3 more)") == ledger._kind("view in 'stage4'")


def test_a_fault_is_told(ledger: ModuleType) -> None:
    seen = {"difference": 0.2, "backward": "", "export": 0.0}
    assert ledger.faults({"name": "a", "ratios": {"0.3": seen}}) == ["ratio 0.3: differs by 0.2"]
    assert ledger.faults({"name": "a", "error": "it died"}) == ["it died"]


@pytest.mark.slow
@pytest.mark.timeout(10_800)
@pytest.mark.parametrize("source", ["torchvision", "timm", "transformers"])
def test_the_whole_ledger(ledger: ModuleType, source: str) -> None:
    pytest.importorskip(source)
    settings = ledger.read_yaml(ledger.HERE / "models.yaml").values
    names = [name for name in ledger.all_names(settings) if name.startswith(source)]
    assert names
    failed = {}
    for name in names:
        record = ledger.run_one(name)
        if "error" in record or ledger.faults(record):
            failed[name] = record.get("error") or ledger.faults(record)
    assert failed == {}
