"""A whole search of masks by a plain sampler: the final training keeps every masked weight at zero."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from safetensors.torch import load_file

import autoprune
from autoprune.errors import UsageError
from autoprune.naming import StudyPaths
from autoprune.study.artifacts import artifact_folder
from tests.search.test_end_to_end import digits, trained

SPACE = """
ratios: [0.0]
sparsities: [0.8]
bits: [8]
masks: {criterion: [magnitude, activation], allocation: [erk, lamp]}
recovery: {finetune_steps: 3}
baselines: {ratios: []}
"""


@pytest.mark.slow
def test_masks_are_searched_held_and_packed(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE, encoding="utf-8")
    space = str(tmp_path / "space.yaml")
    with pytest.raises(UsageError, match=r"cannot search this space:\n  sparsities"):
        autoprune.search(trained(), digits(), budget="2trials", study="refused", space=space)
    assert not StudyPaths.of("refused").root.exists()
    study = autoprune.search(
        trained(), digits(), budget="2trials", study="masked", space=space, sampler="tpe", front_points=2
    )
    records = study.records()
    assert not [r for r in records if r.state == "failed"]
    weights = [16 * 9, 32 * 16 * 9, 128 * 10]
    sizes = {}
    finals = [r for r in records if r.fidelity == "final" and r.recipe is not None and r.recipe.masks]
    assert finals
    for record in [*(r for r in records if r.fidelity == "search"), *finals]:
        folder = artifact_folder(StudyPaths.of("masked"), record)
        if not folder.is_dir():
            continue
        state = load_file(folder / "weights.safetensors")
        zeros = sum(int((state[f"{place}.weight"] == 0).sum()) for place in (0, 3, 8))
        masked = record.recipe is not None and record.recipe.masks
        assert zeros == (sum(round(0.8 * count) for count in weights) if masked else 0)
        proto = onnx.load(folder / "model.onnx")
        sizes[record.number] = (folder / "model.onnx").stat().st_size
        packed = {"BitwiseAnd", "ScatterElements"} & {node.op_type for node in proto.graph.node}
        assert bool(packed) == masked
    dense = next(r for r in records if r.origin == "dense")
    int8 = next(r for r in records if r.label == "int8" and r.fidelity == "search")
    assert all(sizes[r.number] < 0.75 * sizes[int8.number] < sizes[dense.number] for r in finals)
    for record in finals:
        before = next(r for r in records if r.number == record.parent)
        assert record.train_steps > before.train_steps == 3
    exported = study.pick(max_size_mb=0.9 * sizes[int8.number] / 1e6).export(tmp_path / "out")
    card = (exported / "card.md").read_text(encoding="utf-8")
    assert "80% of `0`, `3`, `8`. Masked weights are stored packed in the model file and run dense" in card
    assert json.loads((exported / "recipe.json").read_text())["recipe"]["mask"]["pattern"] == "unstructured"
