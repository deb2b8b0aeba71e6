"""The study definitions in studies/: spaces that claim one difference have one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autoprune.space.space_files import load_space

COMPARE = Path(__file__).resolve().parents[1] / "studies" / "compare"


def content(name: str) -> dict[str, Any]:
    """Return everything that a space says but what it calls itself."""
    return load_space(name).model_dump(exclude={"description"})


@pytest.mark.parametrize(
    ("base", "changed"),
    [("default", "no_closed_form.yaml"), ("untrained.yaml", "untrained_no_closed_form.yaml")],
)
def test_a_space_without_closed_form_differs_in_nothing_else(base: str, changed: str) -> None:
    whole = content(str(COMPARE / base) if base.endswith(".yaml") else base)
    without = content(str(COMPARE / changed))
    assert whole["recovery"].pop("least_squares") == (True,)
    assert without["recovery"].pop("least_squares") == (False,)
    assert whole == without


def test_the_untrained_space_is_the_default_one_without_training() -> None:
    whole, untrained = content("default"), content(str(COMPARE / "untrained.yaml"))
    assert untrained["recovery"].pop("finetune_steps") == (0,)
    whole["recovery"].pop("finetune_steps")
    for training in ("learning_rate", "schedule", "distill", "temperature", "clip_norm"):
        whole["recovery"].pop(training)
        untrained["recovery"].pop(training)
    assert whole == untrained
