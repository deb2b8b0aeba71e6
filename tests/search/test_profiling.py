"""The profile of a small real network: what is measured, what is estimated, and what is kept."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from autoprune.compress.pipeline import Compressed
from autoprune.compress.recovery import refresh_batchnorm
from autoprune.compress.sensitivity import SensitivityMeter
from autoprune.config import make_config
from autoprune.measure.node_times import layer_seconds
from autoprune.report.profile_view import heat_map, profile_json, profile_rows, write_heat_map
from autoprune.search.bench import Bench, discover
from autoprune.search.cost_model import CostModel
from autoprune.search.designs import design_recipes
from autoprune.search.options import Options
from autoprune.search.profiling import measure_profile, profile_key
from autoprune.space.recipe import uniform_recipe
from autoprune.space.search_space import SearchSpace
from autoprune.workloads.workload import workload_from_objects

SPACE = SearchSpace(ratios=(0.0, 0.5, 0.75, 1.0), criteria={"conv": ("l2", "activation"), "linear": ("l2",)})


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Block(16, 32), Block(16, 16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(400, 1, 12, 12, generator=generator)
    labels = (images.mean((1, 2, 3)) * 12).clamp(-1, 1).round().long() + 1
    data = (TensorDataset(images[:300], labels[:300]), TensorDataset(images[300:], labels[300:]))
    config = make_config({"model": "Sequential", "data": "given", "study": "own", "calibration_examples": 64})
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(images[:300]), labels[:300])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    workload = workload_from_objects(model.eval(), data, config=config)
    patch = pytest.MonkeyPatch()
    patch.setenv("AUTOPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    made = Bench.build(config, *discover(workload))
    folder = tmp_path_factory.mktemp("dense")
    made.dense = made.deploy_dense(folder)
    patch.undo()
    return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "cache"))


def test_with_time_everything_is_measured_and_kept(bench: Bench) -> None:
    told: list[str] = []
    profile = measure_profile(bench, SPACE, math.inf, told.append)
    assert profile.cuts
    assert all(cut.measured for cut in profile.cuts)
    # Each width of each group by each criterion, the removal of both blocks among them.
    assert {(c.group, c.kept) for c in profile.cuts} >= {("3.conv1", 0), ("3.conv1", 16), ("4.conv1", 0)}
    # How a block is removed does not depend on the criterion.
    assert len([c for c in profile.cuts if c.kept == 0]) == len(
        {c.group for c in profile.cuts if c.kept == 0}
    )
    assert set(profile.int8) == {g.name for g in bench.groups.groups}
    assert len(profile.designs) == len(design_recipes(bench.groups, SPACE, 0))
    assert told
    again = measure_profile(bench, SPACE, 0.0, told.append)
    assert again.cuts == profile.cuts
    assert again.designs == profile.designs


def test_without_time_losses_are_estimated_and_few_networks_timed_until_there_is_time(bench: Bench) -> None:
    little = measure_profile(bench, SPACE, 0.0, lambda _: None)
    assert not any(cut.measured for cut in little.cuts)
    assert len(little.designs) == 3
    assert all(math.isfinite(cut.growth) for cut in little.cuts)
    rest = measure_profile(bench, SPACE, math.inf, lambda _: None)
    assert all(cut.measured for cut in rest.cuts)
    assert rest.designs[:3] == little.designs
    assert rest.seconds > little.seconds


def test_a_damaged_profile_is_measured_anew(bench: Bench, tmp_path: Path) -> None:
    place = tmp_path / "cache" / "profiles" / f"{profile_key(bench, SPACE)}.json"
    place.parent.mkdir(parents=True)
    place.write_text('{"dense_loss": "no"')
    assert measure_profile(bench, SPACE, 0.0, lambda _: None).designs


def test_a_profile_is_of_one_network_data_target_and_recovery(bench: Bench) -> None:
    other_network = deepcopy(bench.workload.model)
    with torch.no_grad():
        next(other_network.parameters()).add_(0.1)
    workload = replace(bench.workload, model=other_network)
    target = bench.config.model_copy(update={"target": bench.config.target.model_copy(update={"threads": 3})})
    data = replace(bench.workload, data=replace(bench.workload.data, fingerprint="other images"))
    others = [
        profile_key(replace(bench, workload=workload), SPACE),
        profile_key(replace(bench, workload=data), SPACE),
        profile_key(replace(bench, config=target), SPACE),
        profile_key(
            bench,
            SPACE.model_copy(
                update={"recovery": SPACE.recovery.model_copy(update={"least_squares": (False,)})}
            ),
        ),
    ]
    assert profile_key(bench, SPACE) == profile_key(bench, SPACE)
    assert len({profile_key(bench, SPACE), *others}) == 5


def meter_of(bench: Bench, *, distils: bool, as_numbers: bool = False) -> SensitivityMeter:
    unseen = list(bench.workload.data.search.batches(64))
    if as_numbers:  # a task whose targets are no classes
        unseen = [(inputs, nn.functional.one_hot(targets, 3).float()) for inputs, targets in unseen]
    return SensitivityMeter(
        bench.workload.model,
        bench.groups,
        bench.statistics,
        bench.calibration,
        unseen,
        loss=bench.workload.loss,
        recovery=SPACE.default_recovery(),
        distils=distils,
        device=bench.device,
    )


def test_outputs_are_compared_where_training_distils_and_losses_where_it_does_not(bench: Bench) -> None:
    inputs, targets = next(iter(bench.workload.data.search.batches(1000)))
    with torch.no_grad():
        loss = float(bench.workload.loss(bench.workload.model(inputs), targets))
        refreshed = deepcopy(bench.workload.model)
        refresh_batchnorm(refreshed, [torch.cat([x for x, _ in bench.calibration])])
        before = refreshed(inputs).log_softmax(1)
        deep = deepcopy(refreshed)
        assert isinstance(deep, nn.Sequential)
        deep[3] = nn.ReLU()
        refresh_batchnorm(deep, [torch.cat([x for x, _ in bench.calibration])])
        divergence = float((before.exp() * (before - deep(inputs).log_softmax(1))).sum(1).mean())
    by_loss, by_outputs = (meter_of(bench, distils=distils) for distils in (False, True))
    assert by_outputs.dense_loss == 0.0
    assert by_loss.dense_loss == pytest.approx(loss, rel=0.05)
    assert by_outputs.compares_outputs
    assert not by_loss.compares_outputs
    # Without its branch the block is the ReLU at its end.
    assert by_outputs.of_cut("3.conv1", 0, "l2") == pytest.approx(divergence, rel=0.1)
    by_numbers = meter_of(bench, distils=True, as_numbers=True)
    assert not by_numbers.compares_outputs


def test_removing_more_of_a_group_loses_more_and_estimates_rank_alike(bench: Bench) -> None:
    meter = meter_of(bench, distils=True)
    kept = [32, 24, 16, 8, 0]
    losses = [meter.of_cut("3.conv1", count, "l2") for count in kept]
    assert losses[0] < 1e-6  # nothing is cut, and new BatchNorm statistics do not count as a cut's doing
    assert losses[-1] == max(losses) > 0.05
    guesses = [meter.estimate("3.conv1", count, "l2") for count in kept]
    assert guesses[0] == 0.0
    # Squares of sums: a unit more may take off what others added, a block and half of it are told apart all the same.
    assert max(guesses) == guesses[-1] > 2 * max(guesses[1:3])
    assert abs(meter.of_bits("3.conv1", 8)) < 0.05
    assert meter.dense.get_parameter("3.conv1.weight").shape[0] == 32


def test_rows_and_heat_map_tell_what_the_options_hold(bench: Bench, tmp_path: Path) -> None:
    profile = measure_profile(bench, SPACE, math.inf, lambda _: None)
    options = Options(profile, bench.groups, SPACE, CostModel(profile.shapes, profile.designs))
    rows = profile_rows(profile, options)
    row = next(r for r in rows if r.group == "3.conv1")
    whole = next(cell for cell in row.cells if cell.kept == 0)
    assert whole.ratio == 1.0
    half = next(cell for cell in row.cells if cell.kept == 16)
    assert whole.size > half.size > 0
    # 16 of 32 inner channels: half of two convolutions of 16 x 32 x 9 weights in int8.
    dense = profile.designs[0].size_bytes
    assert half.size == pytest.approx(2 * 16 * 16 * 9 / dense, rel=0.15)
    content = profile_json(profile, options, rows)
    assert content["losses_estimated"] == 0
    assert len(content["groups"]) == len(rows)
    figure = heat_map(profile, rows)
    assert [axis.get_title() for axis in figure.axes][:3] == [
        "outputs diverge by (nats, log10)", "saves of the dense file, %", "saves of the dense latency, %",
    ]  # fmt: skip
    write_heat_map(profile, rows, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("bits", [8, 32])
def test_the_profiler_s_seconds_are_told_by_layer(bench: Bench, bits: int, tmp_path: Path) -> None:
    recipe = uniform_recipe(bench.groups, 0.0, 8 if bits == 8 else 32)
    bench.deploy(Compressed(bench.workload.model), recipe, tmp_path)
    layers = [layer for g in bench.groups.groups for layer in g.producers]
    [seconds] = layer_seconds([tmp_path / "model.onnx"], layers, bench.config.target, (1, 12, 12))
    assert set(seconds) - {""} == set(layers)
    assert all(value >= 0 for value in seconds.values())
    assert seconds["3.conv2"] > seconds["7"]
