"""The sensitivity analysis: curves of known numbers, cuts of a known network, interruption and the cache."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import Tensor, nn

from autoprune.compress.criteria import score_group
from autoprune.compress.effects import EffectMeter
from autoprune.compress.surgery import prune
from autoprune.config import StudyConfig, make_config
from autoprune.search import sensitivity
from autoprune.search.bench import discover
from autoprune.search.curves import Analysis, Curve, Cut, Measured, by_sensitivity, curves_of
from autoprune.search.events import Progress, ignore
from autoprune.search.interrupt import Interrupt
from autoprune.space.groups import Groups
from autoprune.workloads.workload import TOP1, Workload, workload_from_objects
from tests.compress.networks import Plain


def curve(name: str, *drops: float, divergence: float = 1.0, criterion: str = "l2", units: int = 10) -> Curve:
    group = Measured(name=name, type="conv", units=units, block="")
    removed = tuple((i + 1) / 10 for i in range(len(drops)))
    divergences = tuple(divergence for _ in drops)
    return Curve(
        group=group,
        criterion=criterion,
        removed=removed,
        drops=drops,
        divergences=divergences,
        block_drop=None,
    )


def test_a_point_is_lost_between_what_was_measured() -> None:
    assert curve("a", 0.0, 0.02).ratio_at() == pytest.approx(0.15)
    assert curve("a", 0.05).ratio_at() == pytest.approx(0.02)
    assert curve("a", -0.01, 0.01).ratio_at() == pytest.approx(0.2)
    assert curve("a", 0.0, 0.009).ratio_at() is None
    assert curve("a", 0.02, 0.0, 0.03).ratio_at() == pytest.approx(0.05), "the first time counts"
    assert curve("a", 0.0, 0.1).ratio_at(0.05) == pytest.approx(0.15)


def test_groups_are_ordered_by_their_best_criterion() -> None:
    fragile, robust = curve("fragile", 0.05, 0.1), curve("robust", 0.0, 0.005, divergence=0.1)
    saved = [curve("saved", 0.5), curve("saved", 0.0, 0.001, divergence=0.2, criterion="activation")]
    found = by_sensitivity([robust, *saved, fragile])
    assert found == by_sensitivity([fragile, *saved[::-1], robust])
    assert [(c.group.name, c.criterion) for c in found] == [
        ("fragile", "l2"),
        ("saved", "activation"),
        ("robust", "l2"),
    ]


def test_curves_hold_what_was_measured_alone() -> None:
    groups = tuple(Measured(name=n, type="conv", units=10, block="block" * (n == "a")) for n in "ab")
    cuts = tuple(
        Cut(group="a", criterion=c, kept=k, accuracy=acc, divergence=1.0 - acc)
        for c, k, acc in (("l2", 3, 0.4), ("l2", 9, 0.8), ("", 0, 0.1))
    )
    analysis = Analysis(
        metric="accuracy", measure="divergence", recover="none", dense=0.91, uncut=0.9, examples=10, ratios=(0.1, 0.7),
        criteria=("l2", "l1"), groups=groups, cuts=cuts, complete=False,
    )  # fmt: skip
    (found,) = curves_of(analysis)
    assert found.removed == pytest.approx((0.1, 0.7))
    assert found.drops == pytest.approx((0.1, 0.5))
    assert found.block_drop == pytest.approx(0.8)


class Block(nn.Module):
    """Two convolutions beside the inputs."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        with torch.no_grad():
            self.conv2.weight.mul_(gain)
            self.conv2.bias.mul_(gain)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv2(torch.relu(self.conv1(x)))
        return y


class Residual(nn.Module):
    """A network that knows the answer already, but for a block that adds ``gain`` times something."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.block = Block(gain)
        self.head = nn.Linear(3, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(3))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.block(x).mean((2, 3)))
        return y


def workload(model: nn.Module) -> tuple[Workload, Groups, StudyConfig]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(800, 3, 8, 8, generator=generator)
    targets = inputs.mean((2, 3)).argmax(1)
    config = make_config(
        {"model": "own", "data": "given", "calibration_examples": 256, "search_examples": 100}
    )
    made = workload_from_objects(model, ((inputs, targets), (inputs, targets)), metric=TOP1, config=config)
    made, groups = discover(made)
    return made, groups, config


def run(
    made: tuple[Workload, Groups, StudyConfig],
    ratios: tuple[float, ...] = (0.25, 0.5),
    criteria: tuple[str, ...] = ("l2",),
    recover: sensitivity.Recover = "none",
    interrupt: Interrupt | None = None,
) -> Analysis:
    return sensitivity.analyse_workload(
        *made, ratios, criteria, recover, ignore, Interrupt() if interrupt is None else interrupt
    )


def test_figures_are_those_of_the_cut_network_itself() -> None:
    torch.manual_seed(0)
    made = workload(Plain().eval())
    found = run(made)
    load, groups, _ = made
    (inputs, targets), *rest = load.data.search.batches(1000)
    assert not rest and found.examples == len(targets)
    with torch.no_grad():
        dense = load.model(inputs)
    assert found.dense == found.uncut == TOP1.score(dense, targets)
    cut = next(c for c in found.cuts if (c.group, c.kept) == ("conv2", 4))
    best = torch.argsort(score_group(load.model, groups.by_name["conv2"], "l2"), descending=True)[:4]
    with torch.no_grad():
        outputs = prune(load.model, groups, {"conv2": tuple(sorted(best.tolist()))}).eval()(inputs)
    assert cut.accuracy == TOP1.score(outputs, targets)
    p, q = dense.softmax(1), outputs.softmax(1)
    assert cut.divergence == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)


def test_every_prunable_group_is_cut_at_every_ratio_by_every_criterion() -> None:
    made = workload(Plain().eval())
    found = run(made, (0.25, 0.5), ("l2", "taylor", "activation"))
    kept = {"conv1": (6, 4), "conv2": (6, 4), "fc1": (7, 5)}
    wanted = [
        (name, criterion, count)
        for name, counts in kept.items()
        for criterion in ("l2", "taylor", "activation")
        for count in counts
    ]
    assert sorted((c.group, c.criterion, c.kept) for c in found.cuts) == sorted(wanted)
    assert found.complete


def test_a_block_is_taken_out_whole() -> None:
    torch.manual_seed(1)
    idle, busy = run(workload(Residual(0.001))), run(workload(Residual(3.0)))
    for found in (idle, busy):
        assert [(c.criterion, c.kept) for c in found.cuts if c.kept == 0] == [("", 0)]
    assert curves_of(idle)[0].block_drop == 0.0
    block = next(c for c in busy.cuts if c.kept == 0)
    assert block.accuracy == 1.0, "without the block the answer is right"
    assert block.divergence > 0.01


def test_closed_form_recovery_brings_outputs_nearer() -> None:
    torch.manual_seed(0)
    model = Plain()
    for _ in range(30):
        model(torch.randn(64, 3, 8, 8))  # statistics that closed form does not change for the uncut network
    made = workload(model.eval())
    plain, recovered = run(made), run(made, recover="closed_form")
    # What reads conv1 sees every example at many places; the classifier would fit 256 examples alone.
    moved = [sum(c.divergence for c in found.cuts if c.group == "conv1") for found in (plain, recovered)]
    assert moved[1] < 0.95 * moved[0]
    assert recovered.uncut == pytest.approx(recovered.dense, abs=0.2)


class After(Interrupt):
    """An interrupt that comes after some cuts."""

    def __init__(self, cuts: int) -> None:
        super().__init__()
        self.left = cuts

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_an_interruption_leaves_what_was_measured_and_the_next_run_completes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = workload(Plain().eval())
    part = run(made, interrupt=After(4))
    assert len(part.cuts) == 4 and not part.complete
    assert {c.group for c in part.cuts} == {"conv1", "conv2", "fc1"}, "every group before the second ratio"
    told: list[Progress] = []
    whole = sensitivity.analyse_workload(*made, (0.25, 0.5), ("l2",), "none", told.append, Interrupt())
    assert whole.complete and len(whole.cuts) == 6
    assert sum("cut " in progress.message for progress in told) == 2
    assert set(part.cuts) <= set(whole.cuts)
    monkeypatch.setattr(EffectMeter, "of_cut", None)
    assert run(made) == whole
    with pytest.raises(TypeError):
        run(made, (0.75,))
    with pytest.raises(TypeError):
        run(made, recover="closed_form")


def test_ctrl_c_ends_after_the_cut_at_hand() -> None:
    def press(progress: Progress) -> None:
        if progress.message.startswith("cut 2 "):
            os.kill(os.getpid(), signal.SIGINT)

    interrupt = Interrupt()
    found = sensitivity.analyse_workload(
        *workload(Plain().eval()), (0.25, 0.5), ("l2",), "none", press, interrupt
    )
    assert interrupt.requested
    assert len(found.cuts) == 2 and not found.complete


def test_the_report_split_is_never_read() -> None:
    made = workload(Plain().eval())
    split = made[0].data.report.unseal()

    def refuse(*_: object) -> None:
        raise AssertionError("the report split was read")

    split.batches = refuse  # type: ignore[method-assign,assignment]
    assert run(made).complete
