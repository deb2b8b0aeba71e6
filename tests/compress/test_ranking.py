"""Rankings across groups: which units go where scores of several groups are compared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoprune.compress.criteria import score_group
from autoprune.compress.discovery import find_groups
from autoprune.compress.ranking import kept_counts, share_out
from autoprune.compress.surgery import make_plan, prune
from autoprune.errors import CompressionError, UsageError
from autoprune.space.groups import Group, Groups, Member
from autoprune.space.recipe import GroupChoice, Recipe, uniform_recipe
from tests.compress.networks import Plain


def group(name: str, size: int, kind: str = "conv", readers: int = 1) -> Group:
    index_map = tuple((unit,) for unit in range(size))
    made = [{"layer": name, "kind": kind, "axis": "out", "index_map": index_map}]
    read = [
        {"layer": f"{name}.{i}", "kind": kind, "axis": "in", "index_map": index_map} for i in range(readers)
    ]
    members = tuple(Member.model_validate(values) for values in [*made, *read])
    kind = "linear" if kind == "linear" else "conv"
    return Group.model_validate(
        {"name": name, "type": kind, "size": size, "members": members, "prunable": True}
    )


class Chain(nn.Module):
    """Four linear layers whose magnitudes are set by hand: unit ``u`` of a layer weighs ``rows[u]``."""

    def __init__(self, *rows: list[float]) -> None:
        super().__init__()
        sizes = [1, *(len(each) for each in rows), 2]
        self.layers = nn.Sequential(
            *(nn.Linear(a, b, bias=False) for a, b in zip(sizes, sizes[1:], strict=False))
        )
        with torch.no_grad():
            for layer, each in zip(self.layers, rows, strict=False):
                assert isinstance(layer, nn.Linear)
                layer.weight.zero_()
                layer.weight[:, 0] = torch.tensor(each)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


def made_by(*rows: list[float]) -> tuple[Chain, Groups]:
    """Return a chain and its groups, of the layers that make the units alone, so that scores are known."""
    groups = []
    for place, each in enumerate(rows):
        own = group(f"layers.{place}", len(each), "linear", readers=0)
        groups.append(own)
    return Chain(*rows), Groups(groups=tuple(groups), input_shape=(1,))


def recipe(groups: Groups, ratio: float, ranking: str, criterion: str = "l2", width: int = 1) -> Recipe:
    made = uniform_recipe(groups, ratio, 32, criterion, width)
    return Recipe.model_validate({**made.model_dump(), "ranking": ranking})


def test_group_is_what_the_ratios_say() -> None:
    model, groups = made_by([1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0])
    assert kept_counts(model, groups, recipe(groups, 0.5, "group"), None) == {"layers.0": 2, "layers.1": 2}


def test_global_takes_the_lowest_shares_of_their_groups_mean() -> None:
    # As shares of the mean: .4 .4 1.6 1.6 and 1 1 1 1. Large weights alone do not keep a group.
    model, groups = made_by([1.0, 1.0, 4.0, 4.0], [100.0, 100.0, 100.0, 100.0])
    quarter = kept_counts(model, groups, recipe(groups, 0.25, "global"), None)
    assert quarter == {"layers.0": 2, "layers.1": 4}
    plan = make_plan(model, groups, recipe(groups, 0.25, "global"), None)
    assert plan == {"layers.0": (2, 3)}
    # Of 4 more the other group's come first, for 1 is below 1.6, but one unit has to stay.
    most = kept_counts(model, groups, recipe(groups, 0.75, "global"), None)
    assert most == {"layers.0": 1, "layers.1": 1}


def test_scores_are_divided_by_their_groups_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups = made_by([1.0] * 4, [1.0] * 4)
    # A group of more layers has larger scores, for those of its layers are added.
    scores = {
        "layers.0": torch.tensor([1.0, 1.0, 4.0, 4.0]) * 100,
        "layers.1": torch.tensor([1.0, 1.0, 1.0, 1.0]),
    }
    monkeypatch.setattr("autoprune.compress.ranking.score_group", lambda _m, g, *_: scores[g.name])
    kept = kept_counts(model, groups, recipe(groups, 0.25, "global"), None)
    assert kept == {"layers.0": 2, "layers.1": 4}


def test_lamp_is_compared_as_it_is() -> None:
    # Shares of what is not smaller: 1/10 2/9 3/7 1 (magnitudes are roots) and 1/4 1/3 1/2 1.
    roots = [1.0, 2**0.5, 3**0.5, 2.0]
    model, groups = made_by(roots, [9.0, 9.0, 9.0, 9.0])
    assert score_group(model, groups.groups[0], "lamp").tolist() == pytest.approx([0.1, 2 / 9, 3 / 7, 1.0])
    assert score_group(model, groups.groups[1], "lamp").tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1.0])
    kept = kept_counts(model, groups, recipe(groups, 0.5, "global", "lamp"), None)
    # 0.1, 0.222, 0.25 and 0.333 go.
    assert kept == {"layers.0": 2, "layers.1": 2}
    kept = kept_counts(model, groups, recipe(groups, 0.25, "global", "lamp"), None)
    assert kept == {"layers.0": 2, "layers.1": 4}


def test_alike_compares_groups_of_one_size_and_kind() -> None:
    rows = [[2.0, 2.0, 3.0, 3.0], [9.0, 9.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0]]
    model, groups = made_by(*rows)
    together = kept_counts(model, groups, recipe(groups, 0.25, "global"), None)
    alike = kept_counts(model, groups, recipe(groups, 0.25, "alike"), None)
    assert together == {"layers.0": 4, "layers.1": 4, "layers.2": 4}
    assert alike == {"layers.0": 2, "layers.1": 4, "layers.2": 6}
    # One more layer that reads the units makes it another kind.
    reader = group("", 4, "linear").members[1].model_copy(update={"layer": "layers.2"})
    other = groups.groups[1].model_copy(update={"members": (*groups.groups[1].members, reader)})
    apart = Groups(groups=(groups.groups[0], other, groups.groups[2]), input_shape=(1,))
    counts = recipe(apart, 0.25, "alike").kept_counts(apart)
    assert {**counts} == {"layers.0": 3, "layers.1": 3, "layers.2": 6}
    assert kept_counts(model, apart, recipe(apart, 0.25, "alike"), None) == counts, "each for itself"


def test_groups_of_ratio_zero_stay_whole_and_give_no_units() -> None:
    model, groups = made_by([1.0, 1.0, 4.0, 4.0], [1.0, 1.0, 1.0, 1.0])
    some = Recipe(groups={"layers.1": GroupChoice(ratio=0.5)}, width=1, ranking="global")
    assert kept_counts(model, groups, some, None) == {"layers.0": 4, "layers.1": 2}


def test_units_go_by_whole_steps_and_one_step_stays() -> None:
    small, large = group("small", 16), group("large", 64)
    scores = [torch.arange(16.0) / 16, torch.ones(64) * 0.9]
    # Steps are 4 of 16 units (a quarter of them at most) and 8 of 64.
    assert share_out([small, large], scores, 8, 8) == {"small": 8, "large": 64}
    assert share_out([small, large], scores, 9, 8) == {"small": 8, "large": 64}
    assert share_out([small, large], scores, 11, 8) == {"small": 4, "large": 64}
    assert share_out([small, large], scores, 20, 8) == {"small": 4, "large": 56}
    assert share_out([small, large], scores, 1000, 8) == {"small": 4, "large": 8}
    odd = group("odd", 10)
    assert [share_out([odd], [torch.arange(10.0)], n, 8)["odd"] for n in (1, 4, 6, 99)] == [8, 6, 4, 2]


def test_a_little_always_goes() -> None:
    large = group("large", 64)
    assert share_out([large], [torch.arange(64.0)], 1, 8) == {"large": 56}


def test_a_block_that_goes_takes_no_part() -> None:
    model, groups = made_by([1.0, 1.0, 4.0, 4.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    inside = groups.groups[1].model_copy(update={"block": "layers"})
    # A group outside of the block, which has the last layer.
    outside = tuple(m.model_copy(update={"layer": "free"}) for m in groups.groups[2].members)
    apart = groups.groups[2].model_copy(update={"name": "free", "members": outside})
    model.free = model.layers[2]
    gone = groups.groups[0]  # its layer lies in the block, so its units are no units to remove
    found = Groups(groups=(gone, inside, apart), input_shape=(1,))
    ratios = {"layers.0": 0.75, "layers.1": 1.0, "free": 0.5}
    chosen = Recipe(
        groups={name: GroupChoice(ratio=ratio) for name, ratio in ratios.items()}, width=1, ranking="global"
    )
    counts = kept_counts(model, found, chosen, None)
    assert (counts["layers.1"], counts["free"]) == (0, 2)


@pytest.mark.parametrize("ranking", ["global", "alike"])
def test_a_whole_network_is_cut_to_the_counts(ranking: str) -> None:
    torch.manual_seed(0)
    model = Plain(16).eval()
    groups = find_groups(model, torch.randn(2, 3, 8, 8))
    chosen = recipe(groups, 0.5, ranking, width=4)
    with torch.no_grad():
        for layer in (model.conv1.weight[:12], model.conv2.weight[:, :12]):
            layer.mul_(0.01)
    counts = kept_counts(model, groups, chosen, None)
    # No two groups of this network are alike.
    by_ratio = chosen.kept_counts(groups)
    if ranking == "alike":
        assert counts == by_ratio
    else:
        assert counts["conv1"] == 4 < by_ratio["conv1"]
        assert abs(sum(counts.values()) - sum(by_ratio.values())) <= 2, "half of a step of 4"
    plan = make_plan(model, groups, chosen, None)
    assert {g.name: len(plan.get(g.name, range(g.size))) for g in groups.groups} == counts
    small = prune(model, groups, plan)
    assert small(torch.randn(2, 3, 8, 8)).shape == (2, 3)


def test_a_criterion_without_its_statistics_is_named() -> None:
    model, groups = made_by([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    with pytest.raises(CompressionError, match="'activation' needs statistics"):
        kept_counts(model, groups, recipe(groups, 0.5, "global", "activation"), None)


def test_shares_are_not_compared_with_other_scores() -> None:
    groups = Groups(groups=(group("a", 8), group("b", 8, "linear")), input_shape=(1,))
    mixed = Recipe.model_validate(
        {**uniform_recipe(groups, 0.5, 32).model_dump(), "criterion": {"conv": "lamp", "linear": "l2"}}
    )
    mixed.check(groups)
    with pytest.raises(UsageError, match=r"'global' compares units .*\['l2', 'lamp'\]"):
        mixed.model_copy(update={"ranking": "global"}).check(groups)


def test_recipes_of_earlier_versions_stay_equal() -> None:
    before = '{"criterion":{"conv":"l2"},"groups":{},"recovery":{},"width":8}'
    assert "ranking" not in Recipe.model_validate_json(before).canonical_json()
    assert Recipe(ranking="alike").canonical_json() != Recipe().canonical_json()
    assert Recipe.model_validate_json(Recipe(ranking="alike").canonical_json()) == Recipe(ranking="alike")
