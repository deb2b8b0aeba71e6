"""Entry point: runs a verb and turns every error into one message and an exit code."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import typer

from autoprune.cli.app import app
from autoprune.errors import AutopruneError, StorageError
from autoprune.printing import printable

INTERRUPTED = 130
BUG = 1
# Characters of a message; the faults of the longest files that are read by hand fit.
_LONGEST = 8_000

# Typer carries its own copy of click; the base of its usage errors is reachable through this one.
_ClickError = cast("type[Exception]", typer.BadParameter.__mro__[2])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; those of this process if not given.

    Returns:
        The exit code: 0 ok, 1 a bug of ours, 2 usage or settings, 3 no feasible point, 4 storage,
        5 export or parity, 6 too many failed trials, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if debug:
        words.remove("--debug")
    try:
        code = app(args=words, prog_name="autoprune", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer returns this for KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted; the same command again resumes")
        return INTERRUPTED
    except AutopruneError as error:
        return _fail(error, error.message, error.hint, error.exit_code, debug)
    except _ClickError as error:
        return _fail(
            error, _click_message(error), "`autoprune --help` lists the verbs and their options", 2, debug
        )
    except BrokenPipeError:
        return _reader_is_gone()
    except SystemExit as stop:  # how typer ends on a broken pipe
        if isinstance(stop.__context__, BrokenPipeError):
            return _reader_is_gone()
        return _bug(RuntimeError(f"something ended the program with {stop.code!r}"), debug)
    except OSError as error:
        storage = StorageError(
            f"a file could not be read or written: {error}", "free space or choose another folder"
        )
        return _fail(error, storage.message, storage.hint, storage.exit_code, debug)
    except Exception as error:
        return _bug(error, debug)


def run() -> None:
    """Run the command line and exit."""
    sys.exit(main())


def say(message: str, hint: str = "") -> None:
    """Print a message for people on the standard error, and on a line of its own what to do.

    Files and arguments bring along whatever they hold: see :func:`printable`, and what nobody would read is cut.
    """
    lines = [_cut(message), *([_cut(hint)] if hint else [])]
    print("autoprune: " + printable("\n".join(lines)), file=sys.stderr, flush=True)


def _cut(message: str) -> str:
    more = len(message) - _LONGEST
    return f"{message[:_LONGEST]}… ({more:,} characters more)" if more > 0 else message


def _reader_is_gone() -> int:
    """Leave quietly: nobody is left to tell, and Python would complain at exit that it cannot write."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
    return 0


def _click_message(error: BaseException) -> str:
    describe = getattr(error, "format_message", None)
    return str(describe() if callable(describe) else error)


def _fail(error: BaseException, message: str, hint: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    say(message, hint)
    return code


def _bug(error: Exception, debug: bool) -> int:
    """Say that it is our fault, and keep the traceback where the user can send it from."""
    if debug:
        traceback.print_exception(error)
    where = "run again with --debug to see where"
    try:
        handle, name = tempfile.mkstemp(prefix="autoprune-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            traceback.print_exception(error, file=stream)
        where = f"the traceback is in {Path(name)}"
    except OSError:
        where += " (the traceback could not be written to a file)"
    first = (str(error).strip().splitlines() or [""])[0]
    say(f"this is a bug of autoprune: {type(error).__name__}: {first:.300}; {where}")
    return BUG
