"""Processes that end with the one that started them, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def end_with(parent: int | None) -> None:
    """Let the kernel kill this process once the thread that started it is gone; end it if that is gone already.

    Without this, who is killed leaves its children behind: they hold locks, memory and processors that nobody frees.
    Only Linux can; elsewhere this does nothing but the check. The signal comes when the *thread* ends, so that a
    process is to be started by one that waits for it, or lives as long as its process.

    Args:
        parent: Number of the process that started this one; None where it is not known.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    # It may have died before the kernel was asked.
    if parent is not None and os.getppid() != parent:
        os._exit(1)
