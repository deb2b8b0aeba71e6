"""Trials that go wrong: what the environment says the n-th evaluation of a study does."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

from tests.faults import records

TRIALS = "AUTOPRUNE_TESTS_TRIALS"
# Seconds by which the wall clock is off from then on; see shim.c.
_JUMPS = {"forwards": 86_400, "backwards": -86_400}


def _asked() -> str:
    """Return what the evaluation under way is to do; empty for nothing.

    ``nan@3,raise@5*``: the third evaluation gives NaN, and that of the fifth recipe raises whenever it is tried.
    """
    text, place = os.environ.get(TRIALS), os.environ.get(records.LOG)
    if not text or place is None:
        return ""
    keys = [line["began"] for line in records.read(Path(place)) if "began" in line]
    for part in text.split(","):
        what, _, number = part.partition("@")
        index = int(number.rstrip("+*"))
        if number.endswith("+") and len(keys) >= index:
            return what
        if len(keys) == index or (number.endswith("*") and len(keys) > index and keys[-1] == keys[index - 1]):
            return what
    return ""


def in_build() -> None:
    """Go wrong where the network is exported."""
    what = _asked()
    if what == "raise":
        raise RuntimeError("the kernel has no such shape")
    if what == "memory":
        raise MemoryError("a list of the trial")
    if what == "real-memory":
        hoard = []
        while True:
            hoard.append(bytearray(b"x" * (64 << 20)))
    if what == "exit":
        os._exit(7)
    if what == "sys.exit":
        sys.exit(3)
    if what == "hang":
        time.sleep(3600)
    if what in _JUMPS:
        os.environ["AUTOPRUNE_TESTS_CLOCK"] = f"1:{_JUMPS[what]}"
    if what == "crash":
        os.kill(os.getpid(), 11)


def in_timing(ratio: float) -> float:
    """Return the ratio of latency, or what a broken timer gives."""
    return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(_asked(), ratio)
