"""Truth tables: what follows from known times, where they are kept, and two entries measured in earnest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.deploy.registry import make_runtime
from autoprune.deploy.runtime import Artifact, Formats
from autoprune.errors import ExportError, TrialError
from autoprune.measure import probes, truth, truth_table
from autoprune.measure.host import describe_host
from autoprune.measure.latency import LatencyProtocol
from autoprune.measure.probes import (
    INT8,
    OPERATORS,
    SPARSE,
    Asked,
    Operator,
    formats_for,
    in_format,
    narrowed,
)
from autoprune.measure.record import Latency
from autoprune.measure.truth import measure_truth
from autoprune.measure.truth_table import (
    TruthEntry,
    TruthTable,
    WidthTime,
    machine_of,
    read_table,
    step_of,
    table_path,
    tables_here,
    write_table,
)
from autoprune.target import Target

TINY = LatencyProtocol(processes=1, sessions=2, rounds=3, block_s=0.001, warmup_s=0.0, limit_s=0.1, repeats=0)
CHANNELS = (48, 56, 60, 63, 64, 68, 72, 80)


def entry(**changes: Any) -> TruthEntry:
    values: dict[str, Any] = {
        "operator": "conv", "kind": "conv", "format": "int8", "bits": 8, "activation_bits": 8, "channels": 64,
        "ran": {"int8": 3}, "real": True, "ratio": 0.5, "ratio_ci": (0.4, 0.6),
    }  # fmt: skip
    return TruthEntry(**{**values, **changes})


def table(target: Target = Target(), **changes: Any) -> TruthTable:  # noqa: B008
    values = {"target": target.spec, "machine": machine_of(target), "measured": "2026-11-26T12:00:00+00:00"}
    return TruthTable(**{**values, **changes})


# -- what follows from times -----------------------------------------------------------------


def test_verdicts_are_those_of_intervals() -> None:
    assert entry(ratio_ci=(0.4, 0.99)).verdict == "faster"
    assert entry(ratio_ci=(1.01, 1.2)).verdict == "slower"
    assert entry(ratio_ci=(0.9, 1.0)).verdict == "no difference"
    assert entry(ratio=None, ratio_ci=None, refused="no").verdict is None


def test_what_is_only_stored_gets_no_credit_however_lucky_its_interval_is() -> None:
    assert entry().is_credited
    assert not entry(real=False).is_credited
    assert not entry(ratio_ci=(0.9, 1.1)).is_credited


@pytest.mark.parametrize("step", [16, 8, 4])
def test_the_step_of_kernels_is_found(step: int) -> None:
    def time(channels: int) -> float:
        return 0.3 + 0.7 * (-(-channels // step) * step / 80) ** 2

    assert step_of({channels: time(channels) for channels in CHANNELS}) == step


def test_without_steps_each_channel_has_its_price() -> None:
    assert step_of({channels: float(channels) for channels in CHANNELS}) == 1
    assert step_of({channels: 40.0 + channels for channels in CHANNELS}) == 1
    assert step_of({}) == 1


def test_counts_that_are_slower_than_the_next_multiple_do_not_hide_those_that_are_faster() -> None:
    times = {c: float(-(-c // 4) * 4) for c in CHANNELS}
    times[63] = 200.0
    assert step_of(times) == 4


def test_the_width_costs_nothing_in_any_convolution() -> None:
    def times(operator: str, kind: str, step: int) -> list[WidthTime]:
        return [
            WidthTime.model_validate(
                {"operator": operator, "kind": kind, "format": "float", "channels": c,
                 "ratio": -(-c // step) * step / 80, "ratio_ci": (0.1, 2.0)}
            )
            for c in CHANNELS
        ]  # fmt: skip

    both = table(widths=(*times("3x3", "conv", 16), *times("1x1", "conv", 8), *times("linear", "linear", 4)))
    assert both.steps() == {("3x3", "float"): 16, ("1x1", "float"): 8, ("linear", "float"): 4}
    assert both.width == 8
    assert table(widths=times("linear", "linear", 4)).width == 4
    assert table().width is None


def test_bits_that_run_as_more_bits_do_are_told_so() -> None:
    eight, four = entry(), entry(format="int8, 4 bit weights", bits=4)
    stored = entry(format="4 bit weights", bits=4, activation_bits=32, ran={"float32": 3}, real=False)
    halves = entry(format="float16 weights", bits=16, activation_bits=32, ran={"float32": 3}, real=False)
    elsewhere = entry(operator="linear", bits=2, ran={"2 bit weights": 3})
    both = table(entries=(eight, four, stored, halves, elsewhere))
    assert [both.same_as(each) for each in both.entries] == [None, eight, None, None, None]


# -- where it is kept ------------------------------------------------------------------------


def test_a_table_is_found_again_for_its_target_and_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    target, other = Target(), Target(runtime="openvino")
    kept = table(entries=(entry(),))
    write_table(kept, target)
    write_table(table(other), other)
    assert read_table(target) == kept
    assert read_table(Target(batch=8)) is None
    assert [each.target for each in tables_here()] == ["onnxruntime", "openvino"]
    host = describe_host()
    for elsewhere in (
        {**host, "processor": "another"},
        {**host, "versions": {**host["versions"], "onnxruntime": "9.9"}},
    ):
        monkeypatch.setattr(truth_table, "describe_host", lambda found=elsewhere: found)
        assert read_table(target) is None
        assert "onnxruntime" not in [each.target for each in tables_here()]


def test_a_damaged_table_is_ignored_and_told(caplog: pytest.LogCaptureFixture) -> None:
    write_table(table(), Target())
    table_path(Target()).write_text('{"target": ')
    assert read_table(Target()) is None
    assert str(table_path(Target())) in caplog.text
    assert tables_here() == []


def test_an_operator_replaces_what_was_known_of_it() -> None:
    before = table(entries=(entry(operator="a"), entry(operator="b")))
    after = before.with_operator("a", entries=[entry(operator="a", ratio=0.7)])
    assert [(e.operator, e.ratio) for e in after.entries] == [("b", 0.5), ("a", 0.7)]
    assert before.with_operator("a") == before  # what could not be timed takes nothing away


# -- probes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: str(operator.name))
def test_probes_compute_in_every_format(operator: Operator) -> None:
    channels = operator.channels // 8
    model = operator.make(channels).eval()
    inputs = torch.randn(2, *operator.shape(channels))
    wanted = model(inputs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for asked in formats_for(operator, everything=True):
        made, formats = in_format(model, asked)
        assert made(inputs).shape == wanted.shape
        named = {*formats.int8, *formats.dynamic, *formats.weights}
        assert named == (set() if asked.sparsity else set(probes.layers_of(model))), asked.name
        for name, stored in formats.weights.items():
            if stored.codes is not None:
                assert abs(stored.codes).max() == 2 ** (asked.bits - 1) - 1
                weight = made.get_submodule(name).weight
                assert isinstance(weight, Tensor) and len(set(weight[0].flatten().tolist())) <= 2**asked.bits
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_zeros_are_as_many_and_where_a_format_says() -> None:
    model = nn.Sequential(nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(32, 8))
    shares = {}
    for asked in SPARSE:
        made, formats = in_format(model, asked)
        assert formats.packed
        weights = [made[0].weight, made[2].weight]  # type: ignore[index]
        shares[asked.name] = [float((w == 0).float().mean()) for w in weights]
        if asked.pattern == "2:4":
            runs = weights[0].movedim(1, -1).reshape(-1, 4)
            assert ((runs == 0).sum(1) == 2).all()
    assert shares["sparse 0.5"] == shares["sparse 2:4"] == [0.5, 0.5]
    assert shares["sparse 0.9"] == pytest.approx([0.9, 0.9], abs=0.02)


def test_networks_of_all_widths_take_the_same_inputs_and_make_the_same_outputs() -> None:
    for operator in OPERATORS:
        shapes = {
            narrowed(operator, c)(torch.randn(2, *operator.shape(max(operator.widths)))).shape
            for c in operator.widths
        }
        assert len(shapes) == bool(operator.widths)


# -- measured --------------------------------------------------------------------------------


def small(name: str = "conv", widths: tuple[int, ...] = ()) -> Operator:
    return Operator(name, "conv", 16, probes._convolutions(3, lambda c: 1), lambda c: (c, 8, 8), widths)


@pytest.fixture
def two_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "formats_for", lambda operator, everything: [INT8, Asked("4 bit weights", 4)])
    monkeypatch.setattr(truth, "PROTOCOLS", {"quick": TINY, "full": TINY})


@pytest.mark.usefixtures("two_formats")
def test_two_formats_are_measured_on_onnxruntime() -> None:
    said: list[str] = []
    kept: list[TruthTable] = []
    found = measure_truth(Target(), operators=[small(widths=(14, 15, 16))], say=said.append, keep=kept.append)
    eight, four = found.entries
    assert (eight.format, eight.ran, eight.real) == ("int8", {"int8": 3}, True)
    assert (four.format, four.ran, four.real) == ("4 bit weights", {"float32": 3}, False)
    for each in (eight, four):
        assert each.ratio is not None and each.ratio_ci is not None and each.size_ratio is not None
        assert each.ratio_ci[0] <= each.ratio <= each.ratio_ci[1]
        assert 0 < each.size_ratio < 1
    assert {(w.format, w.channels) for w in found.widths} == {
        (f, c) for f in ("float", "int8") for c in (14, 15, 16)
    }
    assert kept == [found]
    assert said == ["conv (1 of 1)"]
    assert not found.complete  # the other operators are not in it


@pytest.mark.usefixtures("two_formats")
def test_what_was_measured_before_an_interruption_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def stub(built: Sequence[Any], *rest: Any) -> list[Any]:
        timed.append("")
        if len(timed) == 2:
            raise KeyboardInterrupt
        if len(timed) == 4:
            raise TrialError("latency", "it broke")
        return [Latency(latency_ms=1.0, latency_p95_ms=None, dense_ms=1.0, ratio=0.5, ratio_ci=(0.4, 0.6),
                              samples=9, noisy=False) for _ in built]  # fmt: skip

    monkeypatch.setattr(truth, "_timed", stub)
    with pytest.raises(KeyboardInterrupt):
        measure_truth(Target(), operators=[small("a"), small("b")], keep=lambda t: write_table(t, Target()))
    assert {e.operator for e in (read_table(Target()) or table()).entries} == {"a"}
    said: list[str] = []
    again = measure_truth(Target(), operators=[small("b"), small("c")], say=said.append)
    assert [e.operator for e in again.entries] == ["a", "a", "b", "b"]
    assert said[-1] == "c could not be timed: it broke"


@pytest.mark.usefixtures("two_formats")
def test_what_a_later_measurement_did_not_come_to_keeps_its_date_and_its_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = probes.OPERATORS[:2]
    old = table(
        entries=tuple(entry(operator=each.name) for each in (first, second)), noisy=(first.name, second.name)
    )
    monkeypatch.setattr(truth, "read_table", lambda target: old)
    monkeypatch.setattr(truth, "_entries", lambda operator, *rest: ([entry(operator=operator.name)], False))
    monkeypatch.setattr(truth, "_widths", lambda *rest: ())
    made = truth.measure_truth(Target(), "full", operators=[first])
    assert made.noisy == (second.name,)
    assert made.earlier == {second.name: old.measured}


def test_a_format_that_a_runtime_refuses_is_timed_as_it_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoIntegers:
        def __init__(self, target: Target) -> None:
            self.inner = make_runtime(target)
            self.target = target
            self.prepare = self.inner.prepare

        def build(
            self, model: nn.Module, path: Path, formats: Formats, calibration: Sequence[Tensor]
        ) -> Artifact:
            if formats.int8 or formats.dynamic:
                raise ExportError("no int8 here\nat all")
            return self.inner.build(model, path, formats, calibration)

    monkeypatch.setattr(truth, "make_runtime", NoIntegers)
    monkeypatch.setattr(truth, "formats_for", lambda operator, everything: [INT8, probes.DYNAMIC])
    eight, dynamic = measure_truth(Target(), operators=[small()]).entries
    assert (eight.ran, eight.real, eight.refused) == ({"float32": 3}, False, "no int8 here")
    assert eight.ratio is not None
    assert (dynamic.ratio, dynamic.refused) == (None, "no int8 here")
