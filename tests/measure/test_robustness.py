"""Robustness and the worst class on classifiers whose figures are known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoprune.measure.capability import worst_class
from autoprune.measure.robustness import measure_robustness
from autoprune.measure.stats import wilson_interval
from autoprune.workloads.objects import data_from_objects
from autoprune.workloads.splits import Split
from autoprune.workloads.splitting import Limits


def test_a_class_that_is_always_wrong_is_the_worst() -> None:
    targets = torch.tensor([0] * 10 + [1] * 4 + [2] * 6)
    said = targets.clone()
    said[said == 1] = 0
    said[0] = 2
    found = worst_class(F.one_hot(said, 3).float(), targets, ("cat", "dog", "owl"))
    assert (found.name, found.index, found.value, found.examples) == ("dog", 1, 0.0, 4)
    assert found.ci == wilson_interval(0, 4)


def test_classes_without_examples_or_names_are_left_out_or_numbered() -> None:
    targets = torch.tensor([3, 3, 5])
    found = worst_class(F.one_hot(torch.tensor([3, 0, 5]), 6).float(), targets)
    assert (found.name, found.value, found.examples) == ("3", 0.5, 2)
    with pytest.raises(ValueError, match="no examples"):
        worst_class(torch.zeros(0, 3), torch.zeros(0))


def test_the_worst_class_has_the_lowest_share_and_is_the_first_of_equals() -> None:
    # One of four is right in class 1, one of two in class 0.
    targets = torch.tensor([0, 0, 1, 1, 1, 1])
    found = worst_class(F.one_hot(torch.tensor([0, 1, 1, 0, 0, 0]), 2).float(), targets, ("cat", "dog"))
    assert (found.name, found.value) == ("dog", 0.25)
    assert found.ci == wilson_interval(1, 4)
    # The order of the examples says nothing.
    found = worst_class(F.one_hot(torch.tensor([0, 0, 0]), 9).float(), torch.tensor([8, 1, 8]), ("a", "b"))
    assert (found.index, found.name, found.examples) == (1, "b", 1)
    assert (
        worst_class(F.one_hot(torch.tensor([2, 0]), 3).float(), torch.tensor([2, 2]), ("a", "b")).name == "2"
    )


def grey_levels() -> Split:
    """Images of a bright square whose contrast with what is around it is the class; half of each."""
    targets = torch.arange(80) % 2
    inputs = torch.full((80, 1, 16, 16), 0.3)
    inputs[:, :, 4:12, 4:12] += torch.where(targets == 1, 0.5, 0.2).view(-1, 1, 1, 1)
    data = data_from_objects(
        ((inputs, targets), (inputs, targets)), name="own", seed=0, limits=Limits(20, 40, 20)
    )
    return data.report.unseal()


def by_contrast(batches: Iterator[Tensor]) -> Tensor:
    """Say class 1 where the square stands out by more than 0.35."""
    outputs = []
    for inputs in batches:
        gap = inputs[:, 0, 6:10, 6:10].mean((1, 2)) - inputs[:, 0, :2].mean((1, 2))
        outputs.append(torch.stack([0.35 - gap, gap - 0.35], 1))
    return torch.cat(outputs)


def test_what_contrast_takes_away_is_lost_and_nothing_else() -> None:
    said: list[str] = []
    result = measure_robustness(by_contrast, grey_levels(), ("dim", "bright"), say=said.append)
    assert result.clean.accuracy.value == 1.0
    assert result.clean.accuracy.examples == 40
    scores = {(s.corruption, s.severity): s for s in result.corrupted}
    assert len(scores) == 4 * 3 == len(said) - 1
    # 0.5 x 0.75 still stands out; 0.5 x 0.4 does not, and every bright square is taken for a dim one.
    assert scores["contrast", 1].accuracy.value == 1.0
    for severity in (3, 5):
        lost = scores["contrast", severity]
        assert lost.accuracy.value == pytest.approx(0.5, abs=0.2)
        assert (lost.worst_class.name, lost.worst_class.value) == ("bright", 0.0)
    assert scores["gaussian_blur", 5].accuracy.value == 1.0
    assert result.mean("jpeg") == 1.0
    shares = [scores["contrast", s].accuracy.value for s in (1, 3, 5)]
    assert result.mean("contrast") == pytest.approx(sum(shares) / 3)
    assert result.mean() == pytest.approx(sum(map(result.mean, result.corruptions)) / 4)


def test_the_same_seed_gives_the_same_figures() -> None:
    def unsure(batches: Iterator[Tensor]) -> Tensor:
        # One pixel decides, so that noise tells.
        return torch.cat([torch.stack([0.55 - x[:, 0, 5, 5], x[:, 0, 5, 5] - 0.55], 1) for x in batches])

    one, same, other = (
        measure_robustness(unsure, grey_levels(), (), corruptions=["gaussian_noise"], severities=[5], seed=s)
        for s in (1, 1, 2)
    )
    assert one == same
    assert one.corrupted[0].severity == 5
    assert other.seed != one.seed
