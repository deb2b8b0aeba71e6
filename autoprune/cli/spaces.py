"""Verb ``spaces``: the shipped search spaces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli import options
from autoprune.cli.output import print_json, print_table, print_text
from autoprune.errors import StorageError, UsageError

spaces = typer.Typer(
    help="List, show and copy the search spaces that are shipped.", invoke_without_command=True
)

Name = Annotated[str, typer.Argument(metavar="NAME|FILE", help="shipped search space, or a file of your own")]


@spaces.callback()
def _root(context: typer.Context, json: options.Json = False) -> None:
    """List, show and copy the search spaces that are shipped."""
    if context.invoked_subcommand is None:
        listing(json)


@spaces.command("list")
def listing(json: options.Json = False) -> None:
    """List the search spaces that are shipped."""
    from autoprune.space.space_files import load_space, shipped_spaces

    found = {name: load_space(name) for name in shipped_spaces()}
    if json:
        print_json({name: space.model_dump(mode="json") for name, space in found.items()})
    else:
        print_table(["space", "what it tries"], [(name, space.description) for name, space in found.items()])


@spaces.command()
def show(
    name: Name,
    json: options.Json = False,
) -> None:
    """Print a search space, comments included, after checking it."""
    from autoprune.space.space_files import load_space, space_path

    space = load_space(name)
    if json:
        print_json(space.model_dump(mode="json"))
    else:
        print_text(space_path(name).read_text(encoding="utf-8"))


@spaces.command()
def schema() -> None:
    """Print the JSON schema of search spaces, for editors."""
    from autoprune.space.space_files import json_schema

    print_json(json_schema())


@spaces.command()
def copy(
    name: Name,
    to: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="NAME.yaml here if not given")] = None,
) -> None:
    """Copy a search space to a file of your own; an existing file is never overwritten."""
    from autoprune.space.space_files import load_space, space_path

    load_space(name)
    source = space_path(name)
    target = to or Path(source.name)
    text = source.read_text(encoding="utf-8")
    try:
        with target.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(f"{str(target)!r} exists already", "give another file name") from None
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{str(target)!r} cannot be written: {error}", "give a file in a writable folder"
        ) from None
    print_text(str(target))
