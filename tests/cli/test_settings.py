"""Settings: file, flags and words, each over the one before."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoprune.cli.settings import check_engine, check_place, gather
from autoprune.config import make_config
from autoprune.errors import UsageError
from autoprune.naming import StudyPaths


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprune.target.usable_cores", lambda: 64)


def test_words_win_over_flags_and_flags_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "model: resnet18\ndata: digits\nseed: 1\nbudget: 1h\ntarget: {threads: 4, batch: 2}\n",
        encoding="utf-8",
    )
    found = gather(file, {"budget": "2h", "seed": 2, "model": None}, ["seed=3", "target.threads=8"])
    assert (found.model, found.budget, found.seed) == ("resnet18", "2h", 3)
    assert (found.target.threads, found.target.batch) == (8, 2)


def test_a_target_by_name_keeps_the_settings_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: a\ntarget: {threads: 4}\n", encoding="utf-8")
    assert gather(file, {"target": "onnxruntime"}).target.threads == 4
    file.write_text("model: a\ntarget: onnxruntime\n", encoding="utf-8")
    assert gather(file, {}, ["target.batch=3"]).target.batch == 3


def test_words_are_read_as_yaml() -> None:
    found = gather(
        None,
        {"model": "a"},
        ["objectives=[accuracy, size]", "trust_code=true", "final_share=5e-1", "study=no"],
    )
    assert found.objectives == ("accuracy", "size")
    assert (found.trust_code, found.final_share, found.study) == (True, 0.5, "no")


def test_objectives_as_a_list_of_names() -> None:
    assert gather(None, {"model": "a", "objectives": "accuracy,latency"}).objectives == (
        "accuracy",
        "latency",
    )


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("seed", "neither an option nor key=value"),
        ("=3", "neither an option nor key=value"),
        ("sead=3", "unknown setting 'sead'; did you mean 'seed'"),
        ("model.name=x", "'model' holds no settings of its own"),
        ("target.thread=2", "target.thread"),
        ("seed=[1, 2", "the value of seed:1"),
        ("seed=&a 1", "anchors"),
    ],
)
def test_faulty_words(word: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        gather(None, {"model": "a"}, [word])
    assert says in caught.value.message


def test_engines_pass_and_others_are_refused_with_the_near_one() -> None:
    assert [check_engine(name) for name in (None, "local", "ray")] == [None, "local", "ray"]
    with pytest.raises(UsageError, match="unknown engine 'rai'; did you mean 'ray'"):
        check_engine("rai")


def test_the_study_s_own_file_passes_as_storage() -> None:
    own = f"sqlite:///{StudyPaths.of('mine').database}"
    for storage in (None, "sqlite", own):
        check_place(make_config({"model": "m", "study": "mine", "storage": storage}), fresh=False)


@pytest.mark.parametrize(
    "storage",
    [
        "mysql://u:secret@h/db",
        "postgresql+psycopg2://u:secret@h/db",
        "postgresql://u:secret@h",
        "postgresql://u:sec/ret@h/db",
        "postgresql://u:secret@h:many/db",
        "postgresql://u:secret@h/db?sslmode",
        "postgresql://u:secret@[h/db",
        "sqlite:////elsewhere.db?password=secret",
        "redis://:secret@h",
        "secret",
        "",
        ["postgresql://u:secret@h/db"],
    ],
)
def test_other_storages_are_refused_without_their_password(storage: object) -> None:
    with pytest.raises(UsageError) as caught:
        check_place(make_config({"model": "m", "study": "mine", "storage": storage}), fresh=False)
    assert "secret" not in str(caught.value)
    assert "ret@" not in str(caught.value)
    assert "allowed: sqlite" in str(caught.value) or "than the study's own" in str(caught.value)
