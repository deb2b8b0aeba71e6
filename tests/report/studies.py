"""Studies made up for tests of reports: known figures, names that try to break out of their place."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from autoprune.measure.record import Capability, Executed, Latency, Measurement, RunFigures
from autoprune.naming import StudyPaths
from autoprune.space.groups import Group, Groups, Member
from autoprune.space.recipe import GroupChoice, Recipe
from autoprune.study.records import TrialRecord
from autoprune.study.store import StudyStore

EVIL = '</script><script>alert("1")</script> & $x_1$ | `a`'
NAMES = ("stem", "layer1.0.conv1", "layer2.0.conv1", "head")


@dataclass
class FakeStore:
    """What reports read of a store."""

    paths: StudyPaths
    objectives: tuple[str, ...] = ("accuracy", "latency", "size")
    trials: list[TrialRecord] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)
    model: str = "resnet20"
    sampler_name: str = "tpe"
    spent_s: float = 3725.0

    def records(self) -> list[TrialRecord]:
        return self.trials

    def notes(self) -> dict[str, str]:
        return self.words

    def settings(self) -> dict[str, Any]:
        target = {"runtime": "onnxruntime", "device": "cpu", "threads": 2, "batch": 1}
        return {"model": self.model, "data": "cifar10", "target": target, "seed": 7, "study": self.paths.name}


def run_figures(ratio: float, size: float) -> RunFigures:
    """Figures of a final measurement on a machine without an energy counter."""

    def one(ratio: float, size: float) -> RunFigures:
        return RunFigures(
            memory_bytes=int(44e6 * size),
            cold_start_ms=55 * size,
            throughput_per_s=250 / ratio,
            throughput_batch=8,
            missing={"energy_mj": "there is no counter"},
        )

    return one(ratio, size).model_copy(update={"dense": one(1.0, 1.0)})


def measured(
    value: float, ratio: float, size: float, *, report: bool, lost: tuple[str, ...] = ()
) -> Measurement:
    def score(v: float, n: int) -> Capability:
        return Capability(name="accuracy", value=v, ci=(v - 0.008, min(1.0, v + 0.008)), examples=n)

    latency = Latency(
        latency_ms=4 * ratio, latency_p95_ms=None, dense_ms=4.0, ratio=ratio, ratio_ci=(ratio * 0.97, ratio * 1.03),
        samples=100, noisy=False,
    )  # fmt: skip
    return Measurement(
        search=score(value + 0.005 if report else value, 2000), report=score(value, 10_000) if report else None,
        latency=latency, size_bytes=int(1_100_000 * size), size_ratio=size, params=int(272_474 * size), macs=40_800_000,
        parity_error=1e-6, executed=Executed(
            layers=20, int8_layers=18, asked_int8=20, operators={"Conv": 20}, not_as_asked=lost),
        figures=run_figures(ratio, size) if report else RunFigures(),
    )  # fmt: skip


def recipe(ratio: float) -> Recipe:
    return Recipe(
        groups={n: GroupChoice(ratio=ratio if n != "head" else 0.0, bits=8) for n in NAMES},
        width=4,
    )


def groups() -> Groups:
    def one(name: str, size: int) -> Group:
        member = Member(layer=name, kind="conv", axis="out", index_map=tuple((i,) for i in range(size)))
        return Group(name=name, type="conv", size=size, members=(member,), prunable=True)

    return Groups(groups=tuple(map(one, NAMES, (16, 16, 32, 10))), input_shape=(3, 32, 32))


def make_study(root: Path, *, final: bool = True, evil: bool = False) -> StudyStore:
    """A study of 30 trials with failures; its labels hold markup where ``evil``."""
    root.mkdir(parents=True, exist_ok=True)
    trials = [
        TrialRecord(number=0, state="complete", origin="dense", label="dense", recipe=Recipe(),
                    measurement=measured(0.921, 1.0, 1.0, report=False)),
        TrialRecord(number=1, state="complete", origin="baseline", label="int8", recipe=recipe(0.0),
                    measurement=measured(0.918, 0.62, 0.27, report=False)),
        TrialRecord(number=2, state="complete", origin="baseline", label=EVIL if evil else "uniform 0.50 int8",
                    recipe=recipe(0.5), measurement=measured(0.85, 0.45, 0.12, report=False), train_steps=40),
        TrialRecord(number=3, state="failed", origin="tpe", failure_kind="nan", failure_reason="capability is nan"),
    ]  # fmt: skip
    for i in range(26):
        ratio = 0.2 + 0.02 * i
        value = 0.915 - 0.1 * ((0.8 - ratio) ** 2) - 0.04 * (i % 3)
        trials.append(
            TrialRecord(number=4 + i, state="complete", origin="tpe", recipe=recipe(0.9 - ratio), train_steps=40,
                        measurement=measured(value, ratio, 0.03 + ratio * 0.3, report=False))
        )  # fmt: skip
    if final:
        for parent in (0, 1, 4, 10, 16, 22, 28):
            before = trials[parent]
            assert before.measurement is not None
            lost = ("head",) if parent == 10 else ()
            m = before.measurement
            gain = 0.0 if parent < 4 else 0.004
            trials.append(
                TrialRecord(number=len(trials), state="complete", fidelity="final", origin="final", label=before.label,
                            parent=parent, recipe=before.recipe, train_steps=900 if parent > 3 else 0,
                            measurement=measured(m.search.value - 0.004 + gain, m.latency.ratio, m.size_ratio,
                                                 report=True, lost=lost))
            )  # fmt: skip
    words = {
        "groups": groups().model_dump_json(),
        "search_split_seen": "yes",
        "final_failure:9": "parity: differs",
    }
    store = FakeStore(StudyPaths(root), trials=trials, words=words, model=EVIL if evil else "resnet20")
    host = {"processor": "Test CPU", "usable_cores": 4, "memory_bytes": 16_000_000_000, "flags": ["avx2"]}
    run = {"host": host, "settings": {"budget": "2h"}, "seed": 7}
    store.paths.environment.write_text(json.dumps([run]), encoding="utf-8")
    return cast(StudyStore, store)
