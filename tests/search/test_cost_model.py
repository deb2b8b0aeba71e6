"""The cost model on networks whose bytes and times follow a known law."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.compress.discovery import find_groups
from autoprune.compress.shapes import layer_shapes
from autoprune.compress.surgery import prune
from autoprune.measure.cost import count_macs
from autoprune.search.cost_model import CostModel, LayerTimes
from autoprune.search.options import Options, group_options
from autoprune.search.profile import CutLoss, Design, Profile, Timed
from autoprune.space.groups import Group, Groups, Member
from autoprune.space.quantization import Bits
from autoprune.space.recipe import GroupChoice, Recipe, Recovery, uniform_recipe
from autoprune.space.search_space import SearchSpace
from autoprune.space.shapes import AxisUse, LayerShape
from autoprune.space.space_files import load_space

SIZES = {"a": 32, "b": 64, "c": 64}
SPACE = SearchSpace(ratios=(0.0, 0.25, 0.5, 0.75, 1.0))


def member(layer: str, axis: str, size: int) -> Member:
    return Member.model_validate(
        {"layer": layer, "kind": "conv", "axis": axis, "index_map": [(u,) for u in range(size)]}
    )


def make_groups() -> Groups:
    """Return a stem ``a``, and a block whose inner channels are ``b`` between two layers, made by ``c``."""
    rows = {
        "a": [member("a", "out", 32), member("b", "in", 32)],
        "b": [member("b", "out", 64), member("c", "in", 64)],
        "c": [member("c", "out", 64)],
    }
    groups = [
        Group(
            name=name,
            type="conv",
            size=SIZES[name],
            members=tuple(members),
            prunable=True,
            block="inner" if name == "b" else "",
        )
        for name, members in rows.items()
    ]
    return Groups(groups=tuple(groups), input_shape=(3, 8, 8))


def use(group: str) -> tuple[AxisUse, ...]:
    return (AxisUse(group=group, share=1 / SIZES[group], units=SIZES[group]),)


def make_shapes() -> tuple[LayerShape, ...]:
    return (
        LayerShape(
            name="a", group="a", weights=32 * 27, outputs=32, inputs=3, makes=use("a"), reads=(),
            read_elements=192,
        ),
        LayerShape(
            name="b", group="b", weights=64 * 32 * 9, outputs=64, inputs=32, makes=use("b"), reads=use("a"),
            read_elements=2048, block="b",
        ),
        LayerShape(
            name="c", group="c", weights=64 * 64 * 9, outputs=64, inputs=64, makes=use("c"), reads=use("b"),
            read_elements=4096, block="b",
        ),
    )  # fmt: skip


def true_design(recipe: Recipe, groups: Groups, rng: np.random.Generator | None = None) -> Design:
    """Return what a network of ``recipe`` would be measured as."""
    kept = recipe.kept_counts(groups)
    bits: dict[str, int] = {name: recipe.choice(name).bits for name in SIZES}
    size, layer_s, whole_s = 5000.0, {"": 1e-6}, 20e-6
    for shape in make_shapes():
        if shape.is_gone(kept):
            continue
        outputs, inputs = shape.output_share(kept), shape.input_share(kept)
        width = bits[shape.group]
        size += shape.weights * outputs * (inputs if shape.reads else 1) * width / 8
        size += (350 + 16 * shape.outputs * outputs) if width == 8 else 4 * shape.outputs * outputs
        # Kernels work in blocks of 16 outputs.
        blocks = np.ceil(shape.outputs * outputs / 16) * 16 / shape.outputs
        seconds = 1e-9 * shape.weights * blocks * inputs * (0.4 if width == 8 else 1.0)
        layer_s[shape.name] = seconds * (1.3 if width == 8 else 1.1) * (rng.normal(1, 0.03) if rng else 1.0)
        whole_s += seconds
    dense_s = 20e-6 + 1e-9 * sum(s.weights for s in make_shapes())
    return Design(
        kept=kept, bits=bits, layer_s=layer_s, size_bytes=round(size), latency_ratio=whole_s / dense_s
    )


def random_recipe(groups: Groups, rng: np.random.Generator) -> Recipe:
    choices = {
        g.name: GroupChoice(ratio=float(rng.choice(SPACE.ratios_of(g))), bits=8 if rng.random() < 0.7 else 32)
        for g in groups.groups
    }
    return Recipe(groups=choices)


def make_model(count: int = 16, noise: bool = True) -> tuple[CostModel, Groups]:
    groups, rng = make_groups(), np.random.default_rng(0)
    recipes = [Recipe(), *(uniform_recipe(groups, r, 8) for r in (0.0, 0.25, 0.5, 0.75))]
    recipes += [random_recipe(groups, rng) for _ in range(count - len(recipes))]
    designs = [true_design(recipe, groups, rng if noise else None) for recipe in recipes]
    return CostModel(make_shapes(), designs), groups


def test_sizes_of_networks_that_were_not_built_are_nearly_exact() -> None:
    model, groups = make_model()
    rng = np.random.default_rng(1)
    assert model.size_error < 0.002
    for _ in range(30):
        design = true_design(random_recipe(groups, rng), groups)
        assert model.size(design.kept, design.bits) == pytest.approx(
            design.size_bytes / model.dense_bytes, abs=0.002
        )


def test_latency_of_networks_that_were_not_built_is_within_the_stated_error() -> None:
    model, groups = make_model()
    rng = np.random.default_rng(2)
    errors = []
    for _ in range(40):
        design = true_design(random_recipe(groups, rng), groups)
        errors.append(model.latency(design.kept, design.bits) - design.latency_ratio)
    assert float(np.sqrt(np.mean(np.square(errors)))) < 1.5 * model.latency_error
    assert model.latency_error < 0.08


def test_without_times_of_layers_whole_networks_are_shared_out_by_their_products() -> None:
    """What a compiled program leaves: the latency of whole networks alone."""
    model, groups = make_model(24)
    silent = CostModel(make_shapes(), [d.model_copy(update={"layer_s": {}}) for d in model.designs])
    dense = silent.designs[0]
    macs = {s.name: s.macs({}) for s in make_shapes()}
    assert dense.layer_s == {name: pytest.approx(count / sum(macs.values())) for name, count in macs.items()}
    rng = np.random.default_rng(2)
    errors, blind = [], []
    for _ in range(40):
        design = true_design(random_recipe(groups, rng), groups)
        errors.append(silent.latency(design.kept, design.bits) - design.latency_ratio)
        blind.append(float(np.mean([d.latency_ratio for d in silent.designs])) - design.latency_ratio)
    assert float(np.square(errors).mean()) < 0.3 * float(np.square(blind).mean())
    # Fewer channels and int8 are both faster, as the networks were.
    whole = dict(SIZES)
    half = {**whole, "b": 32}
    assert silent.latency(half, {}) < silent.latency(whole, {}) - 0.1
    assert silent.latency(whole, dict.fromkeys(SIZES, 8)) < silent.latency(whole, {}) - 0.2
    assert silent.latency_error < 0.2


def test_products_of_the_layers_are_those_of_the_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.ReLU(),
        nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 10),
    ).eval()  # fmt: skip
    groups = find_groups(model, torch.zeros(2, 3, 8, 8))
    shapes = layer_shapes(model, groups, torch.zeros(2, 3, 8, 8))
    assert sum(s.macs({}) for s in shapes) == count_macs(model, (3, 8, 8))
    counts = {g.name: g.size // 2 if g.prunable else g.size for g in groups.groups}
    cut = prune(model, groups, {g.name: tuple(range(counts[g.name])) for g in groups.prunable})
    assert sum(s.macs(counts) for s in shapes) == pytest.approx(count_macs(cut, (3, 8, 8)))


def test_steps_of_kernel_widths_are_seen() -> None:
    times = LayerTimes.fit(
        np.array([[1.0, 1.0], [0.75, 1.0], [0.5, 1.0], [0.25, 1.0]]), np.array([4.0, 4.0, 2.0, 2.0]) * 1e-5
    )
    found = times(np.array([0.75, 0.5]), np.array([1.0, 1.0]))
    assert found[0] > 1.6 * found[1]


def test_results_of_trials_correct_the_latency() -> None:
    model, groups = make_model(count=5, noise=False)
    rng = np.random.default_rng(3)
    # Another truth than the profile saw, such as under another load: everything takes 0.1 longer.
    results = []
    for _ in range(12):
        design = true_design(random_recipe(groups, rng), groups)
        results.append(Timed(kept=design.kept, bits=design.bits, latency_ratio=design.latency_ratio + 0.1))
    corrected = CostModel(model.shapes, model.designs, results)

    def error(of: CostModel) -> float:
        return float(np.mean([abs(of.latency(d.kept, d.bits) - d.latency_ratio) for d in results]))

    assert error(corrected) < 0.6 * error(model)


def test_too_few_networks_state_no_error() -> None:
    model, _ = make_model(count=5)
    assert np.isnan(CostModel(model.shapes, model.designs[:3]).latency_error)


def make_options() -> Options:
    model, groups = make_model()
    cuts = [
        CutLoss(group=g.name, kept=k, criterion=c, growth=0.1 * (1 - k / g.size) * f, measured=True)
        for g in groups.groups
        for k in {g.size // 4 * i for i in range(4)}
        for c, f in (("l2", 1.0), ("activation", 0.8))
    ]
    profile = Profile(dense_loss=0.1, examples=100, cuts=tuple(cuts), int8={"a": 0.02}, designs=model.designs)
    return Options(
        profile,
        groups,
        SPACE.model_copy(update={"criteria": {"conv": ("l2", "activation"), "linear": ("l2",)}}),
        model,
    )


def test_the_solver_s_tables_are_the_cost_model() -> None:
    options = make_options()
    rng = np.random.default_rng(0)
    rows = np.array([[rng.integers(len(o.kept)) for o in options.of] for _ in range(60)])
    predicted = options.problem.evaluate(rows)
    for row, (_, size, latency) in zip(rows, predicted, strict=True):
        assert options.predicted_costs(row) == pytest.approx((size, latency))


def test_each_width_has_the_criterion_that_lost_least() -> None:
    options = make_options().of[0]
    assert set(zip(options.kept, options.criterion, strict=True)) >= {(32, ""), (16, "activation")}
    assert options.loss[options.nearest(32, 8)] == pytest.approx(0.02)
    assert options.loss[options.nearest(16, 32)] == pytest.approx(0.04)


def test_an_estimate_never_goes_before_what_was_measured() -> None:
    group = make_options().groups.groups[0]
    space = SPACE.model_copy(update={"criteria": {"conv": ("l2", "activation", "taylor"), "linear": ("l2",)}})

    def cut(kept: int, criterion: str, growth: float, *, measured: bool) -> CutLoss:
        return CutLoss(group=group.name, kept=kept, criterion=criterion, growth=growth, measured=measured)

    cuts = [
        cut(16, "l2", 0.3, measured=True),
        cut(16, "taylor", 0.01, measured=False),
        # Nothing was measured here, so the estimate is by a criterion that was measured at another width.
        cut(8, "taylor", 0.02, measured=False),
        cut(8, "l2", 0.5, measured=False),
    ]
    options = group_options(group, space, cuts, rounding={}, floor=0.0)
    found = {k: (c, float(g)) for k, c, g in zip(options.kept, options.criterion, options.loss, strict=True)}
    assert found[16] == ("l2", 0.3)
    assert found[8] == ("l2", 0.5)


def test_recipes_come_back_as_the_rows_that_they_were_made_of() -> None:
    options = make_options()
    rng = np.random.default_rng(1)
    for _ in range(30):
        row = np.array([rng.integers(len(o.kept)) for o in options.of])
        recipe = options.recipe(row, Recovery(finetune_steps=0))
        recipe.check(options.groups)
        assert (options.encode(recipe) == row).all()


def test_losses_never_fall_with_deeper_cuts() -> None:
    options = make_options()
    for group in options.of:
        by_kept = sorted(
            {(k, float(v)) for k, v, b in zip(group.kept, group.loss, group.bits, strict=True) if b == 8}
        )
        assert [v for _, v in by_kept] == sorted((v for _, v in by_kept), reverse=True)


def test_rows_of_the_same_network_have_one_representative() -> None:
    options = make_options()
    inner = {"b": "inner.b", "c": "inner.c"}
    renamed = [
        g.model_copy(
            update={
                "members": tuple(
                    m.model_copy(update={"layer": inner.get(m.layer, m.layer)}) for m in g.members
                )
            }
        )
        for g in options.groups.groups
    ]
    options = Options(
        options.profile, Groups(groups=tuple(renamed), input_shape=(3, 8, 8)), options.space, options.costs
    )
    stem = GroupChoice(ratio=0.5, bits=8)
    gone = {"a": stem, "b": GroupChoice(ratio=1.0)}
    row = options.encode(Recipe(groups=gone))
    other = options.encode(Recipe(groups={**gone, "c": GroupChoice(ratio=0.75, bits=8)}))
    assert options.kept(row)["b"] == 0
    assert (other != row).any()
    assert (options.canonical(other) == options.canonical(row)).all()
    both = np.stack([other, row])
    assert (options.canonical(both) == options.canonical(row)).all()
    # Without the block gone they are two networks.
    one, two = (options.encode(Recipe(groups={"a": stem, "c": GroupChoice(ratio=r)})) for r in (0.0, 0.75))
    assert (options.canonical(one) != options.canonical(two)).any()


def test_representatives_are_those_of_the_groups_that_are_left() -> None:
    def group(name: str, layers: tuple[str, ...], block: str = "") -> Group:
        members = tuple(
            Member(layer=layer, kind="conv", axis="out", index_map=tuple((u,) for u in range(16)))
            for layer in layers
        )
        return Group(name=name, type="conv", size=16, members=members, prunable=True, block=block)

    groups = Groups(
        groups=(
            group("stem", ("stem", "one.last", "two.last")),
            group("one", ("one.first",), "one"),
            group("inner", ("one.middle", "two.middle")),
            group("two", ("two.first",), "two"),
            group("own", ("two.own",)),
        ),
        input_shape=(3, 8, 8),
    )
    space = load_space("default")
    profile = Profile(dense_loss=0.2, examples=10, cuts=(), designs=(), shapes=())
    options = Options(profile, groups, space, None)  # type: ignore[arg-type]
    generator = np.random.default_rng(0)
    rows = np.stack([generator.integers(len(o.kept), size=400) for o in options.of], axis=1)
    seen = set()
    for row, found in zip(rows, options.canonical(rows), strict=True):
        counts = options.kept(row)
        gone = groups.removed_blocks(counts)
        left = {g.name for g in groups.without(gone).groups}
        wanted = [
            option if o.group.name in left or counts[o.group.name] == 0 else 0
            for o, option in zip(options.of, row, strict=True)
        ]
        assert list(found) == wanted
        seen.add(gone)
    assert {(), ("one",), ("two",), ("one", "two")} <= seen


def test_a_layer_that_reads_two_groups_has_the_same_cost_in_both_models() -> None:
    model, groups = make_model()
    joined = LayerShape(
        name="d", group="c", weights=64 * 96 * 9, outputs=64, inputs=96, makes=use("c"),
        reads=(
            AxisUse(group="a", share=1 / 96, units=32),
            AxisUse(group="b", share=1 / 96, units=64),
        ),
        read_elements=6000,
    )  # fmt: skip
    shapes = (*[s for s in make_shapes() if s.name != "c"], joined)
    designs = [
        d.model_copy(update={"layer_s": {**d.layer_s, "d": d.layer_s.get("c", 0.0)}}) for d in model.designs
    ]
    costs = CostModel(shapes, designs)
    costs._line = np.array([0.01, 3e3, 3e3, 1e-5])
    profile = Profile(dense_loss=0.1, examples=100, designs=tuple(designs))
    options = Options(profile, groups, SPACE, costs)
    widths: tuple[Bits, ...] = (8, 32)
    for chosen in itertools.product(widths, repeat=3):
        bits = dict(zip("abc", chosen, strict=True))
        row = options.encode(Recipe(groups={name: GroupChoice(bits=width) for name, width in bits.items()}))
        assert options.problem.evaluate(row[None])[0, 2] == pytest.approx(costs.latency(SIZES, bits))


def test_results_that_the_line_cannot_follow_change_nothing() -> None:
    model, groups = make_model(count=8, noise=False)
    design = true_design(uniform_recipe(groups, 0.5, 8), groups)
    # One network timed eight times, by turns far too slow and far too fast: no line tells the next from the others.
    results = [
        Timed(
            kept=design.kept, bits=design.bits, latency_ratio=design.latency_ratio + (0.2 if i % 2 else -0.2)
        )
        for i in range(8)
    ]
    corrected = CostModel(model.shapes, model.designs, results)
    assert not corrected.is_corrected
    row = {"a": 16}, {"a": 8, "b": 8, "c": 32}
    assert corrected.latency(*row) == pytest.approx(model.latency(*row))


def test_heads_and_their_width_divide_one_axis() -> None:
    uses = (
        AxisUse(group="heads", share=1 / 4, units=4, part=0),
        AxisUse(group="width", share=1 / 8, units=8, part=0, sets_bits=False),
    )
    shape = LayerShape(
        name="qkv",
        group="heads",
        weights=32 * 16,
        outputs=32,
        inputs=32,
        makes=uses,
        reads=uses,
        read_elements=32,
    )
    assert shape.output_share({"heads": 2}) == pytest.approx(0.5)
    assert shape.output_share({"heads": 2, "width": 4}) == pytest.approx(0.25)
    assert shape.converted_share({"heads": 2, "width": 4}, {"heads": 32}, 8) == pytest.approx(0.25)
    assert shape.converted_share({"heads": 2}, {"heads": 8}, 8) == 0.0
