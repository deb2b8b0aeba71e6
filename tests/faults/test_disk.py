"""Full disks and folders that cannot be written: a message, exit code 4, and the same command resumes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from tests.faults.conftest import Tell
from tests.faults.harness import Forker, Run, Study, assert_intact

FULL = ("No space left on device", "disk is full", "File too large", "disk I/O error", "full")


def assert_told(run: Run) -> None:
    """Check that a run ended with a message that names cause and remedy, and with code 4."""
    last = run.said.strip().splitlines()[-3:]
    text = " ".join(last)
    assert run.wait() == 4, run.said
    assert "Traceback" not in run.said
    assert any(word in text for word in FULL), text
    assert "free space" in text, text


def writes_of(folder: Path, study: Study, at: int) -> tuple[Run, int]:
    """Run a study whose disk is full from its n-th write on; return the run and how many writes it tried."""
    count = folder / "writes"
    count.unlink(missing_ok=True)
    run = study.run(environment={"AUTOPRUNE_TESTS_FULL_AT": str(at), "AUTOPRUNE_TESTS_WRITES": str(count)})
    return run, int(count.read_text())


def fill_at_every(forker: Forker, folder: Path, step: float) -> tuple[int, int, int]:
    """Let a disk be full at the n-th write of a run, for n from 1 on; each run resumes the one before.

    Args:
        forker: Where runs come from.
        folder: Gets the studies.
        step: By how much n grows: each n is the last one times this, and one more.

    Returns:
        The faults, the studies that came to their end, and the largest n.
    """
    at, faults, studies, most = 1, 0, 0, 0
    while True:
        study = Study(forker, folder / f"{studies}", sampler="auto" if studies % 2 else "tpe")
        begun = at
        while True:
            run, tried = writes_of(folder, study, at)
            if tried < at:
                assert run.wait() == 0, run.said
                break
            if run.wait() == 0:  # nothing is missing but the copy of the record
                assert "no copy of" in run.said and any(word in run.said for word in FULL), run.said
            else:
                assert_told(run)
            if study.told:
                assert_intact(study, ended=False)
            faults, most = faults + 1, at
            at = int(at * step) + 1
        studies += 1
        assert_intact(study)
        if at == begun:  # a whole study writes less often than that
            return faults, studies, most


def test_a_disk_that_is_full_at_the_nth_write(forker: Forker, tmp_path: Path, tell: Tell) -> None:
    if forker.shim is None:
        pytest.skip("no C compiler to build what fills the disk")
    faults, studies, most = fill_at_every(forker, tmp_path, 2.5)
    assert faults >= 5
    tell(faults=faults, studies=studies, largest_n=most)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_disk_that_is_full_at_every_write(forker: Forker, tmp_path: Path, tell: Tell) -> None:
    if forker.shim is None:
        pytest.skip("no C compiler to build what fills the disk")
    faults, studies, most = fill_at_every(forker, tmp_path, 1.0)
    assert faults >= 100
    tell(faults=faults, studies=studies, largest_n=most)


@pytest.mark.parametrize(
    "sizes", [(8_000, 130_000), pytest.param(range(4_000, 300_000, 6_000), marks=pytest.mark.slow)]
)
def test_files_that_may_not_grow(study: Study, tell: Tell, sizes: tuple[int, ...]) -> None:
    faults = 0
    for size in sizes:
        run = study.run(setups=[("file_limit", [size])])
        if run.wait() == 0:
            break
        assert_told(run)
        faults += 1
    study.finish()
    assert faults
    tell(assert_intact(study), faults=faults)


@contextmanager
def mounted(place: Path, options: str) -> Iterator[None]:
    """Mount a small file system in memory for the length of the block, or skip."""
    place.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(words, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system takes rights that are not there")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


@pytest.mark.slow
def test_a_small_disk_that_really_fills(study: Study, tell: Tell) -> None:
    place = study.folder / "studies"
    with mounted(place, "size=400k"):
        faults = 0
        for size in ("400k", "480k", "600k"):
            subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
            run = study.run()
            if run.wait() == 0:
                break
            assert_told(run)
            faults += 1
        assert faults
        subprocess.run(["mount", "-o", "remount,size=20m", str(place)], check=True)
        study.finish()
        tell(assert_intact(study), faults=faults)


def test_a_folder_that_cannot_be_written(study: Study, tell: Tell) -> None:
    place = study.folder / "studies"
    with mounted(place, "size=20m") if os.geteuid() == 0 else nullcontext():
        study.run(fault="trial:told@2=kill")
        _read_only(place)
        run = study.run()
        assert run.wait() == 4, run.said
        assert "Traceback" not in run.said
        last = " ".join(run.said.strip().splitlines()[-2:])
        assert any(word in last for word in ("Read-only file system", "Permission denied", "readonly")), last
        assert "AUTOPRUNE_STUDIES" in last or "permissions" in last, last
        _writable(place)
        study.finish()
        tell(assert_intact(study))


def _read_only(place: Path) -> None:
    if os.geteuid() == 0:
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    else:
        for folder in (place, *(p for p in place.rglob("*") if p.is_dir())):
            folder.chmod(0o555)


def _writable(place: Path) -> None:
    if os.geteuid() == 0:
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
    else:
        for folder in (place, *(p for p in place.rglob("*") if p.is_dir())):
            folder.chmod(0o755)
