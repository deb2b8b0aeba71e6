"""How integers are made: as settings, as text, and what no recipe may ask for."""

from __future__ import annotations

import pytest

from autoprune.errors import UsageError
from autoprune.space.quantization import Quantization
from autoprune.space.recipe import GroupChoice, Recipe, Recovery
from tests.search.fakes import make_groups


def test_integers_of_before_have_the_text_of_before() -> None:
    """Records of studies that knew fewer settings are compared with recipes by their text."""
    how = Quantization(scale="mse", rounding="gptq")
    text = Recipe(quantization=how).canonical_json()
    assert (
        '"quantization":{"aware":0.0,"bias_correction":false,"percentile":99.9,"rounding":"gptq","scale":"mse"}'
        in text
    )
    assert Recipe.model_validate_json(text).quantization == how
    later = Recipe(quantization=how.model_copy(update={"half": "bfloat16", "smooth_alpha": 0.6}))
    assert '"half":"bfloat16"' in later.canonical_json()
    assert '"smooth_alpha":0.6' in later.canonical_json()
    assert "equalize" not in later.canonical_json()
    assert Recipe.model_validate_json(later.canonical_json()) == later


def test_inputs_say_what_layers_run_in() -> None:
    assert [GroupChoice(bits=4, activation_bits=read).runs_int8 for read in (8, 16, 32)] == [
        True,
        False,
        False,
    ]
    assert [GroupChoice(bits=bits).has_integers for bits in (2, 8, 16, 32)] == [True, True, False, False]
    assert [GroupChoice(bits=bits).runs_int8 for bits in (2, 8, 16, 32)] == [True, True, False, False]


def test_integers_are_the_runtime_s_own_only_as_it_makes_them() -> None:
    assert Quantization().usual_integers
    assert Quantization(activations="dynamic", equalize="smooth", half="bfloat16").usual_integers
    for other in (
        Quantization(scale="mse"),
        Quantization(rounding="gptq"),
        Quantization(bias_correction=True),
        Quantization(aware=0.5),
    ):
        assert not other.usual_integers


def test_weights_that_are_trained_on_grids_are_not_rescaled() -> None:
    groups = make_groups()
    how = Quantization(aware=0.5, equalize="cross_layer")
    recipe = Recipe(groups={"conv0": GroupChoice(bits=4)}, quantization=how)
    with pytest.raises(UsageError, match=r"equalize 'cross_layer' rescales weights .* aware 0.5"):
        recipe.check(groups)
    recipe.model_copy(update={"recovery": Recovery(finetune_steps=0)}).check(groups)
    recipe.model_copy(update={"groups": {"conv0": GroupChoice(bits=32)}}).check(groups)
