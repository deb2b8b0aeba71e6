"""The measuring process as others start it: a job in, its result out, nothing left running."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import autoprune
from autoprune.errors import TrialError
from autoprune.measure.lock import is_locked
from autoprune.measure.quiet import standing_aside

# Waiting for another measurement's lock counts, so this is generous.
TIMEOUT_S = 1800.0
# Waiting for those that train, which give way at every step.
QUIET_TIMEOUT_S = 600.0
_log = logging.getLogger(__name__)

# Takes a job and the seconds after which it has failed; returns its result.
RunJob = Callable[[dict[str, Any], float], dict[str, Any]]
_elsewhere: RunJob | None = None


def run_session(jobs: list[dict[str, Any]], timeout_s: float = TIMEOUT_S) -> list[dict[str, Any]]:
    """Run jobs one after the other in one session, in which nobody else measures on this machine.

    Each job has a process of its own. One that is marked ``optional`` may fail: its result is then why, as ``failed``.

    Args:
        jobs: What :mod:`autoprune.measure.worker` is given, all for one target.
        timeout_s: Seconds after which the session has failed, waiting for others included.

    Returns:
        The results in the order of the jobs.

    Raises:
        TrialError: As :func:`run_worker`, or if a job fails that is not optional.
    """
    session = {"kind": "session", "target": jobs[0]["target"], "jobs": jobs}
    results: list[dict[str, Any]] = run_worker(session, timeout_s)["results"]
    return results


def measure_elsewhere(run: RunJob | None) -> None:
    """Let this process's measurements be done by ``run``, such as on the node that has the device; None undoes it."""
    global _elsewhere
    _elsewhere = run


def run_worker(job: dict[str, Any], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Run a measurement where this process's measurements are done, and return its result.

    Raises:
        TrialError: If it fails, takes too long, or its output cannot be read.
    """
    if _elsewhere is None:
        return run_here(job, timeout_s)
    with standing_aside():
        return _elsewhere(job, timeout_s)


def run_here(job: dict[str, Any], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Run a measurement process, while nothing of ours trains on this machine, and return its result.

    Raises:
        TrialError: As :func:`run_worker`.
    """
    # The measuring process has to say what it waited for before it is ended.
    job = {"quiet_timeout_s": min(QUIET_TIMEOUT_S, 0.8 * timeout_s), **job, "parent": os.getpid()}
    with standing_aside():
        output, errors, code = _run(job, timeout_s)
    if code != 0:
        raise TrialError("latency", f"the measurement failed: {last_line(errors, code)}")
    try:
        result: dict[str, Any] = json.loads(output)
    except ValueError as error:
        raise TrialError("latency", f"the measurement's result cannot be read: {error}") from error
    return result


def _run(job: dict[str, Any], timeout_s: float) -> tuple[str, str, int]:
    """Return what the measuring process wrote to its output and as errors, and its exit code."""
    if is_locked(job.get("lock")):
        _log.warning("waiting for another measurement on this machine")
    # Ctrl-C goes to the terminal's whole group; the driver decides what it means.
    process = subprocess.Popen(
        [sys.executable, "-m", "autoprune.measure.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(json.dumps(job), timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise TrialError("latency", f"the measurement took longer than {timeout_s:g} s") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
            process.communicate()
    return output, errors, process.returncode


def environment() -> dict[str, str]:
    """Return the environment of a measuring process, in which this very package is found."""
    home = str(Path(autoprune.__file__).resolve().parents[1])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def last_line(errors: str, code: int) -> str:
    """Return why a process failed, by what it wrote last."""
    return (errors.strip().splitlines() or [f"exit code {code}"])[-1]
