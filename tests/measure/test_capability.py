"""Scores, intervals and costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from autoprune.errors import TrialError
from autoprune.measure.capability import score
from autoprune.measure.cost import count_macs, count_params, size_bytes
from autoprune.measure.host import describe_host
from autoprune.measure.stats import wilson_interval
from autoprune.workloads.workload import TOP1, Metric


def test_top1_has_wilson_s_interval() -> None:
    outputs = torch.eye(4)[[0, 1, 2, 2]]
    found = score(outputs, torch.tensor([0, 1, 2, 3]), TOP1)
    assert found.value == pytest.approx(0.75)
    assert found.ci == pytest.approx(wilson_interval(3, 4))
    assert found.examples == 4


def test_a_metric_without_examples_has_no_width() -> None:
    metric = Metric("r2", "", lambda outputs, targets: 0.5, None)
    assert score(torch.zeros(3, 1), torch.zeros(3), metric).ci == (0.5, 0.5)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_score_that_is_not_finite_fails_the_trial(value: float, kind: str) -> None:
    metric = Metric("m", "", lambda outputs, targets: value, None)
    with pytest.raises(TrialError) as caught:
        score(torch.zeros(3, 1), torch.zeros(3), metric)
    assert caught.value.kind == kind


def test_a_mean_has_the_normal_interval() -> None:
    metric = Metric("closeness", "", lambda o, t: float(o.mean()), lambda o, t: o)
    found = score(torch.tensor([0.0, 1.0, 0.5, 0.5]), torch.zeros(4), metric)
    # Standard deviation sqrt(1/6), of the mean half of it.
    half = 1.96 * (1 / 6) ** 0.5 / 2
    assert found.ci == pytest.approx((0.5 - half, 0.5 + half))
    assert score(torch.tensor([0.2, 0.6]), torch.zeros(2), metric).ci == pytest.approx(
        (0.008, 0.792), abs=1e-6
    )
    assert score(torch.tensor([0.25]), torch.zeros(1), metric).ci == (0.25, 0.25)


def test_macs_and_params_of_a_known_network() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16, 5)
    ).eval()
    assert count_macs(model, (3, 4, 4)) == 3 * 8 * 9 * 16 + 8 * 16 * 5
    assert count_params(model) == 3 * 8 * 9 + 8 * 16 * 5 + 5


def test_size_counts_the_data_beside_the_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"1234")
    assert size_bytes(tmp_path / "m.onnx") == 4
    (tmp_path / "m.onnx.data").write_bytes(b"12")
    assert size_bytes(tmp_path / "m.onnx") == 6


def test_the_host_is_plain_data() -> None:
    host = json.loads(json.dumps(describe_host()))
    assert host["usable_cores"] >= 1
    assert host["versions"]["onnxruntime"]
