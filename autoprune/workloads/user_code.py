"""Functions in a user's own Python file, run only when the user said so."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from autoprune.errors import UsageError
from autoprune.naming import unknown_name


def check_user_code(path: str, function: str, option: str, *, trusted: bool) -> None:
    """Check that a file may be run and defines the function, without running it.

    Args:
        path: The Python file.
        function: Name of the function in it.
        option: The command line option that named it, for the message.
        trusted: Whether the user allowed to run the file.

    Raises:
        UsageError: If the file is missing, is not Python, lacks the function, or is not trusted.
    """
    file = Path(path)
    if "\0" in path or not file.is_file():
        raise UsageError(f"{option} {path}:{function}: there is no file {path!r}; allowed: file.py:function")
    if not trusted:
        raise UsageError(
            f"{option} {path}:{function} runs the code in {path!r}, which is not allowed unless you say so",
            "add --trust-code if you trust this file",
        )
    try:
        tree = ast.parse(file.read_bytes(), filename=path)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UsageError(f"{option}: {path!r} is not valid Python: {error}") from None
    statements = list(_module_level(tree.body))
    names = {node.name for node in statements if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = [target for node in statements if isinstance(node, ast.Assign) for target in node.targets]
    names |= {target.id for target in assigned if isinstance(target, ast.Name)}
    names |= {
        a.asname or a.name for node in statements if isinstance(node, ast.ImportFrom) for a in node.names
    }
    if function not in names and "*" not in names:
        raise unknown_name(f"function in {path}", function, names)


def _module_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that define a module's names, those under ``if``, ``try`` and ``with`` included."""
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for name in ("body", "orelse", "finalbody"):
            yield from _module_level(getattr(node, name, []))
        for handler in getattr(node, "handlers", []):
            yield from _module_level(handler.body)


def load_function(path: str, function: str, option: str, *, trusted: bool) -> Callable[..., Any]:
    """Run a Python file and return one of its functions; see :func:`check_user_code`.

    Raises:
        UsageError: If the file cannot be used, raises while it is run, or the name is not callable.
    """
    check_user_code(path, function, option, trusted=trusted)
    file = Path(path).resolve()
    name = f"autoprune_user_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    found = importlib.util.spec_from_file_location(name, file)
    if found is None or found.loader is None:
        raise UsageError(f"{option}: {path!r} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(found)
    # The file may import its neighbours; at the end, so that none of them hides a package.
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    # Classes defined in the file are looked up by module name when they are copied.
    sys.modules[name] = module
    call_user(found.loader.exec_module, f"{option} {path!r}", module)
    result = getattr(module, function, None)
    if not callable(result):
        raise UsageError(f"{option}: {function!r} in {path!r} is not a function")
    return result  # type: ignore[no-any-return]


def call_user(call: Callable[..., Any], what: str, *args: Any, **kwargs: Any) -> Any:
    """Call a user's function; what it raises becomes a ``UsageError`` that names the line."""
    try:
        return call(*args, **kwargs)
    except Exception as error:  # code of the user's own may raise anything; the fault is named, not hidden
        line = ""
        step = error.__traceback__
        while step is not None:
            line = f" (line {step.tb_lineno} of {Path(step.tb_frame.f_code.co_filename).name})"
            step = step.tb_next
        raise UsageError(f"{what} raised {type(error).__name__}: {error}{line}") from error


def accepted(function: Callable[..., Any], offered: dict[str, Any], what: str) -> dict[str, Any]:
    """Return those of the ``offered`` arguments that ``function`` takes by name.

    Raises:
        UsageError: If it needs an argument that is not offered.
    """
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in offered]
    if missing:
        raise UsageError(
            f"{what} needs the arguments {', '.join(missing)}; allowed: none, or any of {', '.join(offered) or 'none'}"
        )
    return {p.name: offered[p.name] for p in named if p.name in offered}
