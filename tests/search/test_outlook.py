"""What the records so far let expect of the final recovery."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoprune.config import Budget, StudyConfig
from autoprune.search.fidelity import INHERITED
from autoprune.search.jobs import Job
from autoprune.search.timings import Timings
from autoprune.space.recipe import Recipe, Recovery, uniform_recipe
from autoprune.study.front import volume_of
from tests.search.fakes import Scene, make_scene


@pytest.fixture(autouse=True)
def studies_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(tmp_path / "studies"))


def searched(name: str, **fields: object) -> Scene:
    """Return a study of the dense network, int8 alone and four nested networks."""
    config = StudyConfig.model_validate(
        {"model": "fake", "data": "fake", "study": name, "sampler": "auto", **fields}
    )
    scene = make_scene(name, budget=Budget(seconds=600.0), config=config)
    groups = scene.driver.groups
    scene.driver.trial(Job(Recipe(), "dense", "dense"))
    scene.driver.trial(Job(uniform_recipe(groups, 0.0, 8), "baseline", "int8"))
    for ratio in (0.25, 0.4, 0.5, 0.6):
        recipe = uniform_recipe(groups, ratio, 8, recovery=Recovery(finetune_steps=50))
        scene.driver.trial(Job(recipe, "solver"))
    scene.driver.bench.timings.step.append(0.05)
    return scene


def test_more_training_promises_more_and_a_line_adds_up() -> None:
    scene = searched("line")
    networks = scene.driver.outlook.networks(4)
    assert len(networks) == 4
    promised = [scene.driver.outlook.expected_volume(networks, slot_s) for slot_s in (2.0, 20.0, 200.0)]
    assert promised == sorted(promised)
    assert promised[-1] > promised[0]
    alone = searched("alone", auto={"lineage": False})
    assert alone.driver.outlook.expected_volume(networks, 20.0) < promised[1]


def test_a_step_behind_the_cut_counts_for_less_than_an_own_one(monkeypatch: pytest.MonkeyPatch) -> None:
    outlook = searched("share").driver.outlook
    networks = outlook.networks(4)
    promised = []
    for share in (0.0, INHERITED, 1.0):
        monkeypatch.setattr("autoprune.search.outlook.INHERITED", share)
        promised.append(outlook.expected_volume(networks, 20.0))
    assert promised[0] < promised[1] < promised[2]


def test_where_nothing_is_trained_nothing_is_taken_back(tmp_path: Path) -> None:
    space = tmp_path / "untrained.yaml"
    space.write_text("recovery: {finetune_steps: 0}\n", encoding="utf-8")
    scene = searched("untrained", space=str(space))
    outlook = scene.driver.outlook
    networks = outlook.networks(4)
    assert outlook.expected_volume(networks, 1e6) == outlook.expected_volume(networks, 0.0)
    measured = [r.measurement for r in scene.driver.records if r.measurement]
    dense = outlook.dense_measurement().search.value
    best = volume_of(measured, scene.store.objectives, dense, on_search=True)
    # Severities, by which is expected, are a little more than the losses themselves.
    assert outlook.expected_volume(networks, 1e6) == pytest.approx(best, rel=0.05)


def test_more_networks_promise_more_at_equal_training() -> None:
    outlook = searched("more").driver.outlook
    volumes = [outlook.expected_volume(outlook.networks(most), 20.0) for most in (1, 2, 4)]
    assert volumes == sorted(volumes)
    assert outlook.expected_volume([], 20.0) < volumes[0]


def test_without_covering_every_network_adds_volume() -> None:
    outlook = searched("volume").driver.outlook
    for most in (1, 2, 3):
        members = outlook.networks(most, covering=False)
        assert len(members) == most
        for left_out in range(most):
            rest = [m for place, m in enumerate(members) if place != left_out]
            assert outlook.expected_volume(rest, 20.0) < outlook.expected_volume(members, 20.0)


def test_one_slow_artifact_does_not_stand_for_all() -> None:
    timings = Timings(deploy=[1.0], example=[0.001, 0.001, 0.01], latency=[2.0])
    one, four = timings.artifacts_s(1, 1000), timings.artifacts_s(4, 1000)
    assert one == pytest.approx(6.0 + 1.0 + 10.0)
    assert four == pytest.approx(4 * (6.0 + 1.0) + 10.0 + 3 * 1.0)
    assert timings.artifacts_s(4, 1000, figures_s=2.5) == pytest.approx(four + 4 * 2.5)
    assert Timings().artifacts_s(2, 1000) > 0
