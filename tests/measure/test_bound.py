"""Measuring processes end with who started them, and let go of the machine's lock."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoprune.measure.lock import is_locked, lock_machine

_MEASURES = """
import sys
from autoprune.measure.process import run_here
run_here({"kind": "session", "target": {}, "jobs": [], "lock": sys.argv[1]}, 60.0)
"""


def children(pid: int) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] not in "ZX":
            found.append(int(place.parent.name))
    return found


def is_there(pid: int) -> bool:
    place = Path(f"/proc/{pid}/stat")
    try:
        return place.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only the kernel of Linux ends orphans")
def test_who_waits_for_the_machine_ends_with_a_killed_parent(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with lock_machine(str(lock)):
        parent = subprocess.Popen([sys.executable, "-c", _MEASURES, str(lock)])
        try:
            end = time.monotonic() + 60
            while not any(_waits(pid, lock) for pid in children(parent.pid)):
                assert time.monotonic() < end
                assert parent.poll() is None
                time.sleep(0.05)
            (measuring,) = children(parent.pid)
        finally:
            parent.send_signal(signal.SIGKILL)
            parent.wait()
        end = time.monotonic() + 10
        while is_there(measuring):
            assert time.monotonic() < end, "the measuring process outlives its parent"
            time.sleep(0.02)
    assert not is_locked(str(lock))


def _waits(pid: int, lock: Path) -> bool:
    """Return whether a process has the lock's file open, which it opens after it is bound to its parent."""
    try:
        return any(place.readlink() == lock for place in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
