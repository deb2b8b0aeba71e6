"""Variants of final networks in fewer bits: which there are, and which are worth a place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autoprune.compress.pipeline import Compressed
from autoprune.deploy.runtime import Artifact
from autoprune.errors import TrialError
from autoprune.measure.record import Capability, Executed
from autoprune.search import variants as module
from autoprune.search.points import FinalPoint
from autoprune.search.variants import Variants, narrower
from autoprune.space.quantization import Quantization
from autoprune.space.recipe import GroupChoice, Recipe
from autoprune.space.search_space import SearchSpace
from autoprune.study.records import TrialRecord
from tests.search.fakes import make_groups, make_measurement

GROUPS = make_groups((32, 64))
SPACE = SearchSpace(bits=(2, 4, 8, 32))


def recipe(*bits: Any, **more: Any) -> Recipe:
    names = ("conv0", "conv1", "head")
    return Recipe(
        groups={n: GroupChoice(ratio=0.0, bits=b) for n, b in zip(names, bits, strict=True)}, **more
    )


def bits_of(made: Recipe) -> tuple[int, ...]:
    return tuple(made.choice(g.name).bits for g in GROUPS.groups)


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ((8, 8, 8), [(4, (4, 4, 4)), (2, (2, 2, 2))]),
        ((8, 32, 4), [(4, (4, 32, 4)), (2, (2, 32, 2))]),
        ((4, 4, 2), [(2, (2, 2, 2))]),
        ((2, 2, 32), []),
        ((32, 32, 32), []),
        ((16, 32, 32), []),
    ],
)
def test_integers_come_down_to_each_smaller_width_and_floats_stay(
    own: tuple[int, ...], found: list[tuple[int, tuple[int, ...]]]
) -> None:
    made = narrower(recipe(*own), GROUPS, SPACE)
    assert [(width, bits_of(each)) for width, each in made] == found


def test_a_group_that_may_not_have_so_few_bits_stays() -> None:
    space = SearchSpace.model_validate({"bits": [4, 8], "overrides": [{"groups": "head", "bits": [8]}]})
    assert [bits_of(each) for _, each in narrower(recipe(8, 8, 8), GROUPS, space)] == [(4, 4, 8)]


def test_a_network_that_was_trained_with_its_integers_has_none() -> None:
    trained = recipe(8, 8, 8, quantization=Quantization(aware=0.5))
    assert trained.trains_integers
    assert list(narrower(trained, GROUPS, SPACE)) == []
    # In so many bits it was trained in float.
    floats = recipe(8, 8, 8, quantization=Quantization(aware=0.5, aware_bits=4))
    assert not floats.trains_integers
    assert len(list(narrower(floats, GROUPS, SPACE))) == 2


def capability(value: float) -> Capability:
    return Capability(name="accuracy", value=value, ci=(value, value), examples=100)


class Scene:
    """A bench on which a recipe's bits decide accuracy and bytes."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracy: dict[int, float]) -> None:
        self.folder = tmp_path
        self.accuracy = accuracy
        self.tried: list[int] = []
        self.made: list[tuple[int, str]] = []
        self.room = 10
        self.groups = GROUPS
        self.workload = SimpleNamespace(data=SimpleNamespace(search=None))
        self.driver = SimpleNamespace(paths=SimpleNamespace(artifacts=tmp_path))
        monkeypatch.setattr(
            module, "evaluate", lambda _, artifact, __: capability(accuracy[artifact.parity_error])
        )

    def deploy(self, _: object, chosen: Recipe, folder: Path) -> Artifact:
        width = max(bits_of(chosen))
        if width not in self.accuracy:
            raise TrialError("export", "no kernel")
        self.tried.append(width)
        path = folder / "model.onnx"
        path.write_bytes(b"x" * 100 * width)
        return Artifact(path, Executed(layers=1, int8_layers=0, asked_int8=0, operators={}), width)

    def make(self, record: TrialRecord, compressed: Compressed, own: Recipe, variant: str) -> FinalPoint:
        self.made.append((record.number, variant))
        return self.point(record.number, max(bits_of(own)), self.accuracy[max(bits_of(own))], variant)

    def point(self, number: int, width: int, value: float, variant: str = "") -> FinalPoint:
        path = self.folder / f"{number}{variant}.onnx"
        path.write_bytes(b"x" * 100 * width)
        own = recipe(width, width, width)
        record = TrialRecord(
            number=number, state="complete", recipe=own, measurement=make_measurement(own, GROUPS)
        )
        artifact = Artifact(path, Executed(layers=1, int8_layers=0, asked_int8=0, operators={}), 0.0)
        network: Any = SimpleNamespace(model=None)
        return FinalPoint(
            record, own, network, artifact, capability(value), capability(value), variant=variant
        )

    def found(self, points: list[FinalPoint]) -> list[tuple[int, str]]:
        bench: Any = self
        space = SearchSpace(bits=(2, 4, 8))
        Variants(bench, bench, space, lambda count: count < self.room).of(points)
        return self.made


def test_fewer_bits_that_nothing_beats_get_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, {4: 0.89, 2: 0.88})
    assert scene.found([scene.point(1, 8, 0.9)]) == [(1, "bits4"), (1, "bits2")]


def test_a_variant_that_another_point_beats_gets_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch, {4: 0.85, 2: 0.84})
    # As small as the other network's variant would be, and better.
    points = [scene.point(1, 8, 0.9), scene.point(2, 4, 0.88)]
    assert scene.found(points) == [(2, "bits2")]


def test_after_a_large_loss_no_fewer_bits_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, {4: 0.80, 2: 0.79})
    assert scene.found([scene.point(1, 8, 0.9)]) == [(1, "bits4")]
    assert scene.tried == [4]


def test_networks_take_turns_until_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, {4: 0.89, 2: 0.885})
    scene.room = 4
    points = [scene.point(1, 8, 0.9), scene.point(2, 8, 0.9)]
    # Equal ones are one; the first network's turn for 2 bits is the last that fits.
    assert scene.found(points) == [(1, "bits4"), (1, "bits2")]


def test_a_variant_that_cannot_be_built_ends_its_network_s_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch, {2: 0.88})
    assert scene.found([scene.point(1, 8, 0.9), scene.point(2, 4, 0.89)]) == [(2, "bits2")]
