"""Every error that autoprune raises on purpose, with a hint and an exit code.

A message says what was wrong (name and value) and what is allowed; the hint says what to do next.
The command line prints both on one block, without a traceback, and exits with ``exit_code``.
"""

from __future__ import annotations


class AutopruneError(Exception):
    """Root of all errors raised on purpose.

    Args:
        message: What was wrong, with the name and the value, and what is allowed.
        hint: What the user can do next; empty where the message says it all.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(AutopruneError):
    """Raised when a setting, a name or an input file cannot be used (exit code 2)."""

    exit_code = 2


class NoFeasiblePointError(AutopruneError):
    """Raised when no point of the front satisfies the constraints (exit code 3)."""

    exit_code = 3


class StorageError(AutopruneError):
    """Raised when a study cannot be read, written or locked (exit code 4)."""

    exit_code = 4


class ExportError(AutopruneError):
    """Raised when an export fails or its outputs differ from the network's (exit code 5)."""

    exit_code = 5


class TooManyFailuresError(AutopruneError):
    """Raised when trials fail alike one after the other (exit code 6)."""

    exit_code = 6


class WorkerError(AutopruneError):
    """Raised when no worker can be started, or a cluster cannot be reached (exit code 2)."""

    exit_code = 2


class CompressionError(AutopruneError):
    """Raised when a group or layer cannot be compressed as asked; names the layer."""

    exit_code = 5


class TrialError(AutopruneError):
    """Raised inside a trial; recorded with its kind, never fatal to the study.

    Args:
        kind: One of ``raised``, ``nan``, ``inf``, ``out-of-memory``, ``lost``, ``interrupted``, ``export``,
            ``parity``, ``latency``, and of workers ``worker-lost``, ``crashed``, ``hung``.
        reason: One line for people.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind = kind
        self.reason = reason


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
