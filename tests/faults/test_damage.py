"""Torn, truncated, flipped and empty files: found, named, set aside, and never a wrong number."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import records
from tests.faults.conftest import Tell
from tests.faults.harness import Forker, Study, assert_intact

KINDS: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda raw: raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 4]) + raw[len(raw) // 2 + 1 :],
    "empty": lambda raw: b"",
    "truncated": lambda raw: raw[: len(raw) // 2],
    "torn": lambda raw: raw[: -len(raw) // 4] + b"\0" * (len(raw) - len(raw[: -len(raw) // 4])),
}


@pytest.fixture(scope="module")
def searched(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of the default search that came to its end."""
    study = Study(forker, tmp_path_factory.mktemp("searched"), sampler="auto", budget="2trials")
    study.finish()
    return study


@pytest.fixture(scope="module")
def cut(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study that was killed when its final phase had trained one network."""
    study = Study(forker, tmp_path_factory.mktemp("cut"), final_share=0.3)
    assert study.run(fault="final:recovered=kill").wait() == -signal.SIGKILL
    return study


def copied(study: Study, folder: Path) -> Study:
    """Return a copy of a study in another place."""
    shutil.copytree(study.folder, folder)
    return Study(
        study.forker,
        folder,
        study.name,
        study.budget,
        study.sampler,
        study.extra,
        study.final_share,
        study.runs,
    )


def damage(place: Path, kind: str) -> bytes:
    """Damage a file and return what it holds now."""
    made = KINDS[kind](place.read_bytes())
    place.write_bytes(made)
    return made


def is_aside(place: Path, content: bytes) -> bool:
    """Return whether the damaged file, or the folder with it, is kept under another name."""
    own = place.parent.glob(f"{place.name}.damaged-*")
    within = (f / place.name for f in place.parent.parent.glob(f"{place.parent.name}.damaged-*"))
    return any(p.is_file() and p.read_bytes() == content for p in (*own, *within))


def goes_on(study: Study, place: Path, kind: str, budget: str = "3trials") -> None:
    """Damage a file of a study, go on with it, and check that the file was named and kept, and the study is sound."""
    made = damage(place, kind)
    study.budget = budget
    run = study.finish()
    named = place.name in run.said or place.parent.name in run.said
    assert named and "damaged" in run.said, run.said
    assert is_aside(place, made), [str(p) for p in study.paths.root.rglob("*")]
    assert_intact(study)


# File of a finished study, by a pattern, that a study which goes on reads again.
FILES = ("study.db", "settings.yaml", "profile.json", "env.json", "artifacts/trial-00000/model.onnx")
_SHORT = [
    ("study.db", "flipped"),
    ("settings.yaml", "truncated"),
    ("artifacts/trial-00000/model.onnx", "flipped"),
]
_LONG = [(name, kind) for name in FILES for kind in KINDS if (name, kind) not in _SHORT]


@pytest.mark.parametrize(
    ("name", "kind"), [*_SHORT, *(pytest.param(*case, marks=pytest.mark.slow) for case in _LONG)]
)
def test_a_damaged_file_is_named_and_set_aside_and_the_study_goes_on(
    searched: Study, tmp_path: Path, tell: Tell, name: str, kind: str
) -> None:
    study = copied(searched, tmp_path / "study")
    place = study.paths.root / name
    if name == "profile.json" and kind == "flipped":
        # In the middle of a number, where JSON stays JSON.
        text = place.read_bytes()
        at = text.index(b'"growth": 0.') + 13
        place.write_bytes(text[:at] + (b"9" if text[at : at + 1] != b"9" else b"1") + text[at + 1 :])
        shutil.rmtree(study.folder / "cache")
        study.budget = "3trials"
        run = study.finish()
        assert "profile.json" in run.said
        assert list(study.paths.root.glob("profile.json.damaged-1"))
        assert_intact(study)
    else:
        if name == "profile.json":
            shutil.rmtree(study.folder / "cache")
        goes_on(study, place, kind)
    tell(damaged=1, named=1, kept=1)


@pytest.mark.parametrize("name", ["weights.safetensors", "recipe.json", "manifest.json"])
def test_a_damaged_network_of_the_final_phase_is_trained_again(
    cut: Study, tmp_path: Path, tell: Tell, name: str
) -> None:
    study = copied(cut, tmp_path / "study")
    (folder,) = study.paths.artifacts.glob("trial-*-recovered1")
    goes_on(study, folder / name, "flipped", study.budget)
    tell(damaged=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_damaged_network_of_a_trial_is_made_again(
    cut: Study, tmp_path: Path, tell: Tell, kind: str
) -> None:
    study = copied(cut, tmp_path / "study")
    for folder in study.paths.artifacts.glob("trial-*-recovered1"):
        shutil.rmtree(folder)
    before = study.records
    pruned = [r.number for r in before if r.recipe is not None and r.recipe.prunes and r.state == "complete"]
    damaged = [place for number in pruned if (place := study.paths.artifact(number)).is_dir()]
    for place in damaged:
        damage(place / "weights.safetensors", kind)
    run = study.finish()
    assert "weights.safetensors differs from its manifest" in run.said
    assert "is made again" in run.said
    assert_intact(study, unread=damaged)
    tell(damaged=len(damaged))


def test_what_is_exported_is_checked(searched: Study, tmp_path: Path, tell: Tell) -> None:
    study = copied(searched, tmp_path / "study")
    final = next(r for r in study.records if r.fidelity == "final")
    assert final.parent is not None
    place = study.paths.final_artifact(final.parent, 1) / "model.onnx"
    damage(place, "flipped")
    to = tmp_path / "exported"
    run = study.run(verb=["export", study.name, "--trial", str(final.number), "--to", str(to)])
    assert run.wait() == 4
    assert "model.onnx differs from its manifest" in run.said
    assert not to.exists()
    tell(damaged=1)


def front(study: Study) -> tuple[int, str, str]:
    run = study.run(verb=["front", study.name, "--json"])
    return run.wait(), run.output.read_text(), run.said


@pytest.mark.parametrize("count", [8, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_a_bit_that_flips_in_the_database_never_gives_a_wrong_number(
    searched: Study, tmp_path: Path, tell: Tell, count: int
) -> None:
    study = copied(searched, tmp_path / "study")
    sound = study.paths.database.read_bytes()
    code, wanted, _ = front(study)
    assert code == 0
    places = random.Random(count)
    told = unnoticed = 0
    wrong: list[str] = []
    for _ in range(count):
        at = places.randrange(len(sound))
        flipped = bytearray(sound)
        flipped[at] ^= 1 << places.randrange(8)
        study.paths.database.write_bytes(flipped)
        for ending in ("-wal", "-shm"):
            study.paths.database.with_name(f"study.db{ending}").unlink(missing_ok=True)
        code, found, said = front(study)
        if code == 0:  # where nothing is kept, or nothing that is shown
            wrong += [] if found == wanted else [f"bit of byte {at}: another front"]
            unnoticed += 1
        else:
            wrong += [] if code == 4 else [f"bit of byte {at}: {code}: {said}"]
            assert "Traceback" not in said
            assert "study.db" in said or "trial " in said, said
            told += 1
    assert not wrong, "\n".join(wrong)
    tell(flips=count, told=told, harmless=unnoticed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_study_goes_on_whatever_bit_flips_in_its_database(
    searched: Study, tmp_path: Path, tell: Tell
) -> None:
    places = random.Random(1)
    aside = 0
    for number in range(60):
        study = copied(searched, tmp_path / f"{number}")
        raw = bytearray(study.paths.database.read_bytes())
        raw[places.randrange(len(raw))] ^= 1 << places.randrange(8)
        study.paths.database.write_bytes(raw)
        study.budget = "3trials"
        study.finish()
        assert_intact(study)
        aside += bool(list(study.paths.root.glob("study.db.damaged-*")))
        shutil.rmtree(study.folder)
    tell(flips=60, set_aside=aside)


def test_a_log_of_the_database_that_is_cut_off_is_noticed(forker: Forker, tmp_path: Path, tell: Tell) -> None:
    study = Study(forker, tmp_path / "study")
    study.run(fault="trial:committed@4=kill")
    log = study.paths.root / "study.db-wal"
    whole = len(log.read_bytes())
    assert whole > 0
    log.write_bytes(log.read_bytes()[: whole // 2])
    known = len(study.records)
    assert known < 4
    run = study.finish()
    assert "its end was lost" in run.said
    aside = [p for p in study.paths.artifacts.glob("*.damaged-1") if p.name.startswith("trial-")]
    assert aside
    # What was acknowledged after the cut is gone, and said to be; the rest is as it was.
    digests = {r.number: records.digest(r) for r in study.records}
    first = [line for line in study.lines if "told" in line][:known]
    assert all(digests[line["told"]] == line["digest"] for line in first if line["told"] < known - 1)
    tell(bytes_cut=whole - whole // 2, set_aside=len(aside))


def test_screens_that_are_damaged_are_left_out(searched: Study, tmp_path: Path, tell: Tell) -> None:
    study = copied(searched, tmp_path / "study")
    place = study.paths.screens
    lines = place.read_bytes().splitlines(keepends=True)
    assert len(lines) > 3
    flipped = lines[1].replace(b'"lost": 0', b'"lost": 1', 1)
    assert flipped != lines[1]
    place.write_bytes(b"".join([lines[0], flipped, lines[2][:40], b"\n", *lines[3:]]))
    study.budget = "3trials"
    run = study.finish()
    assert "screens.jsonl: 2 of its lines are damaged" in run.said
    assert_intact(study)
    tell(lines=2)
