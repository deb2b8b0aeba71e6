"""The bench: what rankings across groups mean for the networks that trials make, remember and read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoprune.compress.surgery import make_plan
from autoprune.config import make_config
from autoprune.report.view import group_rows, recipe_summary
from autoprune.search.bench import Bench, discover
from autoprune.space.recipe import Ranking, Recipe, Recovery, uniform_recipe
from autoprune.study.records import TrialRecord
from autoprune.workloads.workload import workload_from_objects
from tests.compress.networks import Plain


@pytest.fixture
def bench() -> Bench:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 3, 8, 8, generator=generator)
    targets = inputs.mean((2, 3)).argmax(1)
    torch.manual_seed(0)
    model = Plain(16)
    with torch.no_grad():  # a few units of conv1 do everything
        model.conv1.weight[:12] *= 0.01
        model.conv2.weight[:, :12] *= 0.01
    config = make_config({"model": "own", "data": "given", "calibration_examples": 32})
    workload = workload_from_objects(model.eval(), ((inputs, targets), (inputs, targets)), config=config)
    return Bench.build(config, *discover(workload), gradients=False)


def recipe(bench: Bench, ranking: Ranking) -> Recipe:
    recovery = Recovery(finetune_steps=0)
    return uniform_recipe(bench.groups, 0.5, 32, "l2", 4, recovery, ranking)


def test_trials_keep_what_the_ranking_says_and_artifacts_give_it_back(bench: Bench, tmp_path: Path) -> None:
    own, across = recipe(bench, "group"), recipe(bench, "global")
    by_ratio, by_score = bench.compressed(own), bench.compressed(across)
    assert bench.compressed(across) is by_score, "equal networks are made once"
    assert len(by_ratio.plan["conv1"]) == 8
    assert len(by_score.plan["conv1"]) == 4
    assert by_score.plan == make_plan(bench.workload.model, bench.groups, across, bench.statistics)
    bench.save(by_score, across, tmp_path)
    again = bench.load(tmp_path)
    assert again.plan == by_score.plan
    inputs = torch.randn(4, 3, 8, 8)
    assert torch.equal(again.model(inputs), by_score.model(inputs))


def test_reports_do_not_make_up_counts_that_scores_decided(bench: Bench) -> None:
    rows = {row.name: row.kept for row in group_rows(recipe(bench, "global"), bench.groups)}
    assert rows == {"conv1": None, "conv2": None, "fc1": None, "fc2": 3}
    assert {row.name: row.kept for row in group_rows(recipe(bench, "group"), bench.groups)}["conv1"] == 8
    for ranking, words in (("group", "ranked by l2"), ("alike", "ranked across groups that are alike by l2")):
        chosen = recipe(bench, "group").model_copy(update={"ranking": ranking})
        record = TrialRecord(number=1, state="complete", origin="tpe", recipe=chosen)
        assert words in recipe_summary(record, bench.groups)
