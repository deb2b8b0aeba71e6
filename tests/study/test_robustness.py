"""What was measured of robustness is kept by content, and damage costs a measurement, not the study."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from autoprune.errors import StorageError
from autoprune.measure.record import Capability, ClassScore, CorruptedScore, Robustness
from autoprune.naming import StudyPaths
from autoprune.study import robustness
from autoprune.study.robustness import RobustnessCache, content_of


def result(accuracy: float) -> Robustness:
    whole = Capability(name="accuracy", value=accuracy, ci=(0.0, 1.0), examples=9)
    worst = ClassScore(name="cat", index=0, value=0.1, ci=(0.0, 1.0), examples=3)
    clean = CorruptedScore(corruption="none", severity=0, accuracy=whole, worst_class=worst)
    return Robustness(clean=clean, corrupted=(clean,), seed=0)


def test_a_measurement_is_found_by_model_and_data_also_by_the_next_run() -> None:
    paths = StudyPaths.of("cached")
    cache = RobustnessCache(paths)
    assert cache.get("m", "d") is None
    cache.put("m", "d", result(0.5))
    cache.put("m", "other", result(0.6))
    cache.put("n", "d", result(0.7))
    for known in (cache, RobustnessCache(paths)):
        assert known.get("m", "d") == result(0.5)
        assert known.get("m", "other") == result(0.6)
        assert known.get("n", "d") == result(0.7)
        assert known.get("n", "other") is None


def test_another_way_of_measuring_measures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = StudyPaths.of("older")
    RobustnessCache(paths).put("m", "d", result(0.5))
    monkeypatch.setattr(robustness, "PROTOCOL", robustness.PROTOCOL + 1)
    assert RobustnessCache(paths).get("m", "d") is None


@pytest.mark.parametrize("content", [b"{", b"\xff", b"7", b'[{"model": "m"}]'])
def test_a_damaged_file_is_told_and_measured_again(content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    paths = StudyPaths.of("damaged")
    paths.root.mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert RobustnessCache(paths).get("m", "d") is None
        assert not caplog.records, "that there is no file yet is as it should be"
        paths.robustness.write_bytes(content)
        cache = RobustnessCache(paths)
    assert f"{paths.robustness} cannot be used and is measured again" in caplog.text
    cache.put("m", "d", result(0.5))
    assert RobustnessCache(paths).get("m", "d") == result(0.5)


def test_a_figure_that_changed_is_never_shown_and_the_file_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    paths = StudyPaths.of("changed")
    RobustnessCache(paths).put("m", "d", result(0.5))
    changed = paths.robustness.read_text().replace('"value": 0.5', '"value": 0.7')
    paths.robustness.write_text(changed)
    cache = RobustnessCache(paths)
    assert cache.get("m", "d") is None
    assert "its checksum differs" in caplog.text
    cache.put("m", "d", result(0.6))
    cache.put("n", "d", result(0.6))
    aside = paths.robustness.with_name(f"{paths.robustness.name}.damaged-1")
    assert aside.read_text() == changed
    assert RobustnessCache(paths).get("m", "d") == result(0.6)
    assert [p.name for p in paths.root.glob("*.damaged-*")] == [aside.name]


def test_the_content_of_a_file_is_its_manifest_s(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"model.onnx": "abc"}), encoding="utf-8")
    assert content_of(tmp_path, "model.onnx") == "abc"
    with pytest.raises(StorageError, match=r"is damaged: its manifest lacks other\.onnx"):
        content_of(tmp_path, "other.onnx")
    for content in ("", "[]", "3"):
        (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
        with pytest.raises(StorageError, match="damaged"):
            content_of(tmp_path, "model.onnx")
    with pytest.raises(StorageError, match="damaged"):
        content_of(tmp_path / "gone", "model.onnx")
