"""Named moments of a study, at which the fault suite ends it; nothing happens unless AUTOPRUNE_FAULT names one.

A kill at a random time hardly ever falls between two lines that follow each other, where records and files part ways.
So the moments between them have names. ``AUTOPRUNE_FAULT=trial:told=kill`` ends the process at the first such moment,
``trial:told@3=kill`` at the third; several are separated by commas.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_VARIABLE = "AUTOPRUNE_FAULT"
_SIGNALS = {"kill": signal.SIGKILL, "int": signal.SIGINT, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
_seen: Counter[str] = Counter()


def reached(moment: str) -> None:
    """Send this process the signal that the environment asks for at ``moment``, if it asks for one."""
    wanted = os.environ.get(_VARIABLE)
    if wanted is None:
        return
    _seen[moment] += 1
    for part in wanted.split(","):
        place, _, action = part.partition("=")
        name, _, times = place.partition("@")
        if name == moment and _seen[moment] == int(times or 1):
            os.kill(os.getpid(), _SIGNALS[action])
