"""Files with faults in their bytes and in what they say: a message and the right exit code, nothing run or touched."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from autoprune.config import StudyConfig
from autoprune.space.recipe import Recipe
from autoprune.space.search_space import SearchSpace
from tests.fuzz import hostile
from tests.fuzz.files import SURFACES, check, run
from tests.fuzz.sandbox import Sandbox

CASES = 16
# What reads a study takes longer.
OF_STUDIES = 4
LONG = 300
DRAWN = 60
SAME = settings(
    derandomize=True, deadline=None, database=None, max_examples=DRAWN,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
MANY = settings(SAME, derandomize=False, max_examples=600)

_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(hostile.TEXTS), st.sampled_from(hostile.NUMBERS),
    st.text(max_size=20), st.sampled_from((0, 1, 8, 0.5, "l2", "conv", "digits", "cifar_resnet20", "torch", "accuracy")),
)  # fmt: skip
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.just("*"), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def content_of(model: Any) -> SearchStrategy[dict[str, Any]]:
    """Mappings with the names of a model's fields and values of any kind."""
    inner = [name for each in _models(model) for name in each.model_fields]
    values = _values | st.dictionaries(st.sampled_from(inner), _values, max_size=4)
    return st.dictionaries(st.sampled_from(list(model.model_fields)), values, max_size=5)


def _models(model: Any) -> list[Any]:
    nested = [f.annotation for f in model.model_fields.values() if hasattr(f.annotation, "model_fields")]
    return [model, *nested]


@pytest.mark.parametrize("name", SURFACES)
def test_right_files_are_read(sandbox: Sandbox, name: str) -> None:
    surface = SURFACES[name]
    place = sandbox.work / surface.place
    right = place.read_bytes() if place.is_file() else surface.make() if surface.make else b""
    place.write_bytes(right)
    for case in surface.cases:
        outcome = sandbox.check(case=case, may_write=surface.may_write)
        assert outcome.code in (0, 77), outcome


@pytest.mark.parametrize("name", SURFACES)
def test_faulty_files(sandbox: Sandbox, name: str) -> None:
    of_study = name.startswith("study") or name == "measurements"
    for seed in range(OF_STUDIES if of_study else CASES):
        run(sandbox, name, seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SURFACES)
def test_many_faulty_files(sandbox: Sandbox, name: str) -> None:
    for seed in range(CASES, CASES + LONG):
        run(sandbox, name, seed)


def test_drawn_settings(sandbox: Sandbox) -> None:
    SAME(given(content_of(StudyConfig))(lambda content: _read(sandbox, "settings", content)))()


def test_drawn_spaces(sandbox: Sandbox) -> None:
    SAME(given(content_of(SearchSpace))(lambda content: _read(sandbox, "space", content)))()


def test_drawn_recipes(sandbox: Sandbox) -> None:
    SAME(given(content_of(Recipe))(lambda content: _read(sandbox, "recipe", content)))()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "model"), [("settings", StudyConfig), ("space", SearchSpace), ("recipe", Recipe)]
)
def test_many_drawn_files(sandbox: Sandbox, name: str, model: Any) -> None:
    MANY(given(content_of(model))(lambda content: _read(sandbox, name, content)))()


def _read(sandbox: Sandbox, name: str, content: Any) -> None:
    surface = SURFACES[name]
    raw = json.dumps(content).encode("utf-8", "surrogatepass")
    check(sandbox, surface, raw, surface.cases[0], name)
